"""The names that scores are registered under, for configs, files and the command line."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from retouch.errors import HyperparameterError

__all__ = [
    "CUSTOM",
    "close_to",
    "decoded_score",
    "encoded_score",
    "name_of_score",
    "register_score",
    "score_named",
    "score_names",
]

CUSTOM = "custom"  # in the place of a function, which cannot be written down

_scores: dict[str, Callable[..., Any]] = {}
_not_alone: set[str] = set()  # names of scores that need arguments
Registered = TypeVar("Registered", bound=Callable[..., Any])


def close_to(word: str, words: Iterable[str]) -> str:
    """A hint for a misspelt word: ``; did you mean 'fisher'?``, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def register_score(name: str, *, alone: bool = True) -> Callable[[Registered], Registered]:
    """Gives a score a name that configs, files and the command line may use.

    Args:
        name: The name.
        alone: Whether the name is enough; else it is for dicts of name and arguments.

    Returns:
        A decorator for a `Score` class, or for a function
        ``(model, eligible, data, loss_fn) -> {name: tensor}``.

    Raises:
        HyperparameterError: The name is taken by another score.
    """

    def register(score: Registered) -> Registered:
        if _scores.get(name, score) is not score:
            raise HyperparameterError(f"the score name {name!r} is taken by {_scores[name]!r}")
        _scores[name] = score
        if not alone:
            _not_alone.add(name)
        return score

    return register


def score_names() -> list[str]:
    """The names that stand for a score."""
    return sorted(_scores.keys() - _not_alone)


def name_of_score(score: Any) -> str | None:
    """The name that a class or function is registered under."""
    return next((name for name, entry in _scores.items() if entry is score), None)


def score_named(name: str) -> Callable[..., Any] | None:
    """What is registered under the name of a score."""
    return _scores.get(name)


def encoded_score(score: Any) -> Any:
    """A score as JSON-able values: its name, its fields, or `CUSTOM` for a function."""
    if score is None or isinstance(score, str):
        return score
    name = name_of_score(score)
    if name is not None:
        return name
    return score.to_dict() if hasattr(score, "to_dict") else CUSTOM


def decoded_score(score: Any) -> Any:
    """The score that a config may hold: a known name, an object, or a function."""
    if isinstance(score, dict):
        given = dict(score)
        name = given.pop("name", None)
        make = score_named(name)
        if make is None:
            raise _unknown_score(name)
        try:
            return make(**{key: _decoded_part(value) for key, value in given.items()})
        except TypeError as error:
            raise HyperparameterError(f"SelectConfig: score={score!r}: {error}") from error
    if isinstance(score, str):
        if score != CUSTOM and score not in score_names():
            raise _unknown_score(score)
    elif score is not None and not callable(score):
        raise HyperparameterError(
            f"SelectConfig: score={score!r}; wanted a name, a score or a function"
        )
    return score


def _decoded_part(value: Any) -> Any:
    return decoded_score(value) if isinstance(value, dict) else value


def _unknown_score(name: Any) -> HyperparameterError:
    return HyperparameterError(
        f"SelectConfig: no score is named {name!r}{close_to(str(name), score_names())}; "
        f"scores: {', '.join(score_names())}"
    )
