"""Checkpoints of the real Trainer: resuming, the best model, whole or as a delta, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import llama, same, tokenizer, tokens, trainer, weights
from transformers import AutoModelForCausalLM

import retouch
from retouch.errors import BaseMismatchError, EngineError

GRADIENT = retouch.SelectConfig(score="gradient", density=0.05)
DTYPES = [torch.float32, torch.bfloat16]
OPTIMIZERS = [
    None,
    retouch.AdamW,
    (retouch.AdamW, {"rounding": "kahan", "state_bits": 8}),
    (retouch.SGD, {"rounding": "stochastic", "momentum": 0.9}),
    retouch.Adafactor,
]
SAVING = {"save_strategy": "steps", "save_steps": 2}


def start(out: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A run that draws random numbers in every forward and saves at steps 2 and 4."""
    own = {k: changes.pop(k) for k in ("checkpoint", "optimizer", "config") if k in changes}
    run = trainer(out, llama(dtype, attention_dropout=0.1), **(SAVING | changes))
    return retouch.attach(run, own.pop("config", GRADIENT), **own)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def rebuilt(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The untrained model with the delta of the trained one."""
    base = llama(dtype)
    retouch.Delta.from_model(model).apply_(base)
    return weights(base)


def assert_equal(a: Any, b: Any) -> None:
    """Nested state dicts, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("checkpoint", ["full", "delta"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_is_exact(
    tmp_path: Path, dtype: torch.dtype, checkpoint: str, optimizer: Any
) -> None:
    kind = {"checkpoint": checkpoint, "optimizer": optimizer}
    whole = start(tmp_path, dtype, **kind)
    whole.train()
    again = start(tmp_path, dtype, **kind)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    assert same(weights(whole.model), weights(again.model))
    assert_equal(whole.optimizer.state_dict(), again.optimizer.state_dict())
    assert retouch.get_engine(again.model).mask == retouch.get_engine(whole.model).mask
    retouch.verify_untouched(again.model)
    assert same(rebuilt(again.model, dtype), weights(whole.model))


def test_resuming_in_the_middle_of_accumulation_and_schedule(tmp_path: Path) -> None:
    changes = {
        "gradient_accumulation_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_steps": 14,
        "save_steps": 7,  # one step into the second epoch, whose last step has one batch
    }
    whole = start(tmp_path, **changes)
    whole.train()
    again = start(tmp_path, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert losses(again) == losses(whole)
    assert same(weights(whole.model), weights(again.model))


def test_resuming_selects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path).train()
    again = start(tmp_path)
    monkeypatch.setattr(again, "compute_loss", _refuse_outside_training(again))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def _refuse_outside_training(run: Any) -> Any:
    compute = run.compute_loss

    def loss(*args: Any, **kwargs: Any) -> Any:
        assert run.callback_handler.train_dataloader is not None, "selecting on resume"
        return compute(*args, **kwargs)

    return loss


@pytest.mark.parametrize("checkpoint", ["full", "delta"])
def test_one_trainer_may_go_back_to_its_checkpoint(tmp_path: Path, checkpoint: str) -> None:
    run = start(tmp_path, checkpoint=checkpoint)
    run.train()
    end = weights(run.model)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(end, weights(run.model))
    assert same(rebuilt(run.model), end)


def test_another_config_on_resume_warns_and_the_mask_of_the_checkpoint_stays(
    tmp_path: Path,
) -> None:
    whole = start(tmp_path)
    whole.train()
    again = start(tmp_path, config=retouch.SelectConfig(score="gradient", density=0.1))
    with pytest.warns(UserWarning, match="density=0.05, now 0.1"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))
    record = json.loads((tmp_path / "checkpoint-4" / "retouch_config.json").read_text())
    assert record["density"] == 0.05


def test_a_given_mask_on_resume(tmp_path: Path) -> None:
    """The same mask is the same selection, however it was found; another one is reported."""
    whole = start(tmp_path)
    whole.train()
    mask = retouch.get_engine(whole.model).mask
    plain = {name: selection.flat() for name, selection in mask.items()}
    again = start(tmp_path, config=retouch.Mask.from_indices(plain, llama()))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))
    plain.popitem()
    other = start(tmp_path, config=retouch.Mask.from_indices(plain, llama()))
    with pytest.warns(UserWarning, match="another mask"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(other.model))


@pytest.mark.parametrize("checkpoint", ["full", "delta"])
def test_resuming_without_the_optimizer_keeps_mask_and_base(
    tmp_path: Path, checkpoint: str
) -> None:
    whole = start(tmp_path, save_only_model=True, checkpoint=checkpoint)
    whole.train()
    again = start(tmp_path, save_only_model=True, checkpoint=checkpoint)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    one, two = (retouch.get_engine(run.model).mask for run in (whole, again))
    assert one == two
    assert same(rebuilt(again.model), weights(again.model))


@pytest.mark.parametrize("checkpoint", ["full", "delta"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_model_at_the_end(tmp_path: Path, dtype: torch.dtype, checkpoint: str) -> None:
    """The greatest loss is called the best here, so that it is not that of the last step."""
    run = start(
        tmp_path,
        dtype,
        checkpoint=checkpoint,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=tokens(16, seed=3),
        metric_for_best_model="loss",
        greater_is_better=True,
        max_steps=6,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    if checkpoint == "full":
        expected = weights(AutoModelForCausalLM.from_pretrained(best, dtype=dtype))
    else:
        base = llama(dtype)
        retouch.Delta.load(best).apply_(base)
        expected = weights(base)
    assert same(weights(run.model), expected)
    assert same(rebuilt(run.model, dtype), expected)
    retouch.verify_untouched(run.model)
    engine = retouch.get_engine(run.model)
    for slot in engine.slots.values():  # the compact values follow
        value, weight = slot.value.detach(), slot.param.detach()
        assert torch.equal(value.to(weight.dtype), slot.selection.take(weight))
    run.train()  # and can be trained on
    assert same(rebuilt(run.model, dtype), weights(run.model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_model_is_a_plain_model(tmp_path: Path, dtype: torch.dtype) -> None:
    run = start(tmp_path, dtype)
    run.train()
    run.save_model(str(tmp_path / "final"))
    for folder in ("final", "checkpoint-4"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        assert same(weights(plain), weights(run.model))
        assert set(weights(plain)) == set(weights(llama()))
        record = json.loads((tmp_path / folder / "retouch_config.json").read_text())
        assert record["density"] == 0.05 and record["score"] == "gradient"
        saved = retouch.Mask.load(tmp_path / folder / "mask.safetensors")
        assert saved == retouch.get_engine(run.model).mask


def test_a_delta_checkpoint_is_small_and_complete(tmp_path: Path) -> None:
    words = tokenizer()
    run = trainer(tmp_path / "delta", **SAVING)
    run.processing_class = words
    retouch.attach(run, GRADIENT, checkpoint="delta").train()
    full = start(tmp_path / "full")
    full.train()
    folder = tmp_path / "delta" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert names >= {
        "config.json",
        "delta.safetensors",
        "optimizer.pt",
        "retouch_config.json",
        "tokenizer.json",
        "training_args.bin",
    }
    small = (folder / "delta.safetensors").stat().st_size
    large = (tmp_path / "full" / "checkpoint-4" / "model.safetensors").stat().st_size
    assert small < large / 2
    run.save_model(str(tmp_path / "mine"))
    base = llama()
    retouch.Delta.load(tmp_path / "mine").apply_(base)
    assert same(weights(base), weights(run.model))


def test_a_delta_checkpoint_refuses_another_base(tmp_path: Path) -> None:
    start(tmp_path, checkpoint="delta").train()
    other = retouch.attach(trainer(tmp_path, llama(seed=1), **SAVING), GRADIENT, checkpoint="delta")
    with pytest.raises(BaseMismatchError):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_there_is_no_delta_before_training(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="train"):
        start(tmp_path, checkpoint="delta").save_model(str(tmp_path / "final"))


def test_a_checkpoint_of_a_plain_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVING).train()
    with pytest.raises(EngineError, match="checkpoint-2"):
        start(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
