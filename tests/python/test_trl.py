"""TRL's trainers, given a model and given the name of one."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_hf import llama, same, sentence, tokenizer, tokens, weights
from transformers import default_data_collator
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import retouch
from retouch.errors import HyperparameterError

# TRL uses the old name of the option
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CONFIGS = {
    "magnitude": retouch.SelectConfig(score="magnitude", density=0.05),
    "gradient": retouch.SelectConfig(score="gradient", density=0.05),
}
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "seed": 7,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer: what a hub id would be."""
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def sft(out: Path, folder: Path, named: bool, callbacks: Any = None, **changes: Any) -> SFTTrainer:
    words = {} if named else {"processing_class": tokenizer()}
    return SFTTrainer(
        model=str(folder) if named else llama(),
        args=SFTConfig(output_dir=str(out), max_length=16, **(QUIET | changes)),
        train_dataset=Dataset.from_dict({"text": [sentence(s) for s in tokens(32)]}),
        callbacks=callbacks,
        **words,
    )


@pytest.mark.parametrize("score", ["magnitude", "gradient"])
@pytest.mark.parametrize("named", [True, False])
def test_sft(tmp_path: Path, folder: Path, named: bool, score: str) -> None:
    """By callback and by `attach`, from a name and from a model: the same selected training."""
    config = CONFIGS[score]
    by_callback = sft(tmp_path, folder, named, callbacks=[retouch.SelectiveUpdates(config)])
    by_callback.train()
    attached = retouch.attach(sft(tmp_path, folder, named), config)
    assert isinstance(attached, SFTTrainer) and type(attached).__name__ == "SFTTrainer"
    attached.train()
    assert same(weights(by_callback.model), weights(attached.model))
    retouch.verify_untouched(attached.model)
    history = [entry for entry in attached.state.log_history if "loss" in entry]
    assert history[0]["retouch/selected"] > 0 and history[0]["retouch/update_norm"] > 0
    assert history[0]["num_tokens"] == history[1]["num_tokens"] / 2  # the selection is not counted
    base = llama()
    assert not same(weights(base), weights(attached.model))
    retouch.Delta.from_model(attached.model).apply_(base)
    assert same(weights(base), weights(attached.model))


def test_selecting_leaves_trls_sums_alone(tmp_path: Path, folder: Path) -> None:
    computed = retouch.attach(sft(tmp_path, folder, False), CONFIGS["gradient"])
    computed.train()
    given = sft(tmp_path, folder, False)
    mask = retouch.get_engine(computed.model).mask
    retouch.attach(
        given,
        retouch.Mask.from_indices({name: s.flat() for name, s in mask.items()}, given.model),
    )
    given.train()
    assert same(weights(computed.model), weights(given.model))
    timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    for one, two in zip(computed.state.log_history, given.state.log_history, strict=True):
        assert {k: v for k, v in one.items() if k not in timings} == {
            k: v for k, v in two.items() if k not in timings
        }


@pytest.mark.parametrize("checkpoint", ["full", "delta"])
def test_sft_resumes_exactly(tmp_path: Path, folder: Path, checkpoint: str) -> None:
    def start() -> Any:
        run = sft(tmp_path, folder, True, save_strategy="steps", save_steps=2)
        return retouch.attach(run, CONFIGS["gradient"], checkpoint=checkpoint)

    whole = start()
    whole.train()
    again = start()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert ("model.safetensors" in names) == (checkpoint == "full")
    assert "tokenizer.json" in names


@pytest.mark.parametrize("score", ["gradient", "fisher"])
def test_dpo(tmp_path: Path, folder: Path, score: str) -> None:
    """The trainer's loss is what is scored, and a sample is a pair (two rows of a batch)."""
    texts = [sentence(s).split() for s in tokens(32)]
    data = Dataset.from_dict(
        {
            "prompt": [" ".join(t[:4]) + " " for t in texts],
            "chosen": [" ".join(t[4:8]) for t in texts],
            "rejected": [" ".join(t[8:]) for t in texts],
        }
    )
    run = DPOTrainer(
        model=str(folder),
        args=DPOConfig(output_dir=str(tmp_path), max_length=16, **QUIET),
        processing_class=tokenizer(),
        train_dataset=data,
    )
    reference = weights(run.ref_model)
    retouch.attach(run, score, density=0.05, samples=6).train()  # one batch and a half
    assert same(weights(run.ref_model), reference)
    retouch.verify_untouched(run.model)
    base = llama()
    retouch.Delta.from_model(run.model).apply_(base)
    assert same(weights(base), weights(run.model)) and not same(weights(base), reference)


def different_words(completions: list[str], **_: object) -> list[float]:
    """A reward."""
    return [float(len(set(text.split()))) for text in completions]


def test_grpo(tmp_path: Path, folder: Path) -> None:
    """The batches come from generation, so a score that needs data must be given some."""

    def start() -> GRPOTrainer:
        return GRPOTrainer(
            model=str(folder),
            reward_funcs=different_words,
            args=GRPOConfig(
                output_dir=str(tmp_path),
                num_generations=2,
                max_completion_length=4,
                **(QUIET | {"max_steps": 2}),
            ),
            train_dataset=Dataset.from_dict(
                {"prompt": [" ".join(sentence(s).split()[:4]) for s in tokens(16)]}
            ),
        )

    run = start()
    with pytest.raises(HyperparameterError, match="data="):
        retouch.attach(run, CONFIGS["gradient"]).train()
    batches = [default_data_collator(tokens(4))]
    for config, data in ((CONFIGS["magnitude"], None), (CONFIGS["gradient"], batches)):
        run = retouch.attach(start(), config, data=data)
        run.train()
        retouch.verify_untouched(run.model)
        assert run.state.log_history[0]["retouch/update_norm"] > 0
