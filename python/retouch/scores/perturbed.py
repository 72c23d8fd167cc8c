"""Scores of a model whose inputs are changed: by other statistics, or by an adversary."""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from retouch.collected import Collected
from retouch.errors import HyperparameterError, ScoreError
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn, loss_of
from retouch.perturb import Attack, changed_features, shifted
from retouch.scores.base import Combined, Score, as_score, minimum
from retouch.scores.gradients import Fisher, Gradient, GradStat


@dataclass(frozen=True)
class _Perturbed(Score):
    """A score of gradients, taken while something else goes into the model than the data.

    Attributes:
        score: The score.
        at: The module whose output is changed, see `retouch.perturb.changed_features`. It must not be
            computed again in the backward pass (activation checkpointing).
    """

    needs_data: ClassVar[bool] = True
    score: Any
    at: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", as_score(self.score))

    def _check(self, data: Any) -> None:
        if isinstance(data, Collected):
            raise ScoreError(
                f"{self!r} needs passes of its own; of the training there are gradients of the plain "
                "inputs alone: leave collect out of the schedule and pass data="
            )


@register("shifted", alone=False)
@dataclass(frozen=True)
class Shifted(_Perturbed):
    """A score on features of other channel statistics, as data of an unseen domain have them.

    The perturbation of FisherTune (arXiv 2503.17940), as far as notes on the paper describe it: see
    `retouch.perturb.shifted`.

    Attributes:
        mean: Of the shift of each channel's mean, in its standard deviations.
        std: Of the relative change of each channel's standard deviation.
        seed: Of the directions.

    Raises:
        HyperparameterError: A strength below 0.
    """

    mean: float = 0.1
    std: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.mean >= 0 and self.std >= 0):
            raise HyperparameterError(
                f"Shifted: mean={self.mean!r}, std={self.std!r}; wanted numbers >= 0"
            )

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        self._check(data)

        def change(features: Tensor) -> Tensor:
            return shifted(features, self.mean, self.std, self.seed)

        with changed_features(model, self.at, change):
            found: dict[str, Tensor] = self.score(model, eligible, data, loss_fn)
        return found


@register("adversarial", alone=False)
@dataclass(frozen=True)
class Adversarial(_Perturbed):
    """A score on the worst inputs near those of each batch; see `retouch.perturb.Attack`.

    The attack costs `steps` + 1 forward and `steps` backward passes for each batch.

    Attributes:
        loss: What the score's gradients are of: "task", the loss at these inputs, or "kl", the
            divergence of the outputs from the clean ones.
        radius: See `Attack`, as all that follow.
        step: See there.
        steps: See there.
        noise: See there.
        aim: See there.
        bounds: See there.

    Raises:
        HyperparameterError: An unknown word, or a number out of its range.
    """

    loss: Literal["task", "kl"] = "task"
    radius: float = 0.031
    step: float = 0.007
    steps: int = 10
    noise: float = 1e-3
    aim: Literal["kl", "loss"] = "kl"
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("task", "kl"):
            raise HyperparameterError(f"Adversarial: loss={self.loss!r}; wanted task or kl")
        object.__setattr__(self, "bounds", self._attack.bounds)

    @property
    def _attack(self) -> Attack:
        return Attack(**{f.name: getattr(self, f.name) for f in fields(Attack)})

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        self._check(data)
        attack, number = self._attack, -1

        def attacked(model: nn.Module, batch: Any) -> Tensor:
            nonlocal number
            number += 1
            return attack.losses(
                model, self.at, lambda: loss_of(model, batch, loss_fn, number), self.loss
            )

        found: dict[str, Tensor] = self.score(model, eligible, data, attacked)
        if number < 0:
            raise ScoreError(
                f"{self.score!r} took no loss of the data, so there is nothing to attack"
            )
        return found


def domain_fisher(
    mean: float = 0.1, std: float = 0.1, *, eps: float = 1e-8, at: str | None = None
) -> Combined:
    """F + exp(-(mean + std)) |F - F'| / (min(F, F') + eps): how much a weight matters across domains.

    The domain-related Fisher information of FisherTune (arXiv 2503.17940), with F the mean of the
    squared gradients of batches, and F' that of `Shifted` inputs. The second part does not grow with
    F, so it decides where F is small. ``eps=1.0`` is the cheap form of the paper's variational
    estimate, Lambda = F + 1 / tau**2, with prior variance tau**2 = 1.

    Args:
        mean: See `Shifted`, as `std` and `at`.
        std: See there.
        eps: Keeps weights that do not matter from winning.
        at: See there.
    """
    plain = Fisher(level="batch", outer="mean")
    moved = Shifted(plain, at=at, mean=mean, std=std)
    return plain + math.exp(-(mean + std)) * abs(plain - moved) / (minimum(plain, moved) + eps)


def robust_gradient(
    alpha: float = 0.1, *, signed: bool = False, at: str | None = None, **attack: Any
) -> Combined:
    """What matters for both kinds of inputs: alpha * natural + (1 - alpha) * adversarial gradient.

    The robust gradient prominence of CURE (arXiv 2401.14948). In the paper both are magnitudes of
    gradients of the cross entropy; in the released code they are signed, and the adversarial one is
    of the divergence from the natural outputs.

    Args:
        alpha: Weight of the natural gradient.
        signed: As in the released code.
        at: See `Adversarial`.
        **attack: Further fields of `Adversarial`.
    """
    natural = GradStat() if signed else Gradient()
    loss: Literal["task", "kl"] = "kl" if signed else "task"
    adversarial = Adversarial(natural, at=at, **{"loss": loss} | attack)
    return alpha * natural + (1 - alpha) * adversarial
