"""Scores of the weights alone, without data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.passes import Eligible, LossFn
from retouch.scores.base import Score, register


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(Score):
    """|weight|."""

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        return {n: c.param.detach().to(torch.float32).abs() for n, c in eligible.items()}


@register("random")
@dataclass(frozen=True)
class Random(Score):
    """Uniform numbers in [0, 1) that depend on the seed, the parameter's name and the position.

    Attributes:
        seed: The seed; a config that says "random" puts its own here.
    """

    seed: int = 0

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        return {n: ops.uniform(c.shape, self.seed, n, c.param.device) for n, c in eligible.items()}
