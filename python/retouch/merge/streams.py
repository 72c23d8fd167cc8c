"""`Streams`: the tensors of a job as the kernels take them, with what is kept of each."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retouch import _core
from retouch.merge.base import Job

__all__ = ["Cut", "Histogram", "Streams"]

Cut = tuple[float, int]
"""A magnitude, and the last flat position that is kept among those that equal it."""

EVERY = 2**63 - 1
_BINS = 8 << 16  # bytes of a histogram
_CHUNK = 1 << 16  # elements that the kernel counts at a time


@dataclass
class Streams:
    """The differences of tensors to a base (or the tensors themselves), and what is kept of each.

    Attributes:
        name: Of the tensor, for errors.
        models: Their ids.
        base: What is subtracted; None for nothing.
        tensors: One per model.
        start: Flat position of the first element in the whole tensor.
        weights: Multiply what is kept where it is combined.
        scales: Multiply what is kept.
        low: Keeps what exceeds a magnitude, and its equals up to a position.
        high: Keeps what is below a magnitude, and its equals up to a position.
        chances: Seed, name and share of a random choice.
        drawn: In its place a choice that was drawn before (`draw`).
        factors: Multiply each element; float32 of the tensor's shape.
        room: Bytes that `cuts` may use; None for no limit.
    """

    name: str
    models: list[str]
    base: Tensor | None
    tensors: list[Tensor]
    start: int
    weights: list[float]
    scales: list[float]
    low: list[Cut | None]
    high: list[Cut | None]
    chances: list[tuple[int, str, float] | None]
    drawn: list[Tensor | None]
    factors: list[Tensor | None]
    room: int | None = None

    @classmethod
    def of(cls, job: Job, weights: list[float] | None = None) -> "Streams":
        """All of the tensors of a job; masks that the job was given are kept as factors."""
        n = len(job.tensors)
        factors: list[Tensor | None] = [None] * n
        if job.masks is not None:
            factors = [m.to(torch.float32).contiguous() for m in job.masks]
        return cls(
            job.name, job.models, job.base, job.tensors, job.start,
            [1.0] * n if weights is None else weights,
            [1.0] * n, [None] * n, [None] * n, [None] * n, [None] * n, factors, job.room,
        )  # fmt: skip

    def blend(self, rule: str, dtype: torch.dtype, **options: Any) -> Tensor:
        """Combines the streams; see `_core.blend_` for the rules. Returns a tensor of `dtype`."""
        out = torch.empty(self.tensors[0].shape, dtype=dtype)
        _core.blend_(out, self, rule, **options)
        return out

    def cuts(self, counts: list[int]) -> list[Cut]:
        """For each tensor the cut that parts its so many largest magnitudes; ties by lowest position."""
        return [c[:2] for c in self._cuts([(t, k, False) for t, k in enumerate(counts)])]

    def _cuts(self, requests: list[tuple[int, int, bool]]) -> list[tuple[float, int, int]]:
        return _core.cuts(self, requests, room=self.room)

    def bands(self, tops: list[int], keeps: list[int]) -> tuple[list[Cut], list[Cut]]:
        """The cuts `low` and `high` that leave of each tensor the `keep` magnitudes below the `top` largest.

        Of equal magnitudes the lowest positions stay.
        """
        n = len(tops)
        ends = [
            (t, top + keep, False) for t, (top, keep) in enumerate(zip(tops, keeps, strict=True))
        ]
        found = self._cuts([*ends, *((t, top, True) for t, top in enumerate(tops))])
        low, high = [c[:2] for c in found[:n]], [c[:2] for c in found[n:]]
        for t, (_, _, above) in enumerate(found[n:]):
            if tops[t] and keeps[t] and low[t][0] == high[t][0]:
                # all that stays is equal: its first ones
                low[t] = self._cuts([(t, above + keeps[t], False)])[0][:2]
                high[t] = (high[t][0], EVERY)
        return low, high

    def draw(self) -> None:
        """Makes the random choices now, one bit for each position from 0 on: nothing draws them again.

        Stretches may have the bits of the whole tensor.
        """
        for t, chance in enumerate(self.chances):
            if chance is not None:
                words = -(-(self.start + self.tensors[t].numel()) // 64)
                bits = torch.empty(8 * words, dtype=torch.uint8)
                _core.draw_(bits, *chance)
                self.chances[t], self.drawn[t] = None, bits

    def sums(self) -> list[tuple[float, float]]:
        """Of each: the sum of all magnitudes, and of those that are kept."""
        return _core.sums(self)

    def gram(self) -> Tensor:
        """Dot products of what is kept, [models, models], float64."""
        n = len(self.tensors)
        return torch.tensor(_core.gram(self), dtype=torch.float64).view(n, n)

    def one(self, t: int) -> "Streams":
        """One of the streams alone."""
        return Streams(
            self.name, [self.models[t]], self.base, [self.tensors[t]], self.start, [self.weights[t]],
            [self.scales[t]], [self.low[t]], [self.high[t]], [self.chances[t]],
            [self.drawn[t]], [self.factors[t]], self.room,
        )  # fmt: skip


class Histogram:
    """The k-th largest of many tensors that are never held together: two passes.

    Whole numbers are added, so the result depends on no order.

    Args:
        signed: Order values, not magnitudes.
    """

    def __init__(self, signed: bool = False) -> None:
        self.signed = signed
        self.high: int | None = None
        self.rest = 0
        self.total = 0
        self.value: float | None = None
        self._bins: NDArray[np.int64] = np.zeros(1 << 16, np.int64)

    def add(self, streams: Streams) -> None:
        """Counts the elements of the only stream."""
        if self.high is None:
            self.total += streams.tensors[0].numel()
        _core.count_keys_(self._bins, streams, within=self.high, signed=self.signed)

    def settle(self, k: int) -> None:
        """Ends a pass; after the second one `value` is the k-th largest (1 <= k <= total)."""
        k = k if self.high is None else self.rest
        above = np.cumsum(self._bins[::-1])
        at = int(np.searchsorted(above, k))
        rest = k - (int(above[at - 1]) if at else 0)
        found = len(self._bins) - 1 - at
        if self.high is None:
            self.high, self.rest = found, rest
            self._bins = np.zeros(1 << 16, np.int64)
        else:
            self.value = _core.key_value((self.high << 16) | found, self.signed)
            self._bins = np.zeros(0, np.int64)  # the merge that follows needs the value alone

    @staticmethod
    def memory(count: int) -> int:
        """Bytes of so many histograms, with what `settle` needs for one of them."""
        return (count + 2) * _BINS

    @staticmethod
    def counting(numel: int) -> int:
        """Bytes that `add` needs for so many elements: each part of the work has bins of its own."""
        return min(2 * torch.get_num_threads(), -(-numel // _CHUNK)) * _BINS
