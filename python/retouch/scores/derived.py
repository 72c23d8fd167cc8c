"""Scores made of another score: of its hardest samples, its outliers, its rows and columns."""

import heapq
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.batches import Batches, single_samples, to_device
from retouch.collected import Collected
from retouch.eligible import as_matrices, from_matrices, own_parameters
from retouch.errors import HyperparameterError, ScoreError
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn, kept, loss_of
from retouch.scores.base import Score, as_score


@dataclass(frozen=True)
class _Derived(Score):
    """A score made of another.

    Attributes:
        score: The other.
    """

    score: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", as_score(self.score))

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether the other score reads any data."""
        return bool(self.score.needs_data)


@register("hard_examples", alone=False)
@dataclass(frozen=True)
class HardExamples(_Derived):
    """A score of the samples with the largest losses alone, in evaluation mode.

    The selection of FISH-DIP (arXiv 2311.03748). One forward pass for each sample of the data; those
    that are kept are in memory together. Equal losses go to the first.

    Attributes:
        samples: How many samples are kept.

    Raises:
        HyperparameterError: Fewer than one.
    """

    needs_data: ClassVar[bool] = True
    samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise HyperparameterError(f"HardExamples: samples={self.samples}; wanted 1 or more")

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`.

        Raises:
            ScoreError: No data, or a loss that is no finite number.
        """
        if data is None or isinstance(data, Collected):
            raise ScoreError(
                f"the score {self!r} needs data: pass data= (batches), and no collect in a schedule"
            )
        hardest: list[tuple[float, int, Any]] = []
        device = next((p.device for _, p in own_parameters(model)), torch.device("cpu"))
        number = 0
        with kept(model), torch.no_grad():
            model.eval()
            for batch in data if isinstance(data, Batches) else Batches(data):
                for sample in single_samples(to_device(batch, device)):
                    loss = float(loss_of(model, sample, loss_fn, number, slope=False))
                    heapq.heappush(hardest, (loss, -number, sample))
                    if len(hardest) > self.samples:
                        heapq.heappop(hardest)
                    number += 1
        chosen = [sample for _, _, sample in sorted(hardest, key=lambda one: -one[1])]
        found: dict[str, Tensor] = self.score(model, eligible, chosen, loss_fn)
        return found


@register("outliers", alone=False)
@dataclass(frozen=True)
class Outliers(_Derived):
    """1 where a score is more than `times` its mean over the layer, else 0.

    With ``granularity="layer"`` and the score `Wanda` its mean is the outlier ratio of a layer: OWL
    (arXiv 2310.05175), by which OwLore (arXiv 2405.18380) draws layers.

    Attributes:
        times: How far above the mean an outlier is.

    Raises:
        HyperparameterError: A number that is not above 0.
    """

    times: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.times > 0:
            raise HyperparameterError(f"Outliers: times={self.times}; wanted a number above 0")

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        scores: dict[str, Tensor] = self.score(model, eligible, data, loss_fn)
        layers: dict[str, list[str]] = {}
        for name, candidate in eligible.items():
            layers.setdefault(candidate.layer or name, []).append(name)
        for members in layers.values():
            count = sum(scores[n].numel() for n in members)
            mean = sum(ops.total(scores[n]) for n in members) / max(count, 1)
            if mean != mean:
                raise ScoreError(f"a score of {', '.join(members[:3])} is NaN")
            for name in members:
                scores[name] = (scores[name] > self.times * mean).to(torch.float32)
        return scores


@register("row_column", alone=False)
@dataclass(frozen=True)
class RowColumn(_Derived):
    """The largest score of the row times the largest of the column.

    What is left of a score where a matrix holds one number for each row and each column alone, as
    the accumulators of SM3 do: SpIEL-MA (arXiv 2401.16405).
    """

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`.

        Raises:
            HyperparameterError: A parameter is no matrix.
        """
        scores: dict[str, Tensor] = self.score(model, eligible, data, loss_fn)
        for name, candidate in eligible.items():
            matrices = as_matrices(scores[name], candidate)
            if matrices.numel():
                both = matrices.amax(2, keepdim=True) * matrices.amax(1, keepdim=True)
                scores[name] = from_matrices(both, candidate)
        return scores
