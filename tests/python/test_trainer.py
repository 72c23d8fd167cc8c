"""The real Trainer, the real AdamW: what is selected moves, what is not keeps its bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import llama, same, tokens, trainer, weights
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import default_data_collator

import retouch

MAGNITUDE = retouch.SelectConfig(score="magnitude", density=0.05)
DTYPES = [torch.float32, torch.bfloat16]


def moved(before: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Flat positions whose bits changed, for the tensors that have any."""
    after = weights(model)
    assert before.keys() == after.keys()
    width = {2: torch.int16, 4: torch.int32}
    changed = {
        name: torch.nonzero(
            (before[name].view(width[a.itemsize]) != a.view(width[a.itemsize])).flatten()
        ).flatten()
        for name, a in after.items()
    }
    return {name: index for name, index in changed.items() if len(index)}


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def delta_of(model: torch.nn.Module, base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The base with the model's delta applied."""
    retouch.Delta.from_model(model).apply_(base)
    return weights(base)


# --- what moves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad"])
def test_only_the_selected_weights_move(tmp_path: Path, dtype: torch.dtype, optim: str) -> None:
    model = llama(dtype)
    before = weights(model)
    mask = retouch.select(model, MAGNITUDE)
    run = retouch.attach(trainer(tmp_path, model, optim=optim, learning_rate=0.05), MAGNITUDE)
    run.train()
    changed = moved(before, model)
    assert sum(map(len, changed.values())) > 0.5 * mask.count
    for name, index in changed.items():
        assert torch.isin(index, mask[name].flat()).all(), name
    retouch.verify_untouched(model)
    assert same(delta_of(model, llama(dtype)), weights(model))


@pytest.mark.parametrize("form", [retouch.AdamW, (retouch.SGD, {"momentum": 0.9})])
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_fused_optimizers(tmp_path: Path, form: Any, dtype: torch.dtype) -> None:
    model = llama(dtype)
    before = weights(model)
    run = retouch.attach(
        trainer(tmp_path, model, adam_beta2=0.9, learning_rate=0.05), MAGNITUDE, optimizer=form
    )
    run.train()
    inner = run.optimizer.optimizer
    assert isinstance(inner, form if isinstance(form, type) else form[0])
    if form is retouch.AdamW:
        assert all(group["betas"] == (0.9, 0.9) for group in inner.param_groups)
    else:
        assert all(group["momentum"] == 0.9 for group in inner.param_groups)
    assert moved(before, model)
    retouch.verify_untouched(model)


def test_our_adamw_follows_torch(tmp_path: Path) -> None:
    ours, theirs = llama(), llama()
    retouch.attach(trainer(tmp_path, ours), MAGNITUDE, optimizer=retouch.AdamW).train()
    retouch.attach(trainer(tmp_path, theirs, optim="adamw_torch"), MAGNITUDE).train()
    for name, weight in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], weight, rtol=1e-5, atol=1e-6)


def test_decay_groups_are_those_of_the_trainer(tmp_path: Path) -> None:
    model = llama()
    everything = retouch.Mask.full(model)
    run = retouch.attach(trainer(tmp_path, model), everything)
    run.train()
    engine = retouch.get_engine(model)
    decay, rest = run.optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    in_rest = {id(p) for p in rest["params"]}
    for name, slot in engine.slots.items():
        assert (id(slot.value) in in_rest) == ("norm" in name), name


def test_a_full_mask_is_the_plain_trainer(tmp_path: Path) -> None:
    plain, full = llama(), llama()
    trainer(tmp_path, plain, optim="adamw_torch").train()
    run = trainer(tmp_path, full, optim="adamw_torch")
    retouch.attach(run, retouch.Mask.full(full)).train()
    assert same(weights(plain), weights(full))


def test_a_users_optimizer_is_wrapped_in_place(tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    run = trainer(tmp_path, model, optimizers=(optimizer, schedule), learning_rate=123.0)
    retouch.attach(run, MAGNITUDE).train()
    assert run.optimizer.optimizer is optimizer
    assert [h["learning_rate"] for h in run.state.log_history if "loss" in h] == pytest.approx(
        [0.02, 0.01, 0.02 / 3, 0.005]
    )
    assert moved(before, model)
    retouch.verify_untouched(model)


def test_training_again_goes_on(tmp_path: Path) -> None:
    model = llama()
    run = retouch.attach(trainer(tmp_path, model), MAGNITUDE)
    run.train()
    engine, first = retouch.get_engine(model), weights(model)
    run.train()
    assert retouch.get_engine(model) is engine
    assert not same(first, weights(model))
    assert same(delta_of(model, llama()), weights(model))


def test_a_new_model_of_model_init_is_selected_anew(tmp_path: Path) -> None:
    run = retouch.attach(trainer(tmp_path, model_init=lambda: llama()), MAGNITUDE)
    run.train()
    first = run.model
    run.train()
    assert run.model is not first
    assert same(weights(first), weights(run.model))
    assert retouch.get_engine(run.model) is not retouch.get_engine(first)


# --- gradients -----------------------------------------------------------------------------------


def reference(
    model: torch.nn.Module, mask: retouch.Mask, batches: list[Any], max_norm: float, micro: int = 1
) -> list[float]:
    """Mask first, then clip, then AdamW on the selected values; returns the unclipped norms."""
    named = dict(model.named_parameters())
    index = {name: selection.flat().long() for name, selection in mask.items()}
    values = {n: torch.nn.Parameter(named[n].detach().flatten()[i]) for n, i in index.items()}
    decay = [v for n, v in values.items() if "norm" not in n]
    rest = [v for n, v in values.items() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    norms = []
    for start in range(0, len(batches), micro):
        step = batches[start : start + micro]
        items = sum(b["labels"][:, 1:].numel() for b in step)
        for batch in step:
            model(**batch, num_items_in_batch=torch.tensor(items)).loss.backward()
        for name, i in index.items():
            values[name].grad = named[name].grad.flatten()[i]
        norms.append(float(torch.nn.utils.clip_grad_norm_(values.values(), max_norm)))
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for name, i in index.items():
                named[name].view(-1)[i] = values[name]
    return norms


class Batches(list):  # type: ignore[type-arg]
    """A collator that keeps what it made."""

    def __call__(self, samples: Any) -> Any:
        self.append(default_data_collator(samples))
        return dict(self[-1])


@pytest.mark.parametrize("max_norm", [0.05, 1000.0])
@pytest.mark.parametrize("micro", [1, 2])
def test_the_norm_and_the_clip_are_of_the_selected_gradient(
    tmp_path: Path, max_norm: float, micro: int
) -> None:
    model, expected = llama(), llama()
    batches = Batches()
    run = trainer(
        tmp_path,
        model,
        optim="adamw_torch",
        max_grad_norm=max_norm,
        gradient_accumulation_steps=micro,
        lr_scheduler_type="constant",
        data_collator=batches,
    )
    retouch.attach(run, MAGNITUDE).train()
    norms = reference(
        expected, retouch.select(expected, MAGNITUDE), batches[: 4 * micro], max_norm, micro
    )
    logged = [h["grad_norm"] for h in run.state.log_history if "grad_norm" in h]
    assert logged == pytest.approx(norms, rel=1e-4)
    assert (norms[0] > max_norm) == (max_norm < 1)  # the small bound really clips
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(model)[name], weight, rtol=1e-5, atol=1e-6)


def test_small_and_large_micro_batches_agree(tmp_path: Path) -> None:
    models = [llama(), llama()]
    for model, size, count in zip(models, (8, 2), (1, 4), strict=True):
        run = trainer(
            tmp_path,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
        )
        retouch.attach(run, MAGNITUDE).train()
    one, four = map(weights, models)
    for name, weight in one.items():
        torch.testing.assert_close(four[name], weight, rtol=1e-4, atol=2e-5)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, checkpointed = llama(), llama()
    retouch.attach(trainer(tmp_path, plain), MAGNITUDE).train()
    run = trainer(tmp_path, checkpointed, activation_checkpointing=True)
    retouch.attach(run, MAGNITUDE).train()
    assert same(weights(plain), weights(checkpointed))


def test_reentrant_checkpoints_with_a_frozen_embedding(tmp_path: Path) -> None:
    plain, checkpointed = llama(), llama()
    for model, options in ((plain, {}), (checkpointed, {"use_reentrant": True})):
        name = "model.layers.0.self_attn.q_proj.weight"
        mask = retouch.Mask.from_indices({name: torch.arange(0, 900, 3)}, model)
        run = trainer(
            tmp_path,
            model,
            activation_checkpointing=bool(options),
            activation_checkpointing_kwargs=options or None,
        )
        retouch.attach(run, mask).train()
    assert moved(weights(llama()), plain).keys() == {name}
    assert same(weights(plain), weights(checkpointed))


def test_autocast_trains_float32_weights(tmp_path: Path) -> None:
    model, plain = llama(), llama()
    run = retouch.attach(trainer(tmp_path, model, bf16=True), MAGNITUDE)
    run.train()
    exact = retouch.attach(trainer(tmp_path, plain), MAGNITUDE)
    exact.train()
    assert losses(run) != losses(exact)  # bfloat16 arithmetic was used
    assert losses(run) == pytest.approx(losses(exact), rel=0.02)
    assert all(w.dtype == torch.float32 for w in weights(model).values())
    retouch.verify_untouched(model)


def test_the_loss_falls(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=40, logging_steps=5, learning_rate=0.05)
    retouch.attach(run, "magnitude", density=0.5, target_modules=None).train()
    assert losses(run)[-1] < losses(run)[0] - 0.5


# --- selecting from the run's own data -----------------------------------------------------------


class Stream(IterableDataset):  # type: ignore[type-arg]
    """A dataset without a length."""

    def __iter__(self) -> Any:
        return iter(tokens(32))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("score", ["gradient", "fisher", "sensitivity"])
def test_selecting_from_the_data_leaves_the_run_alone(
    tmp_path: Path, score: str, stream: bool
) -> None:
    """The same mask, computed by the run or handed to it: every bit of the training is the same."""
    noisy = {"attention_dropout": 0.1}  # draws random numbers in every forward
    computed, given = llama(**noisy), llama(**noisy)
    config = retouch.SelectConfig(score=score, density=0.05)
    data = {"train_dataset": Stream() if stream else tokens(64)}
    first = retouch.attach(trainer(tmp_path, computed, **data), config)
    first.train()
    mask = retouch.get_engine(computed).mask
    second = retouch.attach(
        trainer(tmp_path, given, **data),
        retouch.Mask.from_indices({n: s.flat() for n, s in mask.items()}, given),
    )
    second.train()
    assert losses(first) == losses(second)
    assert same(weights(computed), weights(given))
    retouch.verify_untouched(computed)


def test_data_of_ones_own(tmp_path: Path) -> None:
    """`data=` is what is scored: with the same batches, `select` alone finds the same mask."""
    model, alone = llama(), llama()
    config = retouch.SelectConfig(score="gradient", density=0.05)
    batches = [default_data_collator(tokens(4, seed=s)) for s in (5, 6)]
    retouch.attach(trainer(tmp_path, model), config, data=batches).train()
    assert retouch.get_engine(model).mask == retouch.select(alone, config, data=batches)
