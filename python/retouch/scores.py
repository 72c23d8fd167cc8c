"""Scores: how much each coordinate matters, as one float32 tensor per parameter.

A score is anything that can be called as ``score(model, eligible, data, loss_fn)`` and returns a
tensor of the parameter's shape for each name in `eligible` (a mapping of names to
`retouch.eligible.Candidate`). The classes here can also be added, subtracted, multiplied, divided
and raised to a power, with each other, with functions and with numbers:

    >>> scores.Gradient() / (scores.Magnitude() + 1e-8) ** 0.5

`register` gives a function or class of yours a name that configs and files may use.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.batches import Batches, single_samples, to_device
from retouch.config import CUSTOM, name_of_score, score_named, score_names
from retouch.config import register_score as register
from retouch.eligible import own_parameters
from retouch.errors import HyperparameterError, ScoreError
from retouch.passes import Eligible, LossFn, gradients, loss_of

__all__ = [
    "Combined",
    "Fisher",
    "GradStat",
    "Gradient",
    "Magnitude",
    "Random",
    "Score",
    "Sensitivity",
    "as_score",
    "register",
    "score_names",
]

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
}


class Score(ABC):
    """Base of the scores of this package; `as_score` makes one of any function.

    Attributes:
        needs_data: Whether it reads any data.
    """

    needs_data: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """Scores the eligible parameters and leaves the model as it was.

        Args:
            model: The model.
            eligible: What is to be scored.
            data: Batches, see `retouch.batches.Batches`; None for scores that need no data.
            loss_fn: ``loss_fn(model, batch)``; default ``model(**batch).loss``.

        Returns:
            Float32 tensors of the parameters' shapes, larger = more important.
        """

    def to_dict(self) -> Any:
        """JSON-able: ``name`` and the fields, which `SelectConfig` reads back."""
        name = name_of_score(type(self))
        if name is None:
            return CUSTOM
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return {"name": name} | values

    def __add__(self, other: Any) -> "Combined":
        return Combined("+", self, other)

    def __radd__(self, other: Any) -> "Combined":
        return Combined("+", other, self)

    def __sub__(self, other: Any) -> "Combined":
        return Combined("-", self, other)

    def __rsub__(self, other: Any) -> "Combined":
        return Combined("-", other, self)

    def __mul__(self, other: Any) -> "Combined":
        return Combined("*", self, other)

    def __rmul__(self, other: Any) -> "Combined":
        return Combined("*", other, self)

    def __truediv__(self, other: Any) -> "Combined":
        return Combined("/", self, other)

    def __rtruediv__(self, other: Any) -> "Combined":
        return Combined("/", other, self)

    def __pow__(self, other: Any) -> "Combined":
        return Combined("**", self, other)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Score) else value


@register("gradstat")
@dataclass(frozen=True)
class GradStat(Score):
    """A statistic of gradients: ``post(outer over units(map(gradient of the unit's loss)))``.

    It covers most published gradient scores. What is accumulated in which order matters: per-sample
    gradients +1 and -1 give 2 by ``Fisher()`` and 0 by the square of their sum.

    While it is computed, each gradient is added to its score and freed before the next exists, so
    the peak is the scores and one gradient. Sums of more than one backward pass are in float32.

    Attributes:
        level: A unit is a "sample" (each has its own loss, so the batch size does not matter) or a
            "batch".
        map: Of each gradient: "id", "abs" or "square".
        outer: "sum" or "mean" over the units, or "cumulative": the sum of all running sums, which
            code computes that never zeroes `.grad`; the first of T units counts T times.
        post: Of the result: "id", "abs" or "sqrt".
        training: Score in training mode (dropout, batch statistics) instead of evaluation mode.
            Buffers are put back.

    Raises:
        HyperparameterError: A value that is none of these.
    """

    needs_data: ClassVar[bool] = True
    level: Literal["sample", "batch"] = "batch"
    map: Literal["id", "abs", "square"] = "id"
    outer: Literal["sum", "mean", "cumulative"] = "sum"
    post: Literal["id", "abs", "sqrt"] = "id"
    training: bool = False

    def __post_init__(self) -> None:
        for name, words in (
            ("level", ("sample", "batch")), ("map", ("id", "abs", "square")),
            ("outer", ("sum", "mean", "cumulative")), ("post", ("id", "abs", "sqrt")),
        ):  # fmt: skip
            if getattr(self, name) not in words:
                raise HyperparameterError(
                    f"{type(self).__name__}: {name}={getattr(self, name)!r}; wanted one of "
                    f"{', '.join(words)}"
                )

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`.

        Raises:
            ScoreError: No data, or a loss that is missing, no scalar, NaN or infinite.
            EngineError: The model is wrapped: its gradients go elsewhere.
        """
        if data is None:
            raise ScoreError(f"the score {self!r} needs data: pass data= (batches with labels)")
        sums = {
            name: torch.zeros_like(
                c.param, dtype=torch.float32, memory_format=torch.contiguous_format
            )
            for name, c in eligible.items()
        }
        running = {n: torch.zeros_like(t) for n, t in sums.items()} if self._cumulative else sums
        reached: set[str] = set()

        def take(name: str, gradient: Tensor) -> None:
            reached.add(name)
            ops.accumulate_(running[name], gradient, name, map=self.map)

        units = 0
        with gradients(model, eligible, take, self.training):
            device = next((p.device for _, p in own_parameters(model)), torch.device("cpu"))
            for number, batch in enumerate(data if isinstance(data, Batches) else Batches(data)):
                batch = to_device(batch, device)
                for unit in single_samples(batch) if self.level == "sample" else (batch,):
                    loss_of(model, unit, loss_fn, number).backward()
                    units += 1
                    if self._cumulative:
                        for name, total in sums.items():
                            ops.accumulate_(total, running[name], name)
        if units == 0:
            raise ScoreError(
                "the data hold no batch (an iterator can be read only once: pass a list or a "
                "DataLoader)"
            )
        _report_unreached(sums.keys() - reached)
        for total in sums.values():
            if self.outer == "mean":
                total.div_(units)
            if self.post == "abs":
                total.abs_()
            elif self.post == "sqrt":
                total.sqrt_()
        return sums

    @property
    def _cumulative(self) -> bool:
        return self.outer == "cumulative"


@register("gradient")
@dataclass(frozen=True)
class Gradient(GradStat):
    """|sum of the gradients of the batches|, as in GPS (arXiv 2312.10136)."""

    post: Literal["id", "abs", "sqrt"] = "abs"


@register("fisher")
@dataclass(frozen=True)
class Fisher(GradStat):
    """Diagonal of the empirical Fisher information: the sum of squared per-sample gradients.

    FISH Mask (arXiv 2111.09839). ``Fisher(level="batch")`` squares the gradients of batches, which is
    cheaper and another quantity.
    """

    level: Literal["sample", "batch"] = "sample"
    map: Literal["id", "abs", "square"] = "square"


@register("sensitivity")
@dataclass(frozen=True)
class Sensitivity(GradStat):
    """|gradient * weight|: the change of the loss if a weight were removed, to first order.

    SNIP (arXiv 1810.02340). The statistic of the gradient is that of `Gradient`.
    """

    post: Literal["id", "abs", "sqrt"] = "abs"

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `GradStat`."""
        sums = super().__call__(model, eligible, data, loss_fn)
        for name, total in sums.items():
            total.mul_(eligible[name].param.detach().abs().to(total.dtype))
        return sums


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


@register("combined", alone=False)
@dataclass(frozen=True)
class Combined(Score):
    """Two scores, or a score and a number, put together elementwise by ``+ - * / **``.

    Attributes:
        op: The operation.
        left: A score or a number.
        right: A score or a number.
    """

    op: str
    left: Any
    right: Any

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether either side reads any data."""
        return any(isinstance(s, Score) and s.needs_data for s in (self.left, self.right))

    def __post_init__(self) -> None:
        if self.op not in _OPERATIONS:
            raise HyperparameterError(
                f"Combined: op={self.op!r}; wanted one of {', '.join(_OPERATIONS)}"
            )
        for side in ("left", "right"):
            value = getattr(self, side)
            if isinstance(value, bool) or not isinstance(value, int | float):
                object.__setattr__(self, side, as_score(value))

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`; data are read once for each side that needs them."""
        sides = []
        for side in (self.left, self.right):
            if isinstance(side, Score):
                sides.append(side(model, eligible, data, loss_fn))
            else:
                sides.append(dict.fromkeys(eligible, side))
        combine = _OPERATIONS[self.op]
        return {n: combine(sides[0].pop(n), sides[1].pop(n)) for n in eligible}


@dataclass(frozen=True)
class _Function(Score):
    """A function of the user as a score, with its results checked."""

    function: Callable[..., Any]

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        found = self.function(model, eligible, data, loss_fn)
        name = getattr(self.function, "__name__", repr(self.function))
        if not isinstance(found, Mapping):
            raise ScoreError(f"{name} returned a {type(found).__name__}; wanted a dict of tensors")
        scores: dict[str, Tensor] = {}
        for key, candidate in eligible.items():
            score = found.get(key)
            if not isinstance(score, Tensor) or not score.dtype.is_floating_point:
                got = score.dtype if isinstance(score, Tensor) else type(score).__name__
                raise ScoreError(f"{name} gave {got} for {key}; wanted a floating-point tensor")
            if tuple(score.shape) != candidate.shape:
                raise ScoreError(
                    f"{name} gave {key} a score of shape {tuple(score.shape)}; wanted "
                    f"{candidate.shape}"
                )
            scores[key] = score.detach().to(torch.float32)
        return scores

    def to_dict(self) -> Any:
        return CUSTOM


def as_score(score: Any, seed: int = 0) -> Score:
    """The score that a config or a user means.

    Args:
        score: A `Score`, a class of scores, a registered name, or a function
            ``(model, eligible, data, loss_fn) -> {name: tensor}``.
        seed: For the name "random".

    Raises:
        ScoreError: A function that was written to a file, where only its name is.
        HyperparameterError: None of these.
    """
    if isinstance(score, Score):
        return score
    if score == "random":
        return Random(seed)
    if isinstance(score, str):
        if score == CUSTOM:
            raise ScoreError(
                "the config was saved with a function of the user as its score, which a file cannot "
                "hold: pass score=, or give the function a name with retouch.scores.register"
            )
        entry = score_named(score)
        if entry is not None:
            return as_score(entry, seed)
    if isinstance(score, type) and issubclass(score, Score):
        return score()
    if callable(score) and not isinstance(score, type):
        return _Function(score)
    raise HyperparameterError(f"{score!r} is no score; wanted a name, a Score or a function")


def _report_unreached(names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        warnings.warn(
            f"no gradient reached {len(names)} of the eligible parameters, whose score is 0: {shown}",
            stacklevel=3,
        )
