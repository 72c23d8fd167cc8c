"""`Entry`: what happened to one tensor, as a delta holds it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retouch import ops

__all__ = ["Entry"]


@dataclass(eq=False)
class Entry:
    """What happened to one tensor.

    Attributes:
        kind: "sparse-replace" (values at positions), "dense" (the whole tensor), "added" (it is not
            in the base) or "removed".
        shape: Of the tensor.
        dtype: Of the tensor and its values.
        index: Ascending flat positions (int32 or int64) of a sparse entry.
        value: New values: [k] for a sparse entry, else the whole tensor; None if removed.
        old: What the base has there; None if not known.
        base_hash: Fingerprint of the tensor in the base; None if not known.
        result_hash: Fingerprint of the tensor after the change; None if not known.
    """

    kind: Literal["sparse-replace", "dense", "added", "removed"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: Tensor | None = None
    value: Tensor | None = None
    old: Tensor | None = None
    base_hash: str | None = None
    result_hash: str | None = None

    @property
    def count(self) -> int:
        """Changed elements (all of them for a whole tensor)."""
        return math.prod(self.shape) if self.index is None else self.index.numel()

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
