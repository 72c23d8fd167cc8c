"""`SelectConfig`: what to select, as plain data, and the names that it may use.

Scores register their names in `retouch.names` and recipes here (`register_preset`), so that a config
can be checked when it is made and written to JSON without knowing their modules.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from retouch.errors import FormatError, HyperparameterError
from retouch.names import CUSTOM, close_to, name_of_score, score_named, score_names
from retouch.schedules import Schedule

__all__ = [
    "SelectConfig",
    "preset_names",
    "register_preset",
    "resolve",
]

FILE = "retouch_config.json"

Granularity = Literal["element", "row", "column", "block", "tensor", "layer"]
Scope = Literal["global", "layer", "tensor", "row", "group"]
Direction = Literal["top", "bottom", "random"]
Aggregate = Literal["mean", "sum", "l2", "abs_of_mean"]
State = Literal["masked", "full", "frozen"]
Kind = Literal[
    "linear", "expert", "conv", "embedding", "output", "head", "norm", "norm_bias", "bias", "other"
]

ALL_LINEAR = "all-linear"
BUDGETS = ("density", "k", "threshold", "k_per_row", "lora_rank")
FLAGS = ("heads", "output_embeddings", "embeddings", "norms", "norm_biases", "biases", "convs")
_WORDS: dict[str, tuple[str, ...]] = {
    "granularity": get_args(Granularity),
    "scope": get_args(Scope),
    "direction": get_args(Direction),
    "aggregate": get_args(Aggregate),
}
# Which groups can have a budget of their own: a group holds many units, or there is no choice.
_SCOPES: dict[str, tuple[str, ...]] = {
    "element": ("global", "layer", "tensor", "row", "group"),
    "row": ("global", "layer", "tensor"),
    "column": ("global", "layer", "tensor"),
    "block": ("global", "layer", "tensor"),
    "tensor": ("global", "layer"),
    "layer": ("global",),
}

_presets: dict[str, dict[str, Any]] = {}


def register_preset(name: str, **values: Any) -> None:
    """Gives a set of config fields a name that `resolve` knows."""
    SelectConfig(**values)  # a mistake shows here
    _presets[name] = values


def preset_names() -> list[str]:
    """The names of the registered recipes."""
    return sorted(_presets)


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SelectConfig:
    """Which coordinates of a model may move.

    A budget counts units of the `granularity`, over all parameters that compete (state
    ``"masked"``): ``density=0.01, granularity="row"`` selects one row in a hundred. The number is
    ``floor(density * units)``, with the decimal digits of the density taken as they are written.
    Exactly one of `density`, `k`, `threshold`, `k_per_row` and `lora_rank` is needed, unless nothing
    competes.

    Row = output feature and column = input feature, in whatever order a module stores them.

    Raises:
        HyperparameterError: A value that is wrong in itself, or fields that exclude each other.

    Example:
        >>> SelectConfig(score="fisher", density=0.005, heads="full")
    """

    score: Callable[..., Any] | str | dict[str, Any] | None = _help(
        "What ranks the coordinates: the name of a score, a score object, or a function. Not "
        "needed for direction='random'."
    )
    density: float | None = _help("Fraction to select, in (0, 1].")
    k: int | None = _help("How many to select (in each group of the scope).")
    threshold: float | None = _help(
        "Select all scores >= this (direction 'top') or <= this ('bottom')."
    )
    k_per_row: int | None = _help("How many elements to select in each row; sets scope='row'.")
    lora_rank: int | None = _help(
        "As many elements in each tensor as a LoRA of this rank has: rank * (rows + columns), at "
        "most all; sets scope='tensor'."
    )
    allocation: float | None = _help(
        "With k_per_row, which then is the least: of the best elements of all together, this "
        "fraction, each tensor has its hits; its rows get k_per_row * hits / the fewest hits, "
        "rounded, at most all."
    )
    granularity: Granularity = _help(
        "The unit that is selected whole: element, row (output feature), column (input feature), "
        "block (a square of a matrix), tensor or layer.",
        "element",
    )
    block_size: int | None = _help(
        "Rows and columns of a block; those at the edges of a matrix may be smaller."
    )
    scope: Scope = _help(
        "Where the budget holds: over all parameters together, or in each layer, tensor, row or "
        "group of a row. A parameter outside of any layer counts as a layer.",
        "global",
    )
    group_size: int | None = _help(
        "How many consecutive elements of a row are a group: k=2, scope='group', group_size=4 "
        "selects 2 of every 4."
    )
    direction: Direction = _help("Take the top or the bottom scores, or any at random.", "top")
    aggregate: Aggregate = _help(
        "How the scores of elements make the score of a larger unit: mean, sum, l2 norm, or "
        "abs_of_mean, the magnitude of the mean of signed scores.",
        "mean",
    )
    target_modules: list[str] | str | None = _help(
        "What competes for the budget. 'all-linear': all linear weights (also Conv1D and fused "
        "experts) but heads. A list of names or endings of names of modules or parameters. A "
        "string: a regular expression for the whole name. None or 'all': every parameter. A "
        "module stands for its weights without biases, a block for the linear and convolution "
        "weights in it.",
        ALL_LINEAR,
    )
    exclude_modules: list[str] | str | None = _help(
        "Modules or parameters that are frozen whatever else is said, named like target_modules."
    )
    modules_to_save: list[str] | str | None = _help(
        "Modules or parameters that are trained whole, named like target_modules."
    )
    layers: list[int] | None = _help(
        "Only these layers take part (positions in the model's list of layers). Parameters outside "
        "of any layer are not concerned."
    )
    heads: State | None = _help(
        "Task heads (what a Hugging Face model adds to its base; the last Linear of other models): "
        "masked (they compete), full (trained whole) or frozen. Default: as target_modules says."
    )
    output_embeddings: State | None = _help(
        "The output embedding of a language model, where it is not tied to the input embedding. "
        "Default: as heads."
    )
    embeddings: State | None = _help(
        "Embedding tables, also those that are tied to an output. Default: as target_modules says."
    )
    norms: State | None = _help("Normalisation layers. Default: as target_modules says.")
    norm_biases: State | None = _help("Biases of normalisation layers. Default: as norms.")
    biases: State | None = _help("All other biases. Default: as target_modules says.")
    convs: State | None = _help("Convolution weights. Default: as target_modules says.")
    counted_in_budget: list[str] | bool | str = _help(
        "Whether the fully trained parameters use up the budget: yes, no, or a list of kinds that "
        "do (head, output, embedding, norm, norm_bias, bias, conv, linear, expert, other). Needs a "
        "global budget of elements.",
        False,
    )
    samples: int | None = _help("At most this many samples of the data are scored on.")
    max_batches: int | None = _help("At most this many batches of the data are scored on.")
    seed: int = _help("Of random masks, and of shuffling and dropout while scoring.", 0)
    schedule: Schedule | None = _help(
        "When the mask changes during training, see `Schedule`; None: it stays. `retouch.wrap` and "
        "the Trainer follow it, `retouch.select` makes one mask."
    )
    recipe: str | None = _help("The recipe that this config came from, for the record.")

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            self._check_word(name, words)
        for name in FLAGS:
            if getattr(self, name) is not None:
                self._check_word(name, get_args(State))
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if self.target_modules == "all":
            object.__setattr__(self, "target_modules", None)
        for name in (
            "k", "k_per_row", "lora_rank", "block_size", "group_size", "samples", "max_batches",
        ):  # fmt: skip
            _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, 0)
        if self.layers is not None:
            object.__setattr__(self, "layers", list(self.layers))
            for layer in self.layers:
                _check_int("layers", layer, 0)
        object.__setattr__(self, "score", _decoded(self.score))
        if isinstance(self.schedule, Mapping):
            object.__setattr__(self, "schedule", Schedule.from_dict(self.schedule))
        elif not isinstance(self.schedule, Schedule | None):
            raise self._wrong(f"schedule={self.schedule!r}; wanted a Schedule")
        self._check_counted()
        self._check_budget()
        self._check_score()

    def _wrong(self, what: str) -> HyperparameterError:
        return HyperparameterError(f"SelectConfig: {what}")

    def _check_word(self, name: str, words: Collection[str]) -> None:
        value = getattr(self, name)
        if value not in words:
            hint = close_to(value, words) if isinstance(value, str) else ""
            raise self._wrong(f"{name}={value!r}; wanted one of {', '.join(words)}{hint}")

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1 or (not given and self.anything_competes()):
            got = " and ".join(given) if given else "none"
            raise self._wrong(f"give exactly one of {', '.join(BUDGETS)}; got {got}")
        for name in ("density", "threshold", "allocation"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not hasattr(value, "__float__"):
                raise self._wrong(f"{name}={value!r}; wanted a number")
            object.__setattr__(self, name, float(value))
        for name in ("density", "allocation"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise self._wrong(f"{name}={value!r}; wanted a fraction in (0, 1]")
        if self.threshold is not None and math.isnan(self.threshold):
            raise self._wrong("threshold is NaN")
        if self.k_per_row is not None:
            if self.scope not in ("global", "row"):
                raise self._wrong(f"k_per_row is a budget in each row, so scope={self.scope!r}")
            object.__setattr__(self, "scope", "row")
        if self.lora_rank is not None:
            if self.scope not in ("global", "tensor") or self.granularity != "element":
                raise self._wrong(
                    "lora_rank is a budget of elements in each tensor, so "
                    f"granularity={self.granularity!r} with scope={self.scope!r}"
                )
            object.__setattr__(self, "scope", "tensor")
        for size, needs in (
            ("block_size", self.granularity == "block"), ("group_size", self.scope == "group"),
        ):  # fmt: skip
            if needs != (getattr(self, size) is not None):
                raise self._wrong(
                    f"{size}={getattr(self, size)} with granularity={self.granularity!r} and "
                    f"scope={self.scope!r}; block_size is for granularity='block', group_size for "
                    "scope='group'"
                )
        if self.allocation is not None and (self.k_per_row is None or self.direction == "random"):
            raise self._wrong("allocation needs k_per_row, and a direction other than random")
        if self.scope not in _SCOPES[self.granularity]:
            raise self._wrong(
                f"granularity={self.granularity!r} with scope={self.scope!r}; wanted a scope of "
                f"{', '.join(_SCOPES[self.granularity])}"
            )
        if self.threshold is not None and self.scope != "global":
            raise self._wrong(f"a threshold is the same everywhere, so scope={self.scope!r}")

    def _check_score(self) -> None:
        if self.direction == "random":
            if self.score is not None or self.threshold is not None:
                what = "score" if self.score is not None else "threshold"
                raise self._wrong(f"direction='random' asks for no {what}; leave it out")
        elif self.score is None and self.anything_competes():
            raise self._wrong(f"give a score ({', '.join(score_names())}) or direction='random'")

    def _check_counted(self) -> None:
        counted = self.counted_in_budget
        if isinstance(counted, bool):
            kinds: list[str] = []
        else:
            kinds = [counted] if isinstance(counted, str) else list(counted)
            object.__setattr__(self, "counted_in_budget", kinds)
        for kind in kinds:
            if kind not in get_args(Kind):
                raise self._wrong(
                    f"counted_in_budget={counted!r}; wanted True, False or kinds of "
                    f"{', '.join(get_args(Kind))}{close_to(str(kind), get_args(Kind))}"
                )
        if (counted is True or kinds) and (
            self.granularity != "element" or self.scope != "global" or self.threshold is not None
        ):
            raise self._wrong(
                "counted_in_budget needs density or k, granularity='element' and scope='global'"
            )

    def anything_competes(self) -> bool:
        """Whether any parameter could have the state "masked"."""
        return self.target_modules != [] or any(getattr(self, f) == "masked" for f in FLAGS)

    def counts(self, kind: str) -> bool:
        """Whether fully trained parameters of a kind use up the budget."""
        counted = self.counted_in_budget
        return counted if isinstance(counted, bool) else kind in counted

    @classmethod
    def named(cls, name: str, **overrides: Any) -> "SelectConfig":
        """The config of a recipe, or of a score, with some fields replaced.

        Args:
            name: See `retouch.recipes.list()`.
            **overrides: Fields; a budget replaces any other budget, and a dict for `schedule`
                replaces fields of the recipe's own.

        Raises:
            HyperparameterError: An unknown name, or fields that do not fit together.

        Example:
            >>> SelectConfig.named("lisa", k=4, schedule={"every": 5})
        """
        return resolve(name, overrides)

    # --- JSON ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; a function that has no name becomes ``"custom"``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["score"] = _encoded(self.score)
        values["schedule"] = self.schedule.to_dict() if self.schedule is not None else None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SelectConfig":
        """The config of `to_dict`; unknown keys are dropped with a warning."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - {"retouch_version"})
        if unknown:
            warnings.warn(
                f"SelectConfig: unknown keys are ignored: {', '.join(unknown)} (written by a newer "
                "version of retouch?)",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``retouch_config.json`` into a folder, which is made if need be."""
        from retouch._core import __version__

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            self.to_dict() | {"retouch_version": __version__}, indent=2, sort_keys=True
        )
        part = path / f".{FILE}.{os.getpid()}"
        try:
            part.write_text(text + "\n")
            part.replace(path / FILE)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any
    ) -> "SelectConfig":
        """Reads ``retouch_config.json``.

        Args:
            source: A folder, the file itself, or the id of a repository on the Hugging Face hub.
            subfolder: A folder inside of `source`.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` or
                ``force_download``, as for `huggingface_hub.hf_hub_download`.

        Raises:
            FormatError: The file is not a config.
            FileNotFoundError: The folder has no such file.
        """
        path = Path(source)
        if path.is_dir():
            path = path / (subfolder or "") / FILE
        elif not path.exists():
            path = _download(str(source), subfolder, hub)
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise FormatError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise FormatError(f"{path} holds a {type(values).__name__}, wanted an object of fields")
        return cls.from_dict(values)


def resolve(config: SelectConfig | str, overrides: Mapping[str, Any]) -> SelectConfig:
    """A config with everything decided.

    Args:
        config: A config, the name of a recipe, or the name of a score.
        overrides: Fields that replace those of the config. A budget replaces any other budget.

    Raises:
        HyperparameterError: An unknown name, or fields that do not fit together.
    """
    known = [f.name for f in fields(SelectConfig)]
    for name in overrides:
        if name not in known:
            raise HyperparameterError(
                f"SelectConfig has no field {name!r}{close_to(name, known)}; "
                f"its fields are {', '.join(known)}"
            )
    if isinstance(config, SelectConfig):
        base = {name: getattr(config, name) for name in known}
    elif not isinstance(config, str):
        raise HyperparameterError(
            f"config: got {type(config).__name__}, wanted a SelectConfig or a name"
        )
    elif config in _presets:
        base = _presets[config] | {"recipe": config}
    elif config in score_names():
        base = {"score": config}
    else:
        names = [*preset_names(), *score_names()]
        raise HyperparameterError(
            f"no recipe or score is named {config!r}{close_to(config, names)}; recipes: "
            f"{', '.join(preset_names())}; scores: {', '.join(score_names())}"
        )
    if any(overrides.get(name) is not None for name in BUDGETS):
        base = {key: value for key, value in base.items() if key not in BUDGETS}
    overrides = dict(overrides)
    own = base.get("schedule")
    if isinstance(overrides.get("schedule"), Mapping) and isinstance(own, Schedule):
        overrides["schedule"] = Schedule.from_dict(own.to_dict() | overrides["schedule"])
    return SelectConfig(**base | overrides)


def _names(field_name: str, value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Iterable) or not all(isinstance(v, str) for v in value):
        raise HyperparameterError(
            f"SelectConfig: {field_name}={value!r}; wanted a list of names, a string or None"
        )
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def _check_int(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HyperparameterError(f"SelectConfig: {name}={value!r}; wanted an integer >= {least}")


def _encoded(score: Any) -> Any:
    if score is None or isinstance(score, str):
        return score
    name = name_of_score(score)
    if name is not None:
        return name
    return score.to_dict() if hasattr(score, "to_dict") else CUSTOM


def _decoded(score: Any) -> Any:
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
    return _decoded(value) if isinstance(value, dict) else value


def _unknown_score(name: Any) -> HyperparameterError:
    return HyperparameterError(
        f"SelectConfig: no score is named {name!r}{close_to(str(name), score_names())}; "
        f"scores: {', '.join(score_names())}"
    )


def _download(source: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{source} is no folder, and without huggingface_hub nothing can be fetched: "
            '`pip install "retouch[hf]"`'
        ) from error
    return Path(hf_hub_download(source, FILE, subfolder=subfolder, **hub))
