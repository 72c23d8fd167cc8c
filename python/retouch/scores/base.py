"""What all scores have in common: calling, arithmetic, and what a config may name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retouch.errors import HyperparameterError, ScoreError
from retouch.made import Made
from retouch.names import CUSTOM, name_of_score, score_named
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
    # both give NaN where either side is NaN
    "min": lambda a, b: torch.minimum(*_tensors(a, b)),
    "max": lambda a, b: torch.maximum(*_tensors(a, b)),
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

    def made(self, eligible: Eligible, data: Any) -> Made | None:
        """The scores as what a kernel can make while it ranks them.

        Args:
            eligible: What is to be scored.
            data: As for a call; mostly `retouch.collected.Collected`.

        Returns:
            What ranks as the scores of a call do; None, the default, where only a call gives them.
        """
        return None

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

    def __abs__(self) -> "Combined":
        return maximum(self, 0.0 - self)


def minimum(left: Any, right: Any) -> "Combined":
    """The smaller of two scores, or of a score and a number, elementwise."""
    return Combined("min", left, right)


def maximum(left: Any, right: Any) -> "Combined":
    """The larger of two scores, or of a score and a number, elementwise."""
    return Combined("max", left, right)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Score) else value


@register("combined", alone=False)
@dataclass(frozen=True)
class Combined(Score):
    """Two scores, or a score and a number, put together elementwise by ``+ - * / ** min max``.

    Equal scores anywhere in an expression are one, which is computed once. All scores of an
    expression are in memory together; what is made of them is so for one parameter at a time.

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
        """See `Score`; data are read once for each different score that needs them."""
        found: list[tuple[Score, dict[str, Tensor]]] = []
        for part in self._parts():
            if not any(_same(part, known) for known, _ in found):
                found.append((part, part(model, eligible, data, loss_fn)))
        scores = {}
        for name in eligible:
            values = [(part, tensors.pop(name)) for part, tensors in found]
            scores[name] = self._value(values)
        return scores

    def _parts(self) -> Iterator[Score]:
        """The scores that the expression is made of, as often as they occur."""
        for side in (self.left, self.right):
            if isinstance(side, Combined):
                yield from side._parts()
            elif isinstance(side, Score):
                yield side

    def _value(self, values: Sequence[tuple[Score, Tensor]]) -> Any:
        """The expression for one parameter."""
        sides: list[Any] = []
        for side in (self.left, self.right):
            if isinstance(side, Combined):
                sides.append(side._value(values))
            elif isinstance(side, Score):
                sides.append(next(tensor for part, tensor in values if _same(part, side)))
            else:
                sides.append(side)
        return _OPERATIONS[self.op](*sides)


def _same(a: Score, b: Score) -> bool:
    try:
        return a is b or a == b
    except RuntimeError:  # fields that hold tensors, which are not known to be equal
        return False


def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors; a number takes the dtype and device of the other side."""
    like = a if isinstance(a, Tensor) else b
    left, right = (x if isinstance(x, Tensor) else like.new_tensor(x) for x in (a, b))
    return left, right


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
    if isinstance(score, str):
        if score == CUSTOM:
            raise ScoreError(
                "the config was saved with a function of the user as its score, which a file cannot "
                "hold: pass score=, or give the function a name with retouch.scores.register"
            )
        entry = score_named(score)
        if entry is not None:
            return as_score(entry(seed) if score == "random" else entry)
    if isinstance(score, type) and issubclass(score, Score):
        return score()
    if callable(score) and not isinstance(score, type):
        return _Function(score)
    raise HyperparameterError(f"{score!r} is no score; wanted a name, a Score or a function")
