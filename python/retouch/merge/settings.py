"""Parameters with filters and gradients become one value for one tensor."""

from collections.abc import Iterable
from typing import Any

from retouch.errors import HyperparameterError
from retouch.merge.base import Method, Param
from retouch.merge.document import MergeConfig, Scalar, Setting, Settings
from retouch.names import close_to

__all__ = ["check_names", "evaluate", "lookup"]

_YES, _NO = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")

# mergekit's own: of other methods, of older versions, and `int8_mask`, which changes no result
_KNOWN = frozenset(
    ["alpha", "density", "embed_slerp", "eps", "epsilon", "filter_wise", "gamma", "int8_mask",
     "lambda", "max_iter", "normalize", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise",
     "r", "rescale", "scale", "select_topk", "t", "tol", "weight"]
)  # fmt: skip


def evaluate(setting: Setting, tensor: str, t: float, kind: type, where: str) -> Any:
    """The value of a setting for one tensor.

    Args:
        setting: Rules; the first whose filter is part of `tensor` decides.
        tensor: Name of the tensor.
        t: Where its layer stands in its slice, from 0 to 1.
        kind: `float`, `int`, `bool` or `str`. Numbers of a gradient are interpolated; of words and
            booleans one is picked.
        where: The parameter, for messages.

    Returns:
        The value, or None if no rule is for the tensor.

    Raises:
        HyperparameterError: A value is of another kind.
    """
    rule = next((rule for rule in setting if rule.matches(tensor)), None)
    if rule is None or not rule.values:
        return None
    values = [_as_kind(value, kind, where) for value in rule.values]
    last = len(values) - 1
    if kind not in (int, float):
        return values[int(t * last)]
    position = t * last
    left = int(position)
    share = position - left
    return _as_kind((1 - share) * values[left] + share * values[min(last, left + 1)], kind, where)


def lookup(blocks: Iterable[Settings], name: str, tensor: str, t: float, param: Param) -> Any:
    """The value of a parameter from the first block that has one for this tensor, or None."""
    for block in blocks:
        if name in block:
            value = evaluate(block[name], tensor, t, param.kind, name)
            if value is not None:
                return value
    return None


def check_names(config: MergeConfig, method: Method) -> list[str]:
    """Whether every parameter is one that exists.

    Args:
        config: The configuration.
        method: Its method.

    Returns:
        What has no effect although it is well spelt.

    Raises:
        HyperparameterError: A parameter is none of this method nor of any other.
    """
    own = [*method.per_model, *method.shared]
    notes = []
    for place, block in config.settings():
        for name in block:
            if name in own:
                if name in method.shared and " of " in place:
                    notes.append(
                        f"{name} in the {place} has no effect: all models share it; "
                        "write it under the top-level parameters"
                    )
            elif name in _KNOWN:
                if name != "int8_mask":
                    notes.append(f"{name} in {place} has no effect: {method.name} has none")
            else:
                hint = close_to(name, own) or close_to(name, _KNOWN)
                raise HyperparameterError(
                    f"{place}: {method.name} has no parameter {name!r}"
                    f"{hint or '; it has ' + (', '.join(own) or 'none')}"
                )
    return list(dict.fromkeys(notes))


def _as_kind(value: Scalar, kind: type, where: str) -> Any:
    try:
        if kind is bool:
            word = str(value).lower().removesuffix(".0")
            if word in _YES or word in _NO:
                return word in _YES
        elif kind is int:
            if float(value) == int(float(value)):
                return int(float(value))
        elif kind is float:
            return float(value)
        elif isinstance(value, kind):
            return value
    except (ValueError, OverflowError):
        pass
    raise HyperparameterError(f"{where}: got {value!r}, wanted a {kind.__name__}")
