"""Data parallel training: the gradients of compact values, and nothing else, are averaged.

`DistributedDataParallel` averages what is in its buckets, and a bucket of a masked weight would be
dense. So the engine keeps its weights and values out of DDP (the list that DDP itself reads,
`_ddp_params_and_buffers_to_ignore`) and averages the gradients of the values in one all-reduce at
the end of a backward pass. When that is, and whether it is wanted (`no_sync`), is known from one
parameter of a single element, the anchor, that is tied to the outputs of the model: the only
parameter that DDP still sees.
"""

import hashlib
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from retouch.errors import EngineError

if TYPE_CHECKING:
    from retouch.compact import Engine

__all__ = ["Reducer", "processes"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Reducer:
    """Averages the gradients of the compact values of one model over the processes of its DDP.

    Args:
        engine: Of the model.
        model: It, before DDP wraps it.

    Attributes:
        anchor: The parameter that DDP sees.
        sent: Bytes of gradients that the last synchronised backward pass has sent from a process.
        done: Whether the gradients that are there have been averaged.
    """

    def __init__(self, engine: "Engine", model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.anchor = nn.Parameter(torch.zeros(1, device=device))
        self.sent = 0
        self.done = False
        self._engine = weakref.ref(engine)
        self._agreed = False
        self._queued = False
        self._group: Any = None
        self._before = getattr(model, _IGNORED, None)
        self._hook = model.register_forward_hook(self._after_forward)

    def mask_changed(self, model: nn.Module) -> None:
        """Keeps all parameters but the anchor out of a DDP that is still to be made."""
        names = [
            f"{path}.{leaf}"  # of a parameter of the model itself DDP asks for ".weight"
            for path, module in model.named_modules(remove_duplicate=False)
            for leaf, param in module._parameters.items()
            if param is not self.anchor
        ]
        plain = [name.removeprefix(".") for name in names]
        setattr(model, _IGNORED, sorted({*(self._before or []), *names, *plain}))
        self._agreed = False

    def remove(self, model: nn.Module) -> None:
        """Takes everything off the model."""
        self._hook.remove()
        if self._before is None:
            delattr(model, _IGNORED)
        else:
            setattr(model, _IGNORED, self._before)

    def _after_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        ddp: Any = DistributedDataParallel._get_active_ddp_module()
        if ddp is None or not torch.is_grad_enabled():
            return outputs
        if not ddp.require_backward_grad_sync:
            self.done = False  # what comes of this is of this process alone
            return outputs
        if any(p is not self.anchor for p in ddp._module_parameters if p.requires_grad):
            raise EngineError(
                "DistributedDataParallel was made before the model was wrapped, so it would send "
                "dense gradients: call retouch.wrap first, then DistributedDataParallel(model)"
            )
        self._group = ddp.process_group
        tied = 0

        def tie(output: Any) -> Any:
            nonlocal tied
            if not isinstance(output, Tensor) or not output.requires_grad:
                return output
            tied += 1
            return _Tie.apply(output, self.anchor, self)  # type: ignore[no-untyped-call]

        outputs = pytree.tree_map(tie, outputs)
        if not tied:
            raise EngineError(
                f"{type(model).__name__} returns no tensor that requires a gradient, in any "
                "container that torch knows (register yours with torch.utils._pytree)"
            )
        return outputs

    def queue(self) -> None:
        """Asks for the average at the end of the backward pass that is under way."""
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._reduce)

    def _reduce(self) -> None:
        self._queued = False
        engine = self._engine()
        if engine is None:
            return
        if not engine.slots:  # nothing moves yet, gradients are only being collected
            self.done, self.sent = True, 0
            return
        if not self._agreed:
            self._agree(engine)
        count, self.sent = dist.get_world_size(self._group), 0
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for slot in engine.slots.values():
            by_dtype.setdefault(slot.value.dtype, []).append(slot.value)
        for dtype, values in by_dtype.items():
            # One message: all gradients, and behind them which of them exist, since a process may
            # not have used every layer (experts).
            parts = [torch.zeros_like(v) if v.grad is None else v.grad for v in values]
            exist = torch.tensor([v.grad is not None for v in values], dtype=dtype)
            message = torch.cat([*(p.reshape(-1) for p in parts), exist.to(parts[0].device)])
            message.div_(count)
            dist.all_reduce(message, group=self._group)
            self.sent += message.numel() * message.element_size()
            *averages, exist = message.split([*(v.numel() for v in values), len(values)])
            for value, average, used in zip(values, averages, exist.tolist(), strict=True):
                if used:
                    if value.grad is None:
                        value.grad = torch.empty_like(value)
                    value.grad.copy_(average.view_as(value))
        self.done = True

    def _agree(self, engine: "Engine") -> None:
        """Raises EngineError in every process if they train different weights."""
        device = self.anchor.device
        mine = torch.tensor(list(_digest(engine)), dtype=torch.uint8, device=device)
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(all_of_them, mine, group=self._group)
        if any(not torch.equal(mine, other) for other in all_of_them):
            raise EngineError(
                "the processes do not have the same mask on the same weights: load the same model "
                "in each, and select with the same data and seed, or share one mask by "
                "Mask.broadcast()"
            )
        self._agreed = True


def _digest(engine: "Engine") -> bytes:
    """A hash of what must be the same in all processes: the mask, and the weights at its time."""
    found = hashlib.blake2b(digest_size=16)
    for name, slot in engine.slots.items():
        found.update(f"{name}|{slot.selection.kind}|{slot.selection.shape}|".encode())
        index, base = slot.selection.index, slot.base.detach().cpu().contiguous()
        if index is not None:
            found.update(index.numpy().tobytes())
        found.update(base.reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, fingerprint in engine.hashes.items():
        found.update(f"{name}={fingerprint};".encode())
    return found.digest()


class _Tie(torch.autograd.Function):
    """The identity; its backward pass tells the reducer that a synchronised one is under way."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, reducer: Reducer) -> Tensor:
        ctx.reducer = reducer
        return output.clone()  # a view could not be changed in place by whoever gets it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.reducer.queue()
        return grad, torch.zeros_like(ctx.reducer.anchor), None
