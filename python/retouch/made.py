"""Scores that are made where they are ranked, so that no tensor of scores is filled and read again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retouch import _core, ops
from retouch.ops import _native

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

    def topk(
        self, groups: Sequence[Sequence[str]], ks: Sequence[int], *, largest: bool = True
    ) -> list[list[Tensor]]:
        """`ops.topk_each` of the scores.

        Args:
            groups: Names of parameters.
            ks: How many of each group.
            largest: The largest if True, else the smallest.

        Raises:
            ScoreError: A score is NaN.
            BudgetError: A k is larger than the number of elements.
        """
        if self.divisors is None and not self.pinned:
            values = [[self.values[n] for n in names] for names in groups]
            return ops.topk_each(values, groups, ks, largest=largest, absolute=True)
        return [self._topk(names, k, largest) for names, k in zip(groups, ks, strict=True)]

    def _topk(self, names: Sequence[str], k: int, largest: bool) -> list[Tensor]:
        values = [self.values[n] for n in names]
        divisors = None if self.divisors is None else [self.divisors[n] for n in names]
        none = torch.empty(0, dtype=torch.int32)
        pinned = [self.pinned.get(n, none) for n in names]
        if _native(*values, *(divisors or ())) and all(p.dtype == torch.int32 for p in pinned):
            found = _core.topk_made(
                [v.detach() for v in values],
                None if divisors is None else [d.detach() for d in divisors],
                self.offset, [p.cpu().contiguous() for p in pinned], self.pin, list(names), k,
                largest=largest,
            )  # fmt: skip
            return [torch.from_numpy(p) for p in found]
        scores = []
        for i, value in enumerate(values):
            score = value.detach().abs().contiguous()
            if divisors is not None:
                score.div_(divisors[i].detach().abs().add_(self.offset))
            score.view(-1)[pinned[i].to(device=score.device, dtype=torch.int64)] = self.pin
            scores.append(score)
        return ops.topk(scores, names, k, largest=largest)
