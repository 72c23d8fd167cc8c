"""Compact values: what the engine keeps beside each masked weight."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from retouch.errors import EngineError, LayoutError
from retouch.masks import Selection
from retouch.routes import Path, Route, route

AGAIN = "call retouch.unwrap(model), then select and wrap again"


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def lookup(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a model has now under a dotted name."""
    *path, leaf = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = module._modules.get(part) if module is not None else None
    return module._parameters.get(leaf) if module is not None else None


def some(names: Iterable[str]) -> str:
    """The first few of many names, for an error."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype hold the same bits."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(kind) == b.contiguous().view(kind)


class Container(nn.Module):
    """Holds compact values under the names of their weights and keeps them out of checkpoints."""

    def forward(self, *inputs: Any) -> Any:
        """Hands its input on: a model that is an `nn.Sequential` calls all its children."""
        return inputs[0] if len(inputs) == 1 else inputs

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Adds nothing: checkpoints have the model's own keys."""
        return kwargs["destination"] if kwargs.get("destination") is not None else OrderedDict()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Demands nothing of a checkpoint."""

    def place(self, name: str, value: nn.Parameter) -> None:
        """Registers `value` under the dotted `name`."""
        first, _, rest = name.partition(".")
        while hasattr(self, first) and (not rest or first not in self._modules):
            first += "_"
        if not rest:
            self.register_parameter(first, value)
            return
        if first not in self._modules:
            self.add_module(first, Container())
        cast(Container, self._modules[first]).place(rest, value)


class Copy(Container):
    """What a deep copy of a wrapped model has in place of the engine: nothing that trains."""

    def __repr__(self) -> str:
        return "Copy()"


@dataclass(eq=False)
class Slot:
    """One masked parameter.

    Attributes:
        name: Its name in `model.named_parameters()`.
        param: The weight, which the model uses.
        selection: Which of its coordinates may move.
        value: The compact value: float32 (float64 for float64 weights, and the weight's own dtype
            where an optimizer rounds without masters), in the shape of
            `selection.gather(param)`: elements [k], rows [r, ...], columns [rows, c, ...], all as
            the weight.
        base: What the selected coordinates held when the mask was set; the weight's dtype, value's
            shape.
        base_hash: Fingerprint of the whole weight at that time ("" without fingerprints).
        path: How its gradient is taken.
    """

    name: str
    param: nn.Parameter
    selection: Selection
    value: nn.Parameter
    base: Tensor
    base_hash: str
    path: Path
    version: int = -1  # of the weight, after the last write of the engine
    fused: int | None = None  # version of the value that a fused optimizer has already scattered
    swapped: bool = False  # the weight holds the base for the moment
    tap: Callable[[str, Tensor], None] | None = None  # sees each dense gradient
    waits: bool = False  # gradients stay with the weight until a mover has selected by them
    _hook: RemovableHandle | None = field(default=None, repr=False)
    _routes: list[Route] = field(default_factory=list, repr=False)

    def watch(self) -> None:
        """Makes the layers of the weight, and the weight itself, hand their gradients over."""
        me = weakref.ref(self)

        def hand_over(param: Tensor) -> None:
            slot = me()
            if slot is not None:
                slot.collect()
                # The value's own hooks hear of its gradient as where autograd itself brings it.
                for hook in (slot.value._post_accumulate_grad_hooks or {}).values():
                    hook(slot.value)

        self.unwatch()
        self._hook = self.param.register_post_accumulate_grad_hook(hand_over)
        self._routes = [route(layer, self) for layer in self.path.layers]

    def unwatch(self) -> None:
        """Leaves the weight's gradients and its layers alone."""
        for one in self._routes:
            one.remove()
        self._routes = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def collect(self) -> None:
        """Adds the selected entries of the weight's gradient to the value's; frees the former."""
        if self.waits:
            return
        grad, self.param.grad = self.param.grad, None
        if grad is None:
            return
        if self.swapped:
            raise EngineError(
                f"backward of {self.name} inside of base_weights(): its gradient is that of the "
                "base, not of the trained weights"
            )
        if grad.layout == torch.sparse_coo:  # nn.Embedding(sparse=True)
            grad = grad.to_dense()
        if grad.layout != torch.strided or type(grad) is not Tensor:
            raise LayoutError(
                f"the gradient of {self.name} is a {type(grad).__name__} of layout {grad.layout}; "
                "wanted a dense torch.Tensor"
            )
        if tuple(grad.shape) != self.selection.shape:
            raise EngineError(
                f"{self.name} was resized from {self.selection.shape} to {tuple(grad.shape)}; {AGAIN}"
            )
        with torch.no_grad():
            if self.tap is not None:
                self.tap(self.name, grad)
            if self.value.grad is None:
                self.value.grad = self.selection.gather(grad, self.name).to(self.value.dtype)
            else:
                self.selection.gather_add_(self.value.grad, grad, self.name)

    def write(self) -> None:
        """Rounds the value once into the weight."""
        with torch.no_grad():
            self.selection.scatter_(self.param, self.value.detach(), self.name)
        self.version = self.param._version

    def wrote(self) -> None:
        """Notes that a fused optimizer has just written the present value into the weight."""
        self.fused, self.version = self.value._version, self.param._version

    def is_stale(self) -> bool:
        """Whether somebody else has written into the weight."""
        return self.param._version != self.version

    def sync(self) -> None:
        """Takes over what the weight holds, and keeps the masters that round to it."""
        with torch.no_grad():
            now = self.selection.take(self.param)
            same = same_bits(now, self.value.detach().to(now.dtype))
            self.value.copy_(torch.where(same, self.value, now.to(self.value.dtype)))
        self.version = self.param._version

    def has_moved(self) -> bool:
        """Whether a selected weight differs from the base in any bit."""
        return not bool(same_bits(self.selection.take(self.param), self.base).all())


# By the id of the compact value: slots own their values, so a live entry is right.
_SLOTS: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()


def register(slot: Slot) -> None:
    """Makes `slot_of` find the slot of a compact value."""
    _SLOTS[id(slot.value)] = slot


def slot_of(value: Tensor) -> Slot | None:
    """The slot that a compact value belongs to; None for any other tensor."""
    slot = _SLOTS.get(id(value))
    return slot if slot is not None and slot.value is value else None
