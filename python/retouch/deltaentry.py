"""`Entry`: what happened to one tensor, as a delta holds it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retouch import ops
from retouch.deltachange import Change

__all__ = ["Entry", "Kind"]

Kind = Literal["sparse-replace", "dense", "added", "removed", "sparse-add", "dense-add", "low-rank"]


@dataclass(eq=False)
class Entry:
    """What happened to one tensor.

    Attributes:
        kind: "sparse-replace" (values at positions), "dense" (the whole tensor), "added" (it is not
            in the base) or "removed"; of compressed deltas "sparse-add" (differences at positions),
            "dense-add" or "low-rank" (a difference of the whole tensor).
        shape: Of the tensor.
        dtype: Of the tensor and its values.
        index: Ascending flat positions (int32 or int64) of a sparse entry.
        value: New values: [k] for a sparse entry, else the whole tensor; None if removed, and where
            there is a `change`.
        old: What the base has there; None if not known.
        base_hash: Fingerprint of the tensor in the base; None if not known.
        result_hash: Fingerprint of the tensor after the change; None if not known.
        change: What is added to the base, of the kinds that add.
        error: What compression lost: the norm of the difference that is missing, relative to the norm of
            the tensor's whole change. None if nothing was lost.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: Tensor | None = None
    value: Tensor | None = None
    old: Tensor | None = None
    base_hash: str | None = None
    result_hash: str | None = None
    change: Change | None = None
    error: float | None = None

    @property
    def count(self) -> int:
        """Changed elements (all of them for a whole tensor)."""
        return math.prod(self.shape) if self.index is None else self.index.numel()

    @property
    def nbytes(self) -> int:
        """Bytes in memory of positions and new values (or of what is added)."""
        parts = [t for t in (self.index, self.value) if t is not None]
        own = sum(t.numel() * t.element_size() for t in parts)
        return own + (0 if self.change is None else self.change.nbytes)

    def after(self, before: Tensor | None) -> Tensor | None:
        """What this entry writes where the base has `before`; None if that is not known.

        What is added is added in float32 (float64 to float64 tensors) and rounded once.
        """
        if self.change is None:
            return self.value
        if before is None:
            return None
        wide = before.detach().to(ops.value_dtype(self.dtype))
        add = self.change.decode().to(wide.device, wide.dtype)
        return (wide + add.reshape(wide.shape)).to(self.dtype)

    @property
    def new(self) -> Tensor | None:
        """The new values, if they are known without the base."""
        return self.after(self.old)

    def read(self, tensor: Tensor) -> Tensor:
        """What a tensor holds where this entry writes, bit for bit."""
        if self.index is not None:
            return ops.take(tensor, self.index, "tensor")
        return tensor.detach().clone()

    def write(self, tensor: Tensor, values: Tensor, name: str) -> None:
        """Writes values there, bit for bit."""
        values = values.to(tensor.device)
        if self.index is not None:
            ops.put_(tensor, self.index, values, name)
        else:
            with torch.no_grad():
                tensor.copy_(values.view(self.shape))

    def leads_to(self, tensor: Tensor, values: Tensor) -> str:
        """The fingerprint that a tensor would have with these values."""
        if self.index is None:
            return ops.fingerprint(values.view(self.shape))
        return ops.fingerprint(tensor, self.index, values)
