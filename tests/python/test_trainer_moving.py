"""Schedules in the real Trainer: they move, they resume bit for bit, deltas are of the whole run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import llama, same, trainer, weights

import retouch
from retouch import Schedule, SelectConfig
from retouch.engine import get_engine, verify_untouched
from retouch.errors import EngineError
from retouch.scores import Fisher, HardExamples, SoftRank, robust_gradient

CONFIGS = {
    "layers": SelectConfig(
        direction="random", granularity="layer", k=1, embeddings="full",
        schedule=Schedule(every=1, state="reset"),
    ),
    "collected": SelectConfig(
        score="gradient", density=0.02, schedule=Schedule(every=2, collect=1)
    ),
    "now": SelectConfig(
        score="gradient", density=0.02,
        schedule=Schedule(every=1, collect=1, now=True, change="grow", ramp="linear", rounds=3),
    ),
    "data": SelectConfig(score="fisher", density=0.02, schedule=Schedule(every=2)),
    "epochs": SelectConfig(
        direction="random", density=0.02, schedule=Schedule(every=1, unit="epoch")
    ),
    "hard": SelectConfig(
        score=HardExamples(Fisher(), samples=5), density=0.02, schedule=Schedule(every=2)
    ),
    "drawn": SelectConfig(
        score=SoftRank(Fisher(level="batch"), alpha=0.9, beta=10.0), direction="bernoulli",
        max_batches=2, schedule=Schedule(every=2),
    ),
    "attacked": SelectConfig(
        score=robust_gradient(0.1, steps=1), density=0.02, max_batches=1,
        schedule=Schedule(every=1),
    ),
}  # fmt: skip
configs = pytest.mark.parametrize("name", CONFIGS)


def start(out: Path, name: str, **changes: Any) -> Any:
    settings = {"save_strategy": "steps", "save_steps": 2} | changes
    checkpoint = settings.pop("checkpoint", "full")
    run = trainer(out, llama(torch.float32, attention_dropout=0.1), **settings)
    return retouch.attach(run, CONFIGS[name], checkpoint=checkpoint)


@configs
@pytest.mark.parametrize("checkpoint", ["full", "delta"])
def test_resuming_is_exact(tmp_path: Path, name: str, checkpoint: str) -> None:
    whole = start(tmp_path / "a", name, checkpoint=checkpoint)
    whole.train()
    again = start(tmp_path / "a", name, checkpoint=checkpoint)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))
    assert get_engine(whole.model).mask == get_engine(again.model).mask
    verify_untouched(again.model)
    base = llama(torch.float32)
    retouch.Delta.from_model(again.model).apply_(base)
    assert same(weights(base), weights(whole.model))


def test_the_masks_move(tmp_path: Path) -> None:
    run = start(tmp_path, "layers")
    seen = []
    callback = type("Seen", (retouch.integrations.transformers.TrainerCallback,), {})()
    callback.on_step_begin = lambda *a, model, **k: seen.append(  # type: ignore[attr-defined]
        sorted(n for n in get_engine(model).mask if "layers" in n)
    )
    run.add_callback(callback)
    run.train()
    assert len({str(names) for names in seen}) > 1
    logged = [entry for entry in run.state.log_history if "retouch/changes" in entry]
    assert logged and logged[-1]["retouch/changes"] > 1


def test_training_stops_when_all_is_frozen(tmp_path: Path) -> None:
    freeze = SelectConfig(
        score="magnitude", granularity="tensor", density=1.0,
        schedule=Schedule(every=1, start=2, change="freeze", threshold=1e9),
    )  # fmt: skip
    run = retouch.attach(trainer(tmp_path, llama(torch.float32)), freeze)
    run.train()
    assert run.state.global_step == 2


def test_a_moving_run_needs_its_optimizer_state(tmp_path: Path) -> None:
    start(tmp_path, "layers", save_only_model=True).train()
    run = start(tmp_path, "layers")
    with pytest.raises(EngineError, match="optimizer state"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
