"""Backward passes over data that leave no trace in a model."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from retouch.eligible import PLACE, Candidate, own_parameters
from retouch.errors import EngineError, ScoreError

__all__ = ["Eligible", "LossFn", "gradients", "kept", "loss_of", "outputs_of", "undisturbed"]

Eligible: TypeAlias = Mapping[str, Candidate]
LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]


@contextlib.contextmanager
def undisturbed(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Puts the random states of Python, numpy and torch back on exit.

    Args:
        model: Its devices are meant.
        seed: Set on entry, if given, so that what happens inside depends on nothing else.
    """
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.default_generator.manual_seed(seed)
                for gpu in gpus:
                    torch.cuda.default_generators[gpu].manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def gradients(
    model: nn.Module, eligible: Eligible, take: Callable[[str, Tensor], None], training: bool
) -> Iterator[None]:
    """Hands each gradient of the eligible parameters to `take` and frees it; the model is left as it was."""
    if not getattr(model._modules.get(PLACE), "paused", True):
        raise EngineError(
            f"{type(model).__name__} is wrapped, so its gradients go to the optimizer's values: "
            "select before retouch.wrap, or after retouch.unwrap"
        )

    def hand_over(name: str, param: Tensor) -> None:
        gradient, param.grad = param.grad, None
        if gradient is not None:
            with torch.no_grad():
                take(name, gradient.to_dense() if gradient.is_sparse else gradient)

    handles = []
    with kept(model), undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        try:
            for _, param in own_parameters(model):
                param.requires_grad_(False)
            for name, candidate in eligible.items():
                candidate.param.requires_grad_(True)
                hook = functools.partial(hand_over, name)
                handles.append(candidate.param.register_post_accumulate_grad_hook(hook))
            model.train(training)
            torch.clear_autocast_cache()
            yield
        finally:
            for handle in handles:
                handle.remove()
            torch.clear_autocast_cache()


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Puts gradients, `requires_grad`, modes and buffers of a model back on exit."""
    params = [(p, p.requires_grad, p.grad) for _, p in own_parameters(model)]
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    copies = [
        (b, b.detach().clone()) for _, held in buffers for b in held.values() if b is not None
    ]
    for param, _, _ in params:
        param.grad = None
    try:
        yield
    finally:
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, copy in copies:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
        for module, training in modes:
            module.training = training
        for param, requires_grad, grad in params:
            param.requires_grad_(requires_grad)
            param.grad = grad


def outputs_of(model: nn.Module, batch: Any) -> Any:
    """What a model makes of a batch."""
    if hasattr(batch, "items"):
        return model(**batch)
    return model(batch) if isinstance(batch, Tensor) else model(*batch)


def loss_of(
    model: nn.Module, batch: Any, loss_fn: LossFn | None, number: int, *, slope: bool = True
) -> Tensor:
    """The loss of a batch, checked; with `slope` also that it has a gradient."""
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    else:
        loss = outputs_of(model, batch)
        if not isinstance(loss, Tensor):
            loss = loss.get("loss") if isinstance(loss, Mapping) else getattr(loss, "loss", None)
    where = "loss_fn(model, batch)" if loss_fn is not None else f"{type(model).__name__}(batch)"
    if not isinstance(loss, Tensor):
        raise ScoreError(
            f"{where} gives no loss: put labels into the batches, or pass loss_fn=, "
            "a function (model, batch) -> loss"
        )
    if loss.numel() != 1:
        raise ScoreError(
            f"{where} gives a tensor of shape {tuple(loss.shape)}; wanted a loss, which is one "
            "number (pass loss_fn=, or reduce it)"
        )
    if not bool(torch.isfinite(loss)):
        raise ScoreError(
            f"the loss of batch {number} is {float(loss.detach())}; wanted a finite number"
        )
    if slope and not loss.requires_grad:
        raise ScoreError(
            f"the loss of batch {number} does not depend on any eligible parameter (was it computed "
            "under no_grad, or detached?)"
        )
    return loss
