"""What a learned gate computes from its trained number: see `retouch.gates`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RULES", "HardConcrete", "Proximal", "Rule", "StraightThrough"]


class Rule(Protocol):
    """How the trained number of a gate becomes the factor z."""

    @property
    def init(self) -> float:
        """What the number starts from."""

    @property
    def noisy(self) -> bool:
        """Whether z is drawn in training."""

    def gate(self, value: Tensor, noise: Tensor | None) -> Tensor:
        """z, differentiable; without noise the one that evaluation takes."""

    def cost(self, value: Tensor) -> Tensor:
        """What each gate adds to the penalty, differentiable."""

    def open(self, value: Tensor) -> Tensor:
        """The probability that z is not 0."""

    def rank(self, values: Sequence[Tensor]) -> Tensor:
        """A score of a product of gates: larger = more surely open."""

    def shrink_(self, value: Tensor, kappa: float) -> None:
        """Pulls the numbers towards closed gates, after a step, where the rule does so."""


@dataclass(frozen=True)
class StraightThrough:
    """z = 1 where s >= threshold, else 0; the gradient of s is that of z = s.

    TAPS (arXiv 2203.16708). So a closed gate still sees <change, gradient> and can open again, while the
    change behind it gets no gradient. The penalty of a gate is |s|.

    Attributes:
        threshold: From which s on a gate is open.
        init: What s starts from.
        hard: False: z = s, without a step, as the released code does it in the MLPs of vision
            transformers.
    """

    threshold: float = 0.1
    init: float = 0.15
    hard: bool = True
    noisy: bool = field(default=False, init=False, repr=False)

    def gate(self, value: Tensor, noise: Tensor | None) -> Tensor:
        """See `Rule`."""
        # the difference is 0 and carries the gradient: z is exactly 0 or 1
        return self.open(value) + (value - value.detach()) if self.hard else value

    def cost(self, value: Tensor) -> Tensor:
        """See `Rule`."""
        return value.abs()

    def open(self, value: Tensor) -> Tensor:
        """See `Rule`."""
        return (value.detach() >= self.threshold).to(value.dtype)

    def rank(self, values: Sequence[Tensor]) -> Tensor:
        """The smallest s: all are open where it reaches the threshold."""
        least = values[0]
        for value in values[1:]:
            least = torch.minimum(least, value)
        return least

    def shrink_(self, value: Tensor, kappa: float) -> None:
        """Nothing: the penalty closes these gates."""


@dataclass(frozen=True)
class Proximal:
    """z = g, which is pulled towards 0 after each step and stays there when it arrives: an L1 penalty.

    CoDyRA (arXiv 2412.01004). The proximal step of kappa is sign(g) max(|g| - kappa, 0); it takes the
    place of a term in the loss, whose gradient never makes a number exactly 0. The paper starts from
    normal noise, which may have any sign; here all gates start alike.

    Attributes:
        released: In the order of the released code, which takes kappa off first and then closes what
            is below kappa, so that all up to twice kappa is closed.
        init: What g starts from.
    """

    released: bool = False
    init: float = 1.0
    noisy: bool = field(default=False, init=False, repr=False)

    def gate(self, value: Tensor, noise: Tensor | None) -> Tensor:
        """See `Rule`."""
        return value

    def cost(self, value: Tensor) -> Tensor:
        """Nothing: the proximal step is the penalty."""
        return torch.zeros_like(value)

    def open(self, value: Tensor) -> Tensor:
        """See `Rule`."""
        return (value.detach() != 0).to(value.dtype)

    def rank(self, values: Sequence[Tensor]) -> Tensor:
        """The smallest |g|: all are open where it is above 0."""
        least = values[0].abs()
        for value in values[1:]:
            least = torch.minimum(least, value.abs())
        return least

    def shrink_(self, value: Tensor, kappa: float) -> None:
        """See `Rule`."""
        with torch.no_grad():
            size = (value.abs() - kappa).clamp(min=0.0)
            if self.released:
                size = torch.where(size < kappa, 0.0, size)
            value.copy_(torch.copysign(size, value))


@dataclass(frozen=True)
class HardConcrete:
    """z = clip(s (high - low) + low, 0, 1) with s = sigmoid(logit(u) + alpha) and u uniform in (0, 1).

    Diff pruning (arXiv 2012.07463). In evaluation s = sigmoid(alpha). The penalty of a gate is the
    probability that it is open, sigmoid(alpha - log(-low / high)).

    Attributes:
        low: Lower end of the stretched interval, < 0.
        high: Its upper end, > 0.
        init: What alpha starts from.
    """

    low: float = -1.5
    high: float = 1.5
    init: float = 5.0
    noisy: bool = field(default=True, init=False, repr=False)

    def gate(self, value: Tensor, noise: Tensor | None) -> Tensor:
        """See `Rule`."""
        if noise is not None:
            value = value + torch.logit(noise, eps=1e-4)
        return (value.sigmoid() * (self.high - self.low) + self.low).clamp(0.0, 1.0)

    def cost(self, value: Tensor) -> Tensor:
        """See `Rule`."""
        return (value - math.log(-self.low / self.high)).sigmoid()

    def open(self, value: Tensor) -> Tensor:
        """See `Rule`."""
        return self.cost(value.detach())

    def rank(self, values: Sequence[Tensor]) -> Tensor:
        """The log of the probability that all are open."""
        shift = math.log(-self.low / self.high)
        total = F.logsigmoid(values[0] - shift)
        for value in values[1:]:
            total = total + F.logsigmoid(value - shift)
        return total

    def shrink_(self, value: Tensor, kappa: float) -> None:
        """Nothing: the penalty closes these gates."""


RULES: dict[str, Rule] = {
    "straight_through": StraightThrough(),
    "raw": StraightThrough(hard=False),
    "hard_concrete": HardConcrete(),
    "proximal": Proximal(),
    "proximal_released": Proximal(released=True),
}
