"""What the fields of a `SelectConfig` may be, each and together."""

import math
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any, Literal, get_args

from retouch.errors import HyperparameterError
from retouch.names import close_to, decoded_score, score_names

Granularity = Literal["element", "row", "column", "block", "tensor", "expert", "layer"]
Scope = Literal["global", "layer", "siblings", "tensor", "row", "group"]
Quota = Literal["size", "score"]
Direction = Literal["top", "bottom", "random", "weighted", "bernoulli"]
Polarity = Literal["train", "freeze"]
Ties = Literal["first", "all"]
Aggregate = Literal["mean", "sum", "l2", "abs_of_mean"]
State = Literal["masked", "full", "frozen"]
Kind = Literal[
    "linear", "expert", "conv", "embedding", "output", "head", "norm", "norm_bias", "bias", "other"
]

BUDGETS = ("density", "k", "threshold", "quantile", "k_per_row", "lora_rank")
FLAGS = ("heads", "output_embeddings", "embeddings", "norms", "norm_biases", "biases", "convs")
_WORDS: dict[str, tuple[str, ...]] = {
    "granularity": get_args(Granularity),
    "scope": get_args(Scope),
    "quota": get_args(Quota),
    "direction": get_args(Direction),
    "polarity": get_args(Polarity),
    "ties": get_args(Ties),
    "aggregate": get_args(Aggregate),
}
_WHOLE_NUMBERS = (
    "k", "k_per_row", "lora_rank", "block_size", "group_size", "samples", "max_batches",
)  # fmt: skip
# Which groups can have a budget of their own: a group holds many units, or there is no choice.
_SCOPES: dict[str, tuple[str, ...]] = {
    "element": ("global", "layer", "tensor", "row", "group"),
    "row": ("global", "layer", "tensor"),
    "column": ("global", "layer", "tensor"),
    "block": ("global", "layer", "tensor"),
    "tensor": ("global", "layer", "siblings"),
    "expert": ("global", "layer"),
    "layer": ("global",),
}


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config in their one form.

    Raises:
        HyperparameterError: A value that is wrong in itself, or fields that exclude each other.
    """
    config = SimpleNamespace(**values)
    for name, words in _WORDS.items():
        _check_word(name, getattr(config, name), words)
    for name in FLAGS:
        if getattr(config, name) is not None:
            _check_word(name, getattr(config, name), get_args(State))
    if config.decay is not None:
        _check_word("decay", config.decay, ("weight", "base"))
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        setattr(config, name, _names(name, getattr(config, name)))
    if config.target_modules == "all":
        config.target_modules = None
    for name in _WHOLE_NUMBERS:
        _check_int(name, getattr(config, name), 1)
    _check_int("seed", config.seed, 0)
    if config.layers is not None:
        config.layers = list(config.layers)
        for layer in config.layers:
            _check_int("layers", layer, 0)
    config.score = decoded_score(config.score)
    _check_counted(config)
    _check_numbers(config)
    _check_budget(config)
    _check_scope(config)
    _check_score(config)
    return vars(config)


def competes(config: Any) -> bool:
    """Whether any parameter could have the state "masked"."""
    return config.target_modules != [] or any(getattr(config, f) == "masked" for f in FLAGS)


def _wrong(what: str) -> HyperparameterError:
    return HyperparameterError(f"SelectConfig: {what}")


def _check_word(name: str, value: Any, words: Collection[str]) -> None:
    if value not in words:
        hint = close_to(value, words) if isinstance(value, str) else ""
        raise _wrong(f"{name}={value!r}; wanted one of {', '.join(words)}{hint}")


def _check_int(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(f"{name}={value!r}; wanted an integer >= {least}")


def _names(name: str, value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Iterable) or not all(isinstance(v, str) for v in value):
        raise _wrong(f"{name}={value!r}; wanted a list of names, a string or None")
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def _check_numbers(config: Any) -> None:
    for name in ("density", "threshold", "quantile", "allocation", "pull"):
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise _wrong(f"{name}={value!r}; wanted a number")
        setattr(config, name, float(value))
    for name in ("density", "allocation"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise _wrong(f"{name}={value!r}; wanted a fraction in (0, 1]")
    if config.pull is not None and not 0 < config.pull < 1:
        raise _wrong(f"pull={config.pull!r}; wanted a fraction in (0, 1)")
    if config.quantile is not None and not 0 <= config.quantile <= 1:
        raise _wrong(f"quantile={config.quantile!r}; wanted a fraction in [0, 1]")
    if config.threshold is not None and math.isnan(config.threshold):
        raise _wrong("threshold is NaN")


def _check_budget(config: Any) -> None:
    given = [name for name in BUDGETS if getattr(config, name) is not None]
    got = " and ".join(given) if given else "none"
    if config.direction == "bernoulli":
        if given:
            raise _wrong(
                f"direction='bernoulli' takes as many as the probabilities give, so no {got}: leave "
                "it out"
            )
    elif len(given) > 1 or (not given and competes(config)):
        raise _wrong(f"give exactly one of {', '.join(BUDGETS)}; got {got}")
    ranked = config.direction in ("top", "bottom")
    for name in ("threshold", "quantile", "allocation"):
        if getattr(config, name) is not None and not ranked:
            raise _wrong(
                f"direction={config.direction!r} ranks nothing, so no {name}: leave it out"
            )
    if config.allocation is not None and config.k_per_row is None:
        raise _wrong("allocation needs k_per_row")
    if config.ties == "all" and not (
        ranked and given and given[0] in ("density", "k", "lora_rank")
        and config.scope not in ("row", "group") and not config.counted_in_budget
    ):  # fmt: skip
        raise _wrong(
            "ties='all' needs density, k or lora_rank, direction top or bottom, a scope other than "
            "row and group, and counted_in_budget=False"
        )


def _check_scope(config: Any) -> None:
    if config.k_per_row is not None:
        if config.scope not in ("global", "row"):
            raise _wrong(f"k_per_row is a budget in each row, so scope={config.scope!r}")
        config.scope = "row"
    if config.lora_rank is not None:
        if config.scope not in ("global", "tensor") or config.granularity != "element":
            raise _wrong(
                "lora_rank is a budget of elements in each tensor, so "
                f"granularity={config.granularity!r} with scope={config.scope!r}"
            )
        config.scope = "tensor"
    for size, needs in (
        ("block_size", config.granularity == "block"), ("group_size", config.scope == "group"),
    ):  # fmt: skip
        if needs != (getattr(config, size) is not None):
            raise _wrong(
                f"{size}={getattr(config, size)} with granularity={config.granularity!r} and "
                f"scope={config.scope!r}; block_size is for granularity='block', group_size for "
                "scope='group'"
            )
    if config.scope not in _SCOPES[config.granularity]:
        raise _wrong(
            f"granularity={config.granularity!r} with scope={config.scope!r}; wanted a scope of "
            f"{', '.join(_SCOPES[config.granularity])}"
        )
    if config.scope != "global" and (
        config.threshold is not None or config.direction == "bernoulli"
    ):
        what = "a threshold" if config.threshold is not None else "direction='bernoulli'"
        raise _wrong(f"{what} is the same everywhere, so scope={config.scope!r}")
    if config.quota == "score" and (
        config.scope not in ("tensor", "layer") or config.direction != "top"
        or config.density is None or config.ties == "all"
    ):  # fmt: skip
        raise _wrong(
            "quota='score' shares a density among tensors or layers by their scores: set density=, "
            "scope='tensor' or 'layer', direction='top' and ties='first'"
        )
    if config.quantile is not None and config.scope in ("row", "group"):
        raise _wrong(f"quantile with scope={config.scope!r}; wanted global, layer or tensor")


def _check_score(config: Any) -> None:
    if config.direction == "random":
        if config.score is not None:
            raise _wrong("direction='random' asks for no score; leave it out")
    elif config.score is None and competes(config):
        raise _wrong(f"give a score ({', '.join(score_names())}) or direction='random'")


def _check_counted(config: Any) -> None:
    counted = config.counted_in_budget
    if isinstance(counted, bool):
        kinds: list[str] = []
    else:
        kinds = [counted] if isinstance(counted, str) else list(counted)
        config.counted_in_budget = kinds
    for kind in kinds:
        if kind not in get_args(Kind):
            raise _wrong(
                f"counted_in_budget={counted!r}; wanted True, False or kinds of "
                f"{', '.join(get_args(Kind))}{close_to(str(kind), get_args(Kind))}"
            )
    if (counted is True or kinds) and (
        config.granularity != "element" or config.scope != "global"
        or config.polarity == "freeze" or (config.density is None and config.k is None)
    ):  # fmt: skip
        raise _wrong(
            "counted_in_budget needs density or k, granularity='element', scope='global' and "
            "polarity='train'"
        )
