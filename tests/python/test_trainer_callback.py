"""`SelectiveUpdates`, the metrics, and what `attach` refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import llama, same, tokens, trainer, weights
from transformers import TrainerCallback

import retouch
from retouch.errors import EngineError, HyperparameterError

METRICS = ("density", "selected", "update_norm", "lost_updates", "state_mib", "delta_mib")
CONFIG = retouch.SelectConfig(score="magnitude", density=0.05)


class Reporter(TrainerCallback):
    """Stands where a reporter stands: sees what `on_log` passes."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


class EarlyReporter(Reporter):
    """The same, in front of all user callbacks, as `report_to` puts it."""


def attached(out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights that `attach` trains: what every other form must give."""
    run = retouch.attach(trainer(out, **changes), CONFIG)
    run.train()
    return weights(run.model)


# --- the callback --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [CONFIG, CONFIG.to_dict(), "magnitude"])
def test_a_callback_is_attach(tmp_path: Path, form: Any) -> None:
    changes = {"density": 0.05} if form == "magnitude" else {}
    run = trainer(tmp_path, callbacks=[retouch.SelectiveUpdates(form, **changes)])
    run.train()
    assert same(weights(run.model), attached(tmp_path))
    retouch.verify_untouched(run.model)


def test_a_callback_added_later(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.add_callback(retouch.SelectiveUpdates(CONFIG))
    run.train()
    assert same(weights(run.model), attached(tmp_path))


def test_a_callback_added_later_cannot_resume(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, callbacks=[retouch.SelectiveUpdates(CONFIG)], **saving).train()
    run = trainer(tmp_path, **saving)
    run.add_callback(retouch.SelectiveUpdates(CONFIG))
    with pytest.raises(EngineError, match="callbacks="):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_restored_callback(tmp_path: Path) -> None:
    """The Trainer builds a new instance from the saved arguments; the run must not notice."""
    changes = {
        "restore_callback_states_from_checkpoint": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def start() -> Any:
        callbacks = [Reporter(), retouch.SelectiveUpdates(CONFIG)]
        return trainer(tmp_path, callbacks=callbacks, **changes)

    whole = start()
    whole.train()
    again = start()
    first = [c for c in again.callback_handler.callbacks if type(c) is retouch.SelectiveUpdates]
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    second = [c for c in again.callback_handler.callbacks if type(c) is retouch.SelectiveUpdates]
    assert len(second) == 1 and second[0] is not first[0]
    assert second[0].state() == first[0].state()
    assert same(weights(whole.model), weights(again.model))
    assert "retouch/update_norm" in again.state.log_history[-2]


def test_the_state_is_json(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[retouch.SelectiveUpdates(CONFIG, seed=3)])
    run.state.save_to_json(str(tmp_path / "state.json"))
    saved = type(run.state).load_from_json(str(tmp_path / "state.json"))
    again = retouch.SelectiveUpdates.from_state(saved.stateful_callbacks["SelectiveUpdates"])
    assert again.config == CONFIG and again.overrides == {"seed": 3}


def test_a_callback_without_a_trainer_says_what_to_do() -> None:
    callback = retouch.SelectiveUpdates(CONFIG)
    with pytest.raises(EngineError, match=r"retouch\.attach"):
        callback.on_init_end(None, None, None)
    with pytest.raises(EngineError, match=r"retouch\.attach"):
        callback.on_train_begin(None, None, None, model=llama())


def test_a_callback_takes_json_only() -> None:
    with pytest.raises(HyperparameterError, match=r"retouch\.attach"):
        retouch.SelectiveUpdates(retouch.Mask.full(llama()))


# --- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_reach_the_history_and_every_reporter(tmp_path: Path, dtype: torch.dtype) -> None:
    late = Reporter()
    run = trainer(tmp_path, llama(dtype), callbacks=[late])
    early = EarlyReporter()
    run.callback_handler.callbacks.insert(1, early)
    retouch.attach(run, CONFIG)
    run.train()
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(history) == 4
    for seen in (history, late.seen[:4], early.seen[:4]):
        for entry in seen:
            assert all(isinstance(entry[f"retouch/{name}"], float) for name in METRICS)
    mask = retouch.get_engine(run.model).mask
    last = history[-1]
    assert last["retouch/selected"] == mask.count
    assert last["retouch/density"] == pytest.approx(mask.density)
    assert last["retouch/update_norm"] > 0
    assert last["retouch/state_mib"] * 2**20 == pytest.approx(8 * mask.count, rel=0.05)
    assert 0 < last["retouch/delta_mib"] * 2**20 < 16 * mask.count


def test_the_update_norm_is_the_distance_moved(tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    run = retouch.attach(trainer(tmp_path, model, max_steps=1), CONFIG)
    run.train()
    distance = sum(
        float((before[n] - w).double().square().sum()) for n, w in weights(model).items()
    )
    assert run.state.log_history[0]["retouch/update_norm"] == pytest.approx(distance**0.5, rel=1e-5)
    assert run.state.log_history[0]["retouch/lost_updates"] == 0.0


def test_lost_updates_counts_what_bfloat16_rounds_away(tmp_path: Path) -> None:
    """Steps of 1e-5 are far below the spacing of the largest bfloat16 weights."""
    model = llama(torch.bfloat16)
    before = weights(model)
    run = retouch.attach(trainer(tmp_path, model, max_steps=1, learning_rate=1e-5), CONFIG)
    run.train()
    entry = run.state.log_history[0]
    mask = retouch.get_engine(model).mask
    changed = sum(int((before[n] != w).sum()) for n, w in weights(model).items())
    assert changed < mask.count / 2
    assert entry["retouch/update_norm"] > 0
    assert entry["retouch/lost_updates"] == pytest.approx(1 - changed / mask.count, abs=0.02)


def test_steps_that_are_not_logged_are_not_measured(tmp_path: Path) -> None:
    run = retouch.attach(trainer(tmp_path, logging_steps=3), CONFIG)
    run.train()
    history = [e for e in run.state.log_history if "loss" in e]
    assert [e["step"] for e in history] == [3]
    assert history[0]["retouch/update_norm"] > 0


def test_evaluation_logs_are_left_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2, eval_dataset=tokens(8, seed=3))
    retouch.attach(run, CONFIG).train()
    evaluations = [e for e in run.state.log_history if "eval_loss" in e]
    assert len(evaluations) == 2
    assert not any(key.startswith("retouch/") for e in evaluations for key in e)


# --- what is refused -----------------------------------------------------------------------------


def test_attaching_twice(tmp_path: Path) -> None:
    run = retouch.attach(trainer(tmp_path), CONFIG)
    with pytest.raises(EngineError, match="already"):
        retouch.attach(run, CONFIG)


def test_wrong_arguments(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with pytest.raises(HyperparameterError, match="checkpoint"):
        retouch.attach(run, CONFIG, checkpoint="sparse")  # type: ignore[arg-type]
    with pytest.raises(HyperparameterError, match="Trainer"):
        retouch.attach(llama(), CONFIG)  # type: ignore[arg-type]
    with pytest.raises(HyperparameterError, match="optimizer"):
        retouch.attach(run, CONFIG, optimizer="adamw")  # type: ignore[arg-type]
    with pytest.raises(HyperparameterError, match="densitty"):
        retouch.attach(run, CONFIG, densitty=0.1)
    with pytest.raises(HyperparameterError, match="no_such_recipe"):
        retouch.attach(run, "no_such_recipe")
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    own = trainer(tmp_path, run.model, optimizers=(optimizer, None))
    with pytest.raises(HyperparameterError, match="optimizers="):
        retouch.attach(own, CONFIG, optimizer=retouch.AdamW)
    assert type(run) is type(own)  # a refused trainer is left as it was
    run.train()


@pytest.mark.parametrize(
    ("sign", "value", "why"),
    [("is_fsdp_enabled", True, "FSDP"), ("is_deepspeed_enabled", True, "DeepSpeed")],
)
def test_sharded_training_is_refused_before_anything_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str, value: bool, why: str
) -> None:
    run = retouch.attach(trainer(tmp_path), CONFIG)
    monkeypatch.setattr(run, sign, value)
    with pytest.raises(EngineError, match=why):
        run.create_optimizer()


@pytest.mark.parametrize("gradient", ["sampled", "dense"])
def test_a_callback_passes_on_how_gradients_are_taken(tmp_path: Path, gradient: Any) -> None:
    callback = retouch.SelectiveUpdates("random", density=0.01, gradient=gradient)
    again = retouch.SelectiveUpdates(**callback.state()["args"])
    run = trainer(tmp_path, callbacks=[again], max_steps=1)
    run.train()
    paths = retouch.get_engine(run.model).paths.values()
    assert {path.gradient for path in paths} == {gradient}
    with pytest.raises(HyperparameterError, match="gradient='sparse'"):
        retouch.SelectiveUpdates("random", density=0.01, gradient="sparse")  # type: ignore[arg-type]
    with pytest.raises(HyperparameterError, match="gradient='sparse'"):
        retouch.attach(trainer(tmp_path), CONFIG, gradient="sparse")  # type: ignore[arg-type]


def test_transformers_is_imported_only_when_it_is_used_and_missed_clearly() -> None:
    script = (
        "import retouch, sys\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"  # as if it were not installed
        "try: retouch.attach\n"
        "except ImportError as e: assert 'retouch[hf]' in str(e), e\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
