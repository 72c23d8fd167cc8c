"""Gates that close on gradients while micro-batches are still adding to them."""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from retouch.optim import gates

if TYPE_CHECKING:
    from retouch.compact import Engine

__all__ = ["Running"]


class Running:
    """At the end of each backward pass, lets the gates of an optimizer close on what has come so far.

    That is after the processes have been averaged, where the pass does that.

    Args:
        engine: Of the model.
        optimizer: Whose groups say which gate is for which compact values.
    """

    def __init__(self, engine: "Engine", optimizer: Optimizer) -> None:
        self._engine = weakref.ref(engine)
        self._optimizer = weakref.ref(optimizer)
        self._hooks: dict[int, RemovableHandle] = {}  # by id of a value, which the engine keeps
        self._queued = False

    def listen(self) -> None:
        """Hears of the gradients of all values whose group has such a gate by now."""
        me = weakref.ref(self)

        def reached(_: Tensor) -> None:
            running = me()
            if running is not None and not running._queued:
                running._queued = True
                Variable._execution_engine.queue_callback(running._close)

        for value, _, _ in self._gated():
            if id(value) not in self._hooks:
                hook = value.register_post_accumulate_grad_hook(reached)
                self._hooks[id(value)] = hook

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def _gated(self) -> list[tuple[Tensor, str, gates.Gate]]:
        """Values, the names of their weights, and their gates."""
        engine, optimizer = self._engine(), self._optimizer()
        found: list[tuple[Tensor, str, gates.Gate]] = []
        if engine is None or optimizer is None:
            return found
        for group in optimizer.param_groups:
            gate = gates.parse(group["gate"]) if group.get("gate") is not None else None
            if gate is not None and gate.each_backward:
                named = ((value, engine.name_of(value)) for value in group["params"])
                found += [(value, name, gate) for value, name in named if name]
        return found

    def _close(self) -> None:
        self._queued = False
        with torch.no_grad():
            for value, name, gate in self._gated():
                if value.grad is not None and value.grad.numel():
                    gate.close_(value.grad, name)
