"""Optimizer steps of compact values, with two implementations and one result.

As in `retouch.ops`: contiguous float32 values and weights on the CPU go to the Rust kernels, which
also write the rounded result into the weight; everything else runs the same arithmetic in torch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from retouch import _core, ops
from retouch.errors import HyperparameterError, LayoutError
from retouch.ops import _native, _written
from retouch.optim import lowbit


def adamw_(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    target: Tensor | None,
    index: Tensor | None,
    name: str,
    *,
    step: int | Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    scale: float = 1.0,
    gate: Tensor | None = None,
    closed: str = "updated",
    decay_closed: bool = False,
) -> None:
    """One AdamW step of the compact `value`; `target.flatten()[index]` receives it, rounded once.

    The arithmetic is that of `torch.optim.AdamW` (single tensor), in its order.

    Args:
        value: float32 or float64, of any shape; stepped in place.
        grad: Of its shape.
        exp_avg: Of its shape and dtype; updated in place.
        exp_avg_sq: Of its shape and dtype; updated in place.
        target: The weight, or None.
        index: Positions in `target`, one for each value.
        name: Of the weight, for errors.
        step: The number of this step (from 1) for all coordinates; or an int32 tensor of `value`'s
            shape with the steps of each coordinate before this one. The latter is counted up in
            place, and each coordinate has the bias correction of its own age. Where all ages are
            equal the result is that of one number, bit for bit.
        lr: Learning rate.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squares.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        maximize: Ascend instead.
        scale: The step is multiplied by it, the decay is not.
        gate: bool, of `value`'s shape: True moves. None opens all.
        closed: What becomes of the moments and the clock of closed coordinates: "updated" as those of
            open ones, "frozen", or "reset" to nothing.
        decay_closed: Whether closed coordinates decay (if "updated").

    Raises:
        LayoutError: A clock or a gate that does not fit.
        HyperparameterError: A clock out of its range.
    """
    _check_clock(step, value, name)
    if gate is not None and (gate.dtype != torch.bool or gate.shape != value.shape):
        raise LayoutError(
            f"the gate of {name} is {gate.dtype} of shape {tuple(gate.shape)}; wanted bool of "
            f"shape {tuple(value.shape)}"
        )
    tensors = [value, grad, exp_avg, exp_avg_sq]
    wide = all(t.dtype == torch.float32 for t in tensors)
    clock = step if isinstance(step, Tensor) else None
    flat = all(t is None or (t.device.type == "cpu" and t.is_contiguous()) for t in (clock, gate))
    if wide and flat and _native(*tensors, *([] if target is None else [target])):
        _core.adamw_(
            value.detach(), grad.detach(), exp_avg, exp_avg_sq,
            None if target is None else target.detach(),
            None if index is None else index.cpu(), name,
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            maximize=maximize, scale=scale, gate=None if gate is None else gate.view(torch.uint8),
            closed=closed, decay_closed=decay_closed,
        )  # fmt: skip
        for written in (value, exp_avg, exp_avg_sq, clock, target):
            if written is not None:
                _written(written)
        return

    def step_(x: Tensor, g: Tensor, m: Tensor, v: Tensor, ages: int | Tensor) -> None:
        _adamw(
            x, g, m, v, name, ages, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, maximize=maximize, scale=scale,
        )  # fmt: skip

    with torch.no_grad():
        x, g = value.detach(), grad.to(value.dtype)
        if gate is None:
            step_(x, g, exp_avg, exp_avg_sq, step)
        elif closed == "updated":
            kept = x * (1 - lr * weight_decay) if decay_closed else x.clone()
            step_(x, g, exp_avg, exp_avg_sq, step)
            x.copy_(torch.where(gate, x, kept))
        else:
            state = [x, exp_avg, exp_avg_sq, *([] if clock is None else [clock])]
            parts = [t[gate] for t in state]
            ages = step if clock is None else parts[3]
            step_(parts[0], g[gate], parts[1], parts[2], ages)
            if closed == "reset":
                for t in state[1:]:
                    t.zero_()
            for t, new in zip(state, parts, strict=True):
                t[gate] = new
        if target is not None and index is not None:
            ops.scatter_(target, index, x, name)


def adamw_coded_(
    value: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    target: Tensor | None,
    index: Tensor | None,
    name: str,
    *,
    step: int | Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """`adamw_` with moments of 8 bits, which are widened, stepped and rounded once (`lowbit`).

    Args:
        value: As in `adamw_`, like all that is not named here.
        grad: See `adamw_`.
        state: With uint8 `exp_avg_codes` and `exp_avg_sq_codes` of `value`'s shape and float32
            `exp_avg_scale` and `exp_avg_sq_scale`; updated in place.
        target: See `adamw_`.
        index: See `adamw_`.
        name: See `adamw_`.
        step: See `adamw_`.
        lr: See `adamw_`.
        beta1: See `adamw_`.
        beta2: See `adamw_`.
        eps: See `adamw_`.
        weight_decay: See `adamw_`.
        maximize: See `adamw_`.

    Raises:
        LayoutError: A clock that does not fit.
        HyperparameterError: A clock out of its range.
    """
    _check_clock(step, value, name)
    options: dict[str, Any] = {
        "step": step, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps,
        "weight_decay": weight_decay, "maximize": maximize,
    }  # fmt: skip
    codes, scale = state["exp_avg_codes"], state["exp_avg_scale"]
    codes_sq, scale_sq = state["exp_avg_sq_codes"], state["exp_avg_sq_scale"]
    kept = (codes, scale, codes_sq, scale_sq)
    clock = step if isinstance(step, Tensor) else None
    flat = (
        t is None or (t.device.type == "cpu" and t.is_contiguous())
        for t in (clock, codes, codes_sq)
    )
    wide = [value, grad, scale, scale_sq]
    if (
        all(t.dtype == torch.float32 for t in wide)
        and all(flat)
        and _native(*wide, *([] if target is None else [target]))
    ):
        _core.adamw_coded_(
            value.detach(), grad.detach(), codes, scale, codes_sq, scale_sq,
            None if target is None else target.detach(),
            None if index is None else index.cpu(), name, **options,
        )  # fmt: skip
        for written in (value, *kept, clock, target):
            if written is not None:
                _written(written)
        return
    exp_avg = lowbit.dequantise(codes, scale, signed=True).to(value.dtype)
    exp_avg_sq = lowbit.dequantise(codes_sq, scale_sq, signed=False).to(value.dtype)
    adamw_(value, grad, exp_avg, exp_avg_sq, target, index, name, **options)
    new = (*lowbit.quantise(exp_avg, signed=True), *lowbit.quantise(exp_avg_sq, signed=False))
    for old, rounded in zip(kept, new, strict=True):
        old.copy_(rounded)


def _check_clock(step: int | Tensor, value: Tensor, name: str) -> None:
    if isinstance(step, Tensor) and (step.dtype != torch.int32 or step.shape != value.shape):
        raise LayoutError(
            f"the clock of {name} is {step.dtype} of shape {tuple(step.shape)}; wanted int32 of "
            f"shape {tuple(value.shape)}, the steps of each coordinate"
        )


def _adamw(
    x: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, name: str, step: int | Tensor,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, maximize: bool,
    scale: float,
) -> None:  # fmt: skip
    """The operations of `torch.optim.AdamW`, in its order."""
    ages = count_(step, name) if isinstance(step, Tensor) else step
    root, minus_step = corrections(ages, x.dtype, lr * scale, beta1, beta2)
    g = -g if maximize else g
    x.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / root).add_(eps)
    if isinstance(minus_step, Tensor):
        x.add_((minus_step * exp_avg).div_(denominator))
    else:
        x.addcdiv_(exp_avg, denominator, value=minus_step)


def count_(clock: Tensor, name: str) -> Tensor:
    """Counts the steps of each coordinate up by one.

    Raises:
        HyperparameterError: A count is negative, or cannot go on.
    """
    if clock.numel() and (int(clock.min()) < 0 or int(clock.max()) == torch.iinfo(clock.dtype).max):
        raise HyperparameterError(
            f"the clock of {name} must be from 0 to 2147483646 for each coordinate"
        )
    return clock.add_(1)


def corrections(
    ages: int | Tensor, dtype: torch.dtype, lr: float, beta1: float, beta2: float
) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """What AdamW divides √v by and multiplies m / (√v + eps) by at a step, or at that of each."""
    if not isinstance(ages, Tensor):
        return math.sqrt(1 - beta2**ages), -(lr / (1 - beta1**ages))
    found, which = ages.unique(return_inverse=True)
    pairs = [corrections(age, dtype, lr, beta1, beta2) for age in found.tolist()]
    if len(pairs) == 1:
        return pairs[0]
    table = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).to(ages.device, dtype)
    return table[which, 0], table[which, 1]


def lion_(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    target: Tensor | None,
    index: Tensor | None,
    name: str,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """One Lion step of the compact `value`; `target.flatten()[index]` receives it, rounded once."""
    tensors = [value, grad, exp_avg]
    wide = all(t.dtype == torch.float32 for t in tensors)
    if wide and _native(*tensors, *([] if target is None else [target])):
        _core.lion_(
            value.detach(), grad.detach(), exp_avg, None if target is None else target.detach(),
            None if index is None else index.cpu(), name,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, maximize=maximize,
        )  # fmt: skip
        for written in (value, exp_avg, target):
            if written is not None:
                _written(written)
        return
    with torch.no_grad():
        x, g = value.detach(), (-grad if maximize else grad).to(value.dtype)
        x.mul_(1 - lr * weight_decay)
        x.add_(exp_avg.mul(beta1).add_(g, alpha=1 - beta1).sign_(), alpha=-lr)
        exp_avg.mul_(beta2).add_(g, alpha=1 - beta2)
        if target is not None and index is not None:
            ops.scatter_(target, index, x, name)


def sgd_(
    value: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    target: Tensor | None,
    index: Tensor | None,
    name: str,
    *,
    first: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool = False,
) -> None:
    """One SGD step of the compact `value`; `target.flatten()[index]` receives it, rounded once.

    The arithmetic is that of `torch.optim.SGD` (single tensor), in its order. `first` says that the
    momentum buffer has no history: it becomes the gradient.
    """
    tensors = [value, grad, *([] if momentum_buffer is None else [momentum_buffer])]
    wide = all(t.dtype == torch.float32 for t in tensors)
    if wide and _native(*tensors, *([] if target is None else [target])):
        _core.sgd_(
            value.detach(), grad.detach(), momentum_buffer,
            None if target is None else target.detach(),
            None if index is None else index.cpu(), name,
            first=first, lr=lr, momentum=momentum, dampening=dampening,
            weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        )  # fmt: skip
        for written in (value, momentum_buffer, target):
            if written is not None:
                _written(written)
        return
    with torch.no_grad():
        x, g = value.detach(), (-grad if maximize else grad).to(value.dtype)
        if weight_decay != 0:
            g = g.add(x, alpha=weight_decay)
        if momentum_buffer is not None:
            if first:
                momentum_buffer.copy_(g)
            else:
                momentum_buffer.mul_(momentum).add_(g, alpha=1 - dampening)
            g = g.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
        x.add_(g, alpha=-lr)
        if target is not None and index is not None:
            ops.scatter_(target, index, x, name)
