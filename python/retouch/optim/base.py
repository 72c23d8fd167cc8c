"""What the optimizers of this package share: the loop, effective rates, where values go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from retouch.errors import HyperparameterError, LayoutError
from retouch.optim import rounding
from retouch.optim.rounding import NARROW, Rounding
from retouch.selection import Selection
from retouch.slots import Slot, slot_of

Decay = Literal["weight", "base"]
_AS_SAVED = (rounding.COMPENSATION,)


@dataclass
class At:
    """Where one parameter of a group stands, and the rates that hold for it.

    Attributes:
        name: Of the weight, or what else tells which tensor this is.
        slot: Of a compact value; None for an ordinary tensor.
        lr: `group["lr"] * group["lr_mult"]`.
        weight_decay: `group["weight_decay"] * group["wd_mult"]`.
        narrow: Whether the value that is stepped is a float32 copy, to be rounded afterwards.
    """

    name: str
    slot: Slot | None
    lr: float
    weight_decay: float
    narrow: bool = False

    @property
    def elements(self) -> bool:
        """Whether this is a compact value of single coordinates."""
        return self.slot is not None and self.slot.selection.kind == "elements"

    @property
    def target(self) -> Tensor | None:
        """The weight that the step is to write; None where the engine does that."""
        return self.slot.param if self.slot is not None and self._writes else None

    @property
    def index(self) -> Tensor | None:
        """Positions in `target`."""
        return self.slot.selection.index if self.slot is not None and self._writes else None

    @property
    def _writes(self) -> bool:
        return self.elements and not self.narrow

    def base(self, value: Tensor) -> Tensor:
        """What the weight held when the mask was set, as the value has it.

        Raises:
            HyperparameterError: This is no compact value of a wrapped model.
        """
        if self.slot is None:
            raise HyperparameterError(
                f"{self.name} has no base to go to: decay='base' and pull= need retouch.wrap"
            )
        return self.slot.base.to(value.dtype)

    def pull_(self, value: Tensor, group: dict[str, Any], where: Tensor | None = None) -> float:
        """Decoupled decay towards the base, if the group asks for it, of the coordinates `where`.

        Returns:
            The weight decay that is left for the step itself.
        """
        if group["decay"] != "base" or self.weight_decay == 0:
            return self.weight_decay
        base = self.base(value)
        if where is None:
            value.lerp_(base, self.lr * self.weight_decay)
        else:
            pulled = value.lerp(base, self.lr * self.weight_decay)
            value.copy_(torch.where(where, pulled, value))
        return 0.0


class Fused(Optimizer):
    """The loop over parameters; a subclass says how one of them steps.

    Every group has `lr_mult` and `wd_mult` (1 by default), which multiply its `lr` and
    `weight_decay` inside of the step: schedulers write `lr` and leave them alone.
    """

    # Options that torch's state dicts may bring along, and the values that mean "off".
    _off: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("amsgrad", (False, None)),
        ("capturable", (False, None)),
        ("differentiable", (False, None)),
    )
    _scatters = True  # whether `_update` writes the weight of a selection of elements

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], decay: Decay = "weight",
        rounding: Rounding = "master", rounding_seed: int = 0, *, pull: float = 0.0,
    ) -> None:  # fmt: skip
        shared = {
            "decay": decay, "pull": pull, "lr_mult": 1.0, "wd_mult": 1.0, "rounding": rounding,
            "rounding_seed": rounding_seed, "rounding_step": 0,
        }  # fmt: skip
        super().__init__(params, {**defaults, **shared})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; checks what this package adds to it."""
        super().add_param_group(param_group)
        self._check(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # those of a state dict of torch's class lack some
            for key, value in self.defaults.items():
                group.setdefault(key, value)

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
            self._begin()
            for i, group in enumerate(self.param_groups):
                self._check(group)
                group["rounding_step"] += group["rounding"] == "stochastic"
                lr = float(group["lr"]) * group["lr_mult"]
                weight_decay = group["weight_decay"] * group["wd_mult"]
                for j, param in enumerate(group["params"]):
                    if param.grad is None:
                        continue
                    slot = slot_of(param)
                    name = slot.name if slot is not None else f"parameter {j} of group {i}"
                    rounding.check(group["rounding"], name, param.dtype)
                    _check_layout(name, param.grad)
                    at = At(name, slot, lr, weight_decay, param.dtype in NARROW)
                    if at.narrow:
                        self._update_narrow(at, param, param.grad, group)
                        continue
                    self._update(at, param, param.grad, group)
                    if group["pull"]:  # the engine then writes the weight, once more
                        param.lerp_(at.base(param), group["pull"])
                    elif slot is not None and self._scatters:
                        if not at.elements:
                            slot.write()  # now, while the value is in the cache
                        slot.wrote()
        return loss

    def _begin(self) -> None:
        """Called at the start of every step, before any parameter moves."""

    def unpack_state(
        self, value: Tensor, selection: Selection, state: dict[str, Any]
    ) -> dict[str, Any]:
        """The state of a value with every tensor (but the clock) of the value's shape.

        In this form state is carried along when a mask moves: `retouch.migrate` knows coordinates
        and nothing of factors or codes.

        Args:
            value: What is stepped.
            selection: What it is of its weight.
            state: As the optimizer keeps it.
        """
        return state

    def pack_state(
        self, value: Tensor, selection: Selection, state: dict[str, Any]
    ) -> dict[str, Any]:
        """What `unpack_state` gave, as the optimizer keeps it; the value may be another by now."""
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, as in torch, and leaves state in the dtypes that it is kept in.

        Torch casts all state to the dtype of its parameter: codes would become floats, and the float32
        moments of a 16-bit parameter 16-bit ones.
        """
        super().load_state_dict(state_dict)
        saved = (key for group in state_dict["param_groups"] for key in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for key, param in zip(saved, params, strict=True):
            for entry, item in state_dict["state"].get(key, {}).items():
                if not isinstance(item, Tensor) or entry == "step":
                    continue
                dtype = item.dtype if entry in _AS_SAVED or not item.is_floating_point() else None
                if dtype is None and param.dtype in NARROW:
                    dtype = torch.float32
                if dtype is not None:
                    self.state[param][entry] = item.to(param.device, dtype)

    def _check(self, group: dict[str, Any]) -> None:
        for key, off in self._off:
            if group.get(key) not in off:
                raise HyperparameterError(
                    f"{type(self).__name__} has no {key}={group[key]!r}; wrap the class of "
                    "torch.optim instead"
                )
        if group["decay"] not in ("weight", "base"):
            raise HyperparameterError(
                f"decay must be 'weight' or 'base', got {group['decay']!r}; weight_decay=0 is none"
            )
        if group["rounding"] not in get_args(Rounding):
            raise HyperparameterError(
                f"rounding must be one of {', '.join(get_args(Rounding))}, got {group['rounding']!r}"
            )
        at_least_zero(lr_mult=group["lr_mult"], wd_mult=group["wd_mult"])
        if not 0 <= group["pull"] < 1:
            raise HyperparameterError(f"pull must be in [0, 1), got {group['pull']}")

    def _update_narrow(self, at: At, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Steps a float32 copy of a 16-bit value, and rounds it as the group says."""
        state = self.state[param]
        wide = rounding.widen(param, state)
        self.state[wide] = state  # where `_update` looks for it
        try:
            self._update(at, wide, grad.to(torch.float32), group)
            if group["pull"]:
                wide.lerp_(at.base(wide), group["pull"])
        finally:
            del self.state[wide]
        if at.slot is not None:
            flat = at.slot.selection.flat()
        else:
            flat = torch.arange(param.numel(), device=param.device)
        key = f"{group['rounding_seed']} {group['rounding_step']} {at.name}"
        rounding.narrow_(param, wide, group["rounding"], state, flat, key)

    def _update(self, at: At, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        raise AssertionError("a subclass says how to step")


def tick(state: dict[str, Any], name: str, param: Tensor) -> int | Tensor:
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


def at_least_zero(**options: float | Tensor) -> None:
    """Refuses a negative option, and NaN."""
    for name, value in options.items():
        if not float(value) >= 0:
            raise HyperparameterError(f"{name} must be at least 0, got {value}")


def _check_layout(name: str, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise LayoutError(f"the gradient of {name} has layout {grad.layout}; wanted a dense one")


def check_betas(betas: tuple[float | Tensor, float | Tensor]) -> None:
    """Refuses what is not two decay rates in [0, 1)."""
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise HyperparameterError(f"betas must be two numbers in [0, 1), got {betas}")


def like(param: Tensor) -> Tensor:
    """Zeros for a state of a parameter."""
    return torch.zeros_like(param, memory_format=torch.contiguous_format)
