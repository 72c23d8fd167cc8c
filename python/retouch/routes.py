"""Which way the gradient of each masked weight is taken, and the layers that take it sampled.

``sampled``: the layers that hold the weight run as operators of `retouch.sampled`, whose backward
pass computes the selected entries only. ``dense``: torch computes the whole gradient, and a hook
gathers the selected entries and frees it. Both ways end in the gradient of the compact value.

A route takes the place of `module.forward`. The weight keeps `requires_grad`, so if something
uses it past its layer (a fused loss that reads `lm_head.weight`), that part of the gradient comes
the dense way and is added: no use of a weight is ever lost.
"""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MethodType
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from retouch import sampled
from retouch.eligible import own_parameters
from retouch.errors import HyperparameterError
from retouch.selection import Selection

__all__ = [
    "Gradient",
    "Path",
    "Route",
    "break_even",
    "check_gradient",
    "fast_bfloat16",
    "plan",
    "route",
    "table_key",
]

Gradient = Literal["auto", "sampled", "dense"]
TABLE = "break_even.json"


@dataclass(frozen=True)
class Path:
    """How the gradient of one weight is taken.

    Attributes:
        gradient: "sampled" or "dense".
        why: The reason, in a few words.
        layers: The modules that are routed, for "sampled".
    """

    gradient: Literal["sampled", "dense"]
    why: str
    layers: tuple[nn.Module, ...] = ()


class Routed(Protocol):
    """What a route needs to know of a slot."""

    param: nn.Parameter
    selection: Selection
    value: nn.Parameter
    swapped: bool


# --- the rule ------------------------------------------------------------------------------------


def check_gradient(gradient: str) -> None:
    """Raises HyperparameterError for anything but a `Gradient`."""
    if gradient not in get_args(Gradient):
        raise HyperparameterError(
            f"gradient={gradient!r}; wanted one of {', '.join(get_args(Gradient))}"
        )


@functools.cache
def _table() -> Any:
    return json.loads(files("retouch").joinpath(TABLE).read_text())


@functools.cache
def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; else torch does at a sixth of float32's speed."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def table_key(dtype: torch.dtype) -> str:
    """The name of a dtype in the table: bfloat16 has two, by what the processor makes of it."""
    name = str(dtype).removeprefix("torch.")
    return name + " emulated" if dtype == torch.bfloat16 and not fast_bfloat16() else name


def break_even(selection: Selection, dtype: torch.dtype) -> float:
    """The density up to which "auto" samples: from the measured table, by kind, dtype and size.

    A dtype that the table does not have is taken for float32. There is no kernel for elements of
    float64.
    """
    if dtype == torch.float64 and selection.kind == "elements":
        return 0.0
    by_dtype = _table()[selection.kind]
    by_size = by_dtype.get(table_key(dtype), by_dtype["float32"])
    side = selection.numel**0.5
    fitting = [density for size, density in by_size if size <= side]
    return float(fitting[-1] if fitting else by_size[0][1])


def plan(model: nn.Module, selections: Mapping[str, Selection], gradient: str) -> dict[str, Path]:
    """The path of each selected parameter.

    Args:
        model: The model that is trained.
        selections: By names as in `model.named_parameters()`; what selects nothing is left out.
        gradient: "auto": sampled where the layer has an operator and the density is at most
            `break_even`; "sampled": wherever there is an operator; "dense": nowhere.

    Raises:
        HyperparameterError: Another word.
    """
    check_gradient(gradient)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, param in module._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append((module, leaf))
    known = dict(own_parameters(model))
    return {
        name: _path(owners[id(known[name])], known[name], selection, gradient)
        for name, selection in selections.items()
        if selection.count and name in known
    }


def _path(
    owners: list[tuple[nn.Module, str]], param: Tensor, selection: Selection, gradient: str
) -> Path:
    if gradient == "dense":
        return Path("dense", "as asked")
    if selection.kind == "all":
        return Path("dense", "all of it is selected")
    if len(selection.shape) < 2:
        return Path("dense", "a vector: its gradient is small")
    for module, leaf in owners:
        why = "unknown to it" if leaf != "weight" else _why_not(module)
        if why:
            return Path("dense", f"{type(module).__name__}: {why}")
    if gradient == "auto":
        limit = break_even(selection, param.dtype)
        if selection.density > limit:
            return Path("dense", f"density over the break-even of {limit:.0%}")
    return Path("sampled", selection.kind, tuple(module for module, _ in owners))


def _why_not(module: nn.Module) -> str:
    """Why a module cannot be routed; "" if it can."""
    forward = module.__dict__.get("forward", module.forward)
    if not isinstance(forward, Route) and forward != _own_forward(module):
        return "its forward is wrapped"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight"
    kind = _route_class(module)
    return "no sampled operator" if kind is None else kind.why_not(module)


# --- the layers ----------------------------------------------------------------------------------


class Route(ABC):
    """Stands in for the forward of one module while its weight is masked.

    Copies and pickles of the module get its own forward back.
    """

    def __init__(self, module: nn.Module, slot: Routed) -> None:
        self.module: Any = module
        self.slot: Routed | None = slot
        self.index = slot.selection.positions(slot.param.device)

    def __call__(self, input: Tensor) -> Tensor:
        """The module's output for an input."""
        module, slot = self.module, self.slot
        if (
            slot is None
            or slot.swapped
            or module.weight is not slot.param
            or not torch.is_grad_enabled()
        ):
            plain: Tensor = type(module).forward(module, input)
            return plain
        if self.index.device != slot.param.device:
            self.index = slot.selection.positions(slot.param.device)
        return self.run(input, module.weight.detach(), slot)

    @abstractmethod
    def run(self, input: Tensor, weight: Tensor, slot: Routed) -> Tensor:
        """The operator."""

    @staticmethod
    def why_not(module: Any) -> str:
        """Which option of a module the operator does not know; "" for none."""
        return ""

    def remove(self) -> None:
        """Gives the module its own forward back."""
        self.slot = None  # somebody may have wrapped this object
        if self.module.__dict__.get("forward") is self:
            del self.module.forward

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


class _Linear(Route):
    transposed = False

    def run(self, input: Tensor, weight: Tensor, slot: Routed) -> Tensor:
        input, weight, bias = _as_autocast(input, weight, self.module.bias)
        out: Tensor = sampled.linear(
            input, weight, bias, slot.value, self.index, slot.selection.kind, self.transposed
        )
        return out


class _Conv1D(_Linear):
    transposed = True


class _Embedding(Route):
    def run(self, input: Tensor, weight: Tensor, slot: Routed) -> Tensor:
        padding = self.module.padding_idx
        out: Tensor = sampled.embedding(
            input, weight, slot.value, self.index, slot.selection.kind,
            -1 if padding is None else padding,
        )  # fmt: skip
        return out

    @staticmethod
    def why_not(module: Any) -> str:
        if module.max_norm is not None:
            return "max_norm writes into the weight"
        if module.scale_grad_by_freq or module.sparse:
            return "scale_grad_by_freq" if module.scale_grad_by_freq else "sparse gradients"
        return ""


class _Conv2d(Route):
    def run(self, input: Tensor, weight: Tensor, slot: Routed) -> Tensor:
        module = self.module
        input, weight, bias = _as_autocast(input, weight, module.bias)
        out: Tensor = sampled.conv2d(
            input, weight, bias, slot.value, self.index, slot.selection.kind,
            list(module.stride), list(module.padding), list(module.dilation),
        )  # fmt: skip
        return out

    @staticmethod
    def why_not(module: Any) -> str:
        if module.groups != 1:
            return f"{module.groups} groups"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"padding {module.padding_mode} {module.padding}"
        return ""


def _route_class(module: nn.Module) -> type[Route] | None:
    """The route for a module that computes what its base class computes."""
    forward = type(module).forward
    for base, kind in ((nn.Linear, _Linear), (nn.Embedding, _Embedding), (nn.Conv2d, _Conv2d)):
        if forward is base.forward:
            return kind
    # The class of transformers, which need not be installed.
    known = forward.__module__, forward.__qualname__
    return _Conv1D if known == ("transformers.pytorch_utils", "Conv1D.forward") else None


def route(module: nn.Module, slot: Routed) -> Route:
    """Makes a module take the gradient of its weight sampled.

    Args:
        module: Of the layers of a `Path`.
        slot: Of its weight.

    Returns:
        The route; `remove` ends it.
    """
    kind = _route_class(module)
    assert kind is not None
    made = kind(module, slot)
    module.forward = made
    return made


def _as_autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the operands of a linear layer or convolution."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    cast = [
        x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (input, weight, bias)
    ]
    return cast[0], cast[1], cast[2]  # type: ignore[return-value]
