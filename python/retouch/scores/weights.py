"""Scores of the weights alone, without data."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retouch import hub, ops
from retouch.deltasource import Source
from retouch.eligible import PLACE, Candidate, as_matrices, from_matrices
from retouch.errors import EngineError, HyperparameterError, ScoreError
from retouch.names import CUSTOM
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn
from retouch.scores.base import Score


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


@register("constant")
@dataclass(frozen=True)
class Constant(Score):
    """1 everywhere, so that a budget goes to the lowest positions: the first rows, for example."""

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        return {n: _filled(1.0, c) for n, c in eligible.items()}


@register("stripes", alone=False)
@dataclass(frozen=True)
class Stripes(Score):
    """1 in every n-th row or column and on the diagonal, else 0; for ``threshold=1``.

    Attributes:
        every: n; the first row or column is the first one taken.
        axis: "row" (output features) or "column" (input features).
        diagonal: Whether the diagonal is taken too.

    Raises:
        HyperparameterError: Another axis, or `every` below 1.
    """

    every: int
    axis: str = "row"
    diagonal: bool = True

    def __post_init__(self) -> None:
        if self.axis not in ("row", "column"):
            raise HyperparameterError(f"Stripes: axis={self.axis!r}; wanted row or column")
        if self.every < 1:
            raise HyperparameterError(f"Stripes: every={self.every}; wanted an integer >= 1")

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
        scores = {}
        for name, candidate in eligible.items():
            marks = torch.zeros(candidate.matrix, device=candidate.param.device)
            stripes = marks if self.axis == "row" else marks.transpose(1, 2)
            stripes[:, :: self.every] = 1.0
            if self.diagonal:
                marks.diagonal(dim1=1, dim2=2).fill_(1.0)
            scores[name] = from_matrices(marks, candidate)
        return scores


@register("lowrank", alone=False)
@dataclass(frozen=True)
class LowRankMagnitude(Score):
    """|weight| in the best approximation of its matrix of a given rank.

    LIFT (arXiv 2506.00772). The approximation is exact, W projected on its leading singular vectors;
    they are the eigenvectors of W'W or WW', whichever is smaller, in float64. The cost is cubic in
    the smaller side. The last bits may depend on the number of threads, as those of LAPACK do.

    Attributes:
        rank: The rank; the score is the magnitude itself where a side of the matrix is not larger.

    Raises:
        HyperparameterError: A rank below 1.
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise HyperparameterError(f"LowRankMagnitude: rank={self.rank}; wanted an integer >= 1")

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
            ScoreError: A weight is NaN or infinite.
        """
        scores = {}
        for name, candidate in eligible.items():
            low = [self._low(w).to(torch.float32).abs_() for w in _matrices(name, candidate)]
            scores[name] = from_matrices(torch.stack(low), candidate)
        return scores

    def _low(self, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        if self.rank >= min(rows, columns):
            return weight
        wide = weight if rows <= columns else weight.t()
        leading = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -self.rank :]
        low: Tensor = leading @ (leading.t() @ wide)
        return low if rows <= columns else low.t()


@register("condition")
@dataclass(frozen=True)
class ConditionNumber(Score):
    """Largest by smallest singular value, the same for all of a tensor; for granularity="tensor".

    KappaTune (arXiv 2506.16289). In float64; infinite where the smallest is 0; the mean over the
    experts of a fused tensor. Convolutions are matrices of [out, in * kernel]. The cost is cubic in
    the smaller side. A weight in 16 bits has the condition number of its rounded values.
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
            ScoreError: A weight is NaN or infinite.
        """
        scores = {}
        for name, candidate in eligible.items():
            numbers = []
            for weight in _matrices(name, candidate):
                values = torch.linalg.svdvals(weight)
                numbers.append(float(values[0] / values[-1]) if values[-1] > 0 else float("inf"))
            scores[name] = _filled(sum(numbers) / len(numbers), candidate)
        return scores


@register("difference")
@dataclass(frozen=True, repr=False)
class Difference(Score):
    """|weight - the weight of the same name in a reference|, computed in float32.

    The lottery tickets of LT-SFT (arXiv 2110.07560) and LoTA (arXiv 2406.16797): select on the base,
    with the model that was trained whole as the reference; nothing need be wound back.

    Attributes:
        reference: A model, a state dict, the path of a checkpoint or an id of the Hub; a config with
            the first two cannot be written to a file.
    """

    reference: Any = field(default=None)

    def __repr__(self) -> str:
        """Names a path, and of other references the type."""
        shown = repr(self.reference)
        if not isinstance(self.reference, str | os.PathLike | None):
            shown = type(self.reference).__name__
        return f"Difference({shown})"

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`.

        Raises:
            ScoreError: There is no reference, or it lacks a parameter, or has one of another shape.
            EngineError: The reference is none of what it may be.
        """
        if self.reference is None:
            raise ScoreError(
                "the score needs the model to compare with: "
                "score=retouch.scores.Difference(reference), a checkpoint, model or state dict"
            )
        path = isinstance(self.reference, str | os.PathLike)
        source = Source(hub.local(self.reference) if path else self.reference)
        scores = {}
        for name, candidate in eligible.items():
            found = next((alias for alias in candidate.aliases if alias in source), None)
            if found is None:
                raise ScoreError(f"the reference has no {name}")
            other = source.read[found]().detach()
            if tuple(other.shape) != candidate.shape:
                raise ScoreError(
                    f"{name} has shape {tuple(other.shape)} in the reference, {candidate.shape} here"
                )
            mine = candidate.param.detach()
            wide = ops.value_dtype(torch.promote_types(mine.dtype, other.dtype))
            change = mine.to(wide) - other.to(mine.device, wide)
            scores[name] = change.abs_().to(torch.float32)
        return scores

    def to_dict(self) -> Any:
        """JSON-able; see `Score.to_dict`."""
        if self.reference is None or isinstance(self.reference, str):
            return super().to_dict()
        if isinstance(self.reference, os.PathLike):
            return Difference(os.fspath(self.reference)).to_dict()
        return CUSTOM


@register("probe", alone=False)
@dataclass(frozen=True, repr=False)
class Probe(Score):
    """The cosine between each row of a weight and a direction among its input features.

    Model Surgery (arXiv 2407.08770), whose direction is the weight of a linear probe of hidden
    states; it takes the rows that point away from it, ``direction="bottom"``. In float64; 0 where a
    row is 0.

    Attributes:
        vector: The direction: a tensor or numbers, one for each input feature; kept as a tuple of
            floats, so that a config with it can be written to a file.

    Raises:
        HyperparameterError: It is not a row of finite numbers of which one is not 0.
    """

    vector: Any = None

    def __post_init__(self) -> None:
        if self.vector is None:
            return
        vector = torch.as_tensor(self.vector).detach().to("cpu", torch.float64)
        finite = vector.dim() == 1 and bool(torch.isfinite(vector).all())
        if not finite or not bool(vector.any()):
            raise HyperparameterError(
                f"Probe: a vector of shape {tuple(vector.shape)}; wanted finite numbers in one "
                "dimension, not all 0"
            )
        object.__setattr__(self, "vector", tuple(vector.tolist()))

    def __repr__(self) -> str:
        """Says how long the direction is."""
        return f"Probe({'no vector' if self.vector is None else f'{len(self.vector)} numbers'})"

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
            ScoreError: There is no vector, its length is not that of the rows, or a weight is NaN.
        """
        if self.vector is None:
            raise ScoreError(
                "the score needs a direction: score=retouch.scores.Probe(vector), for example the "
                "weight of a linear probe"
            )
        scores = {}
        for name, candidate in eligible.items():
            rows = _matrices(name, candidate)
            if rows.shape[2] != len(self.vector):
                raise ScoreError(
                    f"{name} has {rows.shape[2]} input features, the probe {len(self.vector)}: name "
                    "the layers that read what it was trained on in target_modules"
                )
            vector = torch.tensor(self.vector, dtype=torch.float64, device=rows.device)
            # sums of rows, which do not depend on threads
            norms = rows.square().sum(2).sqrt() * vector.square().sum().sqrt()
            cosines = (rows * vector).sum(2) / torch.where(norms > 0, norms, 1.0)
            scores[name] = from_matrices(
                cosines.to(torch.float32)[:, :, None].expand(candidate.matrix), candidate
            )
        return scores


@register("moved")
@dataclass(frozen=True)
class Moved(Score):
    """|weight - base| of a model in training: how far each weight has gone since it was wrapped.

    LT-SFT (arXiv 2110.07560), LoTA (2406.16797) and movement in general; for schedules.
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
            EngineError: The model is not wrapped.
        """
        engine: Any = model._modules.get(PLACE)
        if engine is None:
            raise EngineError(
                "the score 'moved' is the way from the base of a wrapped model: use it in a config "
                "with a schedule, or scores.Difference(reference)"
            )
        scores = {}
        for name, candidate in eligible.items():
            score = torch.zeros(candidate.shape, dtype=torch.float32, device=candidate.param.device)
            piece = engine.base_of(name)
            if piece is not None:
                wide = ops.value_dtype(candidate.param.dtype)
                now = piece.selection.take(candidate.param.detach()).to(wide)
                base = piece.values.view(piece.selection.value_shape).to(wide)
                piece.selection.scatter_(score, (now - base).abs_().to(torch.float32), name)
            scores[name] = score
        return scores


def _filled(value: float, candidate: Candidate) -> Tensor:
    """One number in a parameter's shape, without the memory."""
    number = torch.tensor(value, dtype=torch.float32, device=candidate.param.device)
    return number.expand(candidate.shape)


def _matrices(name: str, candidate: Candidate) -> Tensor:
    """The weights as float64 matrices, checked."""
    weight = as_matrices(candidate.param.detach(), candidate).to(torch.float64)
    if not bool(torch.isfinite(weight).all()):
        raise ScoreError(f"{name} holds a value that is not finite, so it has no singular values")
    return weight
