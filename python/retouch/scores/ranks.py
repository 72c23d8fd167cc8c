"""Scores made of the ranks of another score."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retouch import order
from retouch.errors import HyperparameterError
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn
from retouch.scores.base import Score, as_score


@register("soft_rank", alone=False)
@dataclass(frozen=True)
class SoftRank(Score):
    """sigmoid(2 beta (r - alpha)), where r is the rank among all coordinates, from 0 to 1.

    The probabilities of RoAST (arXiv 2312.04032), for ``direction="bernoulli"``; 0.5 at the rank
    alpha, and for a large beta 1 above it and 0 below. Equal scores have the same rank, the mean of
    theirs. A gradient that is divided by this probability where it is drawn is unbiased. The memory
    beside the score is that of `retouch.order.relative_ranks`.

    Attributes:
        score: What is ranked.
        alpha: The rank that is selected half of the time, in [0, 1].
        beta: The steepness, above 0.

    Raises:
        HyperparameterError: An alpha or beta outside of its range.
    """

    score: Any
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", as_score(self.score))
        if not 0 <= self.alpha <= 1:
            raise HyperparameterError(f"SoftRank: alpha={self.alpha!r}; wanted a rank in [0, 1]")
        if not self.beta > 0:
            raise HyperparameterError(f"SoftRank: beta={self.beta!r}; wanted a number above 0")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether the score reads any data."""
        return bool(self.score.needs_data)

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        scores = self.score(model, eligible, data, loss_fn)
        ranks = order.relative_ranks([scores[n] for n in eligible], list(eligible))
        return {
            name: torch.sigmoid((rank - self.alpha).mul_(2 * self.beta))
            for name, rank in zip(eligible, ranks, strict=True)
        }
