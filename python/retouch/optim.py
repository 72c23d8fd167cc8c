"""Optimizers whose step is one pass of a Rust kernel.

They step compact values like any torch optimizer, and where the selection is by elements the same
pass writes the rounded result into the weight. Arithmetic, defaults and state keys are those of
`torch.optim`, so state dicts are interchangeable with torch's.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from retouch import ops
from retouch.errors import HyperparameterError, LayoutError
from retouch.slots import Slot, slot_of


class _Fused(Optimizer):
    """The loop over parameters; a subclass says how one of them steps."""

    # Options that torch's state dicts may bring along, and the values that mean "off".
    _off: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("amsgrad", (False, None)),
        ("capturable", (False, None)),
        ("differentiable", (False, None)),
    )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: Re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for i, group in enumerate(self.param_groups):
                self._check(group)
                for j, param in enumerate(group["params"]):
                    if param.grad is None:
                        continue
                    slot = slot_of(param)
                    name = slot.name if slot is not None else f"parameter {j} of group {i}"
                    _check_tensors(name, param, param.grad)
                    fused = slot is not None and slot.selection.kind == "elements"
                    self._update(name, param, param.grad, group, slot if fused else None)
                    if slot is not None and fused:
                        slot.wrote()
        return loss

    def _check(self, group: dict[str, Any]) -> None:
        for key, off in self._off:
            if group.get(key) not in off:
                raise HyperparameterError(
                    f"{type(self).__name__} has no {key}={group[key]!r}; wrap the class of "
                    "torch.optim instead"
                )

    def _update(
        self, name: str, param: Tensor, grad: Tensor, group: dict[str, Any], slot: Slot | None
    ) -> None:
        raise AssertionError("a subclass says how to step")


class AdamW(_Fused):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one Rust pass over the selected.

    `state[p]["step"]` is the count of steps as torch keeps it, a float32 scalar; or an int32 tensor
    of `p`'s shape, a clock for each coordinate, for those that joined at different times. One that
    starts late with empty moments then takes steps of its own age; under the shared clock its first
    steps would be up to 6.6 times as long. `load_state_dict` leaves either kind as it is.

    Args:
        params: As in `torch.optim.AdamW`; float32 (or float64) tensors. Pass the class to
            `retouch.wrap` to train 16-bit weights through float32 values.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled: weights are multiplied by `1 - lr * weight_decay`.
        maximize: Ascend instead.

    Raises:
        HyperparameterError: An option out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        _at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise HyperparameterError(f"betas must be two numbers in [0, 1), got {betas}")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize
        }  # fmt: skip
        super().__init__(params, defaults)

    def _update(
        self, name: str, param: Tensor, grad: Tensor, group: dict[str, Any], slot: Slot | None
    ) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        clock = _tick(state, name, param)
        beta1, beta2 = group["betas"]
        ops.adamw_(
            param, grad, state["exp_avg"], state["exp_avg_sq"],
            slot.param if slot else None, slot.selection.index if slot else None, name,
            step=clock, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2),
            eps=group["eps"], weight_decay=group["weight_decay"], maximize=group["maximize"],
        )  # fmt: skip


class SGD(_Fused):
    """SGD with momentum, Nesterov's form and L2 decay as in `torch.optim.SGD`, in one Rust pass.

    Args:
        params: As in `torch.optim.SGD`; float32 (or float64) tensors.
        lr: Learning rate, a number or a one-element tensor.
        momentum: Of the moving sum of gradients.
        dampening: Of the gradient's share in it.
        weight_decay: L2: the gradient gets `weight_decay * weight` added.
        nesterov: Look ahead; needs momentum and no dampening.
        maximize: Ascend instead.

    Raises:
        HyperparameterError: An option out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        _at_least_zero(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise HyperparameterError("nesterov needs momentum > 0 and dampening = 0")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _update(
        self, name: str, param: Tensor, grad: Tensor, group: dict[str, Any], slot: Slot | None
    ) -> None:
        buffer, first = None, False
        if group["momentum"] != 0:
            state = self.state[param]
            first = state.get("momentum_buffer") is None
            if first:
                state["momentum_buffer"] = torch.empty_like(
                    param, memory_format=torch.contiguous_format
                )
            buffer = state["momentum_buffer"]
        ops.sgd_(
            param, grad, buffer,
            slot.param if slot else None, slot.selection.index if slot else None, name,
            first=first, lr=float(group["lr"]), momentum=group["momentum"],
            dampening=group["dampening"], weight_decay=group["weight_decay"],
            nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip


def _tick(state: dict[str, Any], name: str, param: Tensor) -> int | Tensor:
    """The number of this step, or the steps of each coordinate before it, which `ops` counts up."""
    clock = state["step"]
    if isinstance(clock, Tensor) and clock.dtype == torch.int32:
        if clock.shape != param.shape:
            raise LayoutError(
                f"the clock of {name} has shape {tuple(clock.shape)}, its value "
                f"{tuple(param.shape)}"
            )
        state["step"] = clock = clock.to(param.device)
        return clock
    state["step"] += 1
    return int(state["step"])


def _at_least_zero(**options: float | Tensor) -> None:
    for name, value in options.items():
        if not float(value) >= 0:
            raise HyperparameterError(f"{name} must be at least 0, got {value}")


def _check_tensors(name: str, param: Tensor, grad: Tensor) -> None:
    if param.dtype not in (torch.float32, torch.float64):
        raise LayoutError(
            f"{name} is {param.dtype}; this optimizer steps float32 and float64. Pass its class to "
            "retouch.wrap: 16-bit weights then train through float32 values"
        )
    if grad.layout != torch.strided:
        raise LayoutError(f"the gradient of {name} has layout {grad.layout}; wanted a dense one")
