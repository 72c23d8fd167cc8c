"""Scores that are made where they are ranked, so that no tensor of scores is filled and read again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retouch import ops

__all__ = ["Made"]


@dataclass(frozen=True)
class Made:
    """The scores |value| / (|divisor| + offset) of parameters, or |value|; some are pinned.

    Attributes:
        values: By parameter, float32.
        divisors: For each, of its shape and dtype; None: the score is |value|.
        offset: Added to the magnitude of the divisor.
        pinned: Flat positions, ascending int32, whose score is `pin`; parameters without may be absent.
        pin: Infinity or minus infinity.
    """

    values: Mapping[str, Tensor]
    divisors: Mapping[str, Tensor] | None = None
    offset: float = 0.0
    pinned: Mapping[str, Tensor] = field(default_factory=dict)
    pin: float = math.inf

    def topk(self, names: Sequence[str], k: int, *, largest: bool = True) -> list[Tensor]:
        """`ops.topk` of the scores of some of the parameters.

        Raises:
            ScoreError: A score is NaN.
            BudgetError: k is larger than the number of elements.
        """
        values = [self.values[n] for n in names]
        divisors = None if self.divisors is None else [self.divisors[n] for n in names]
        if divisors is None and not self.pinned:
            return ops.topk(values, names, k, largest=largest, absolute=True)
        none = torch.empty(0, dtype=torch.int32)
        pinned = [self.pinned.get(n, none) for n in names]
        return ops.topk_made(
            values, divisors, self.offset, pinned, self.pin, names, k, largest=largest
        )
