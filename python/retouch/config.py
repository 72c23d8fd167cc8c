"""`SelectConfig`: what to select, as plain data, and the names that it may use.

Scores register their names in `retouch.names` and recipes here (`register_preset`), so that a config
can be checked when it is made and written to JSON without knowing their modules.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from retouch.configcheck import (
    BUDGETS,
    Aggregate,
    Direction,
    Granularity,
    Kind,
    Polarity,
    Quota,
    Scope,
    State,
    Ties,
    checked,
    competes,
)
from retouch.errors import FormatError, HyperparameterError
from retouch.names import close_to, encoded_score, score_names
from retouch.schedules import Schedule

__all__ = [
    "ALL_LINEAR",
    "BUDGETS",
    "Kind",
    "SelectConfig",
    "State",
    "preset_names",
    "register_preset",
    "resolve",
]

FILE = "retouch_config.json"
ALL_LINEAR = "all-linear"

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
    Exactly one of `density`, `k`, `threshold`, `quantile`, `k_per_row` and `lora_rank` is needed,
    unless nothing competes or ``direction="bernoulli"``.

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
    quantile: float | None = _help(
        "Select all scores above (direction 'top') or below ('bottom') this quantile of the scores "
        "of each group of the scope, interpolated linearly as numpy does; those equal to it are not "
        "selected. quantile=0.3 with direction='bottom' and polarity='freeze' trains all scores >= "
        "the 30th percentile."
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
        "block (a square of a matrix), tensor, expert (of a fused mixture: its part of all "
        "parameters of the module) or layer.",
        "element",
    )
    block_size: int | None = _help(
        "Rows and columns of a block; those at the edges of a matrix may be smaller."
    )
    scope: Scope = _help(
        "Where the budget holds: over all parameters together, or in each layer, tensor, row or "
        "group of a row. A parameter outside of any layer counts as a layer. siblings: in each set "
        "of modules of one kind that one module holds, as the projections of an attention; what a "
        "density leaves over goes to the same sets of other layers at random.",
        "global",
    )
    quota: Quota = _help(
        "How a density is shared among the tensors or layers of the scope: size, each gets its own "
        "density; score, in proportion to their mean scores (>= 0), at most all of one.",
        "size",
    )
    group_size: int | None = _help(
        "How many consecutive elements of a row are a group: k=2, scope='group', group_size=4 "
        "selects 2 of every 4."
    )
    direction: Direction = _help(
        "Take the top or the bottom scores, or any at random. weighted: at random, each draw with "
        "chances in proportion to the scores. bernoulli: each on its own, with its score as the "
        "probability, without a budget.",
        "top",
    )
    polarity: Polarity = _help(
        "Whether what is selected may move (train), or all else that competes (freeze). The budget "
        "counts what is selected.",
        "train",
    )
    ties: Ties = _help(
        "first: exactly the budget, equal scores to the lowest positions. all: also whatever equals "
        "the last one selected, as code does that compares with the k-th score.",
        "first",
    )
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
    gate: Any = _help(
        "Which of the selected move in a step, chosen anew in each: one of `retouch.optim.gates`, or "
        "its dict. `retouch.AdamW` has gates; `retouch.wrap` and the Trainer pass it on, "
        "`retouch.select` makes the mask alone."
    )
    decay: Literal["weight", "base"] | None = _help(
        "Where weight decay leads: 'weight' to 0, 'base' to what the weights held when the mask was "
        "set. For the optimizers of this package; passed on like `gate`."
    )
    pull: float | None = _help(
        "After every step each selected value goes this share of the way to what it held when the "
        "mask was set, whatever the learning rate. For the optimizers of this package; passed on "
        "like `gate`."
    )
    recipe: str | None = _help("The recipe that this config came from, for the record.")

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in checked(values).items():
            object.__setattr__(self, name, value)
        if isinstance(self.schedule, Mapping):
            object.__setattr__(self, "schedule", Schedule.from_dict(self.schedule))
        elif not isinstance(self.schedule, Schedule | None):
            raise HyperparameterError(
                f"SelectConfig: schedule={self.schedule!r}; wanted a Schedule"
            )
        if self.gate is not None:
            object.__setattr__(self, "gate", _gates().parse(_gates().plain(self.gate)))
            if self.gate.each_backward and self.schedule is not None and self.schedule.now:
                raise HyperparameterError(
                    "SelectConfig: a gate that closes after each backward pass has no gradients of "
                    "selected weights before a schedule with now=True has selected; leave out now"
                )

    def anything_competes(self) -> bool:
        """Whether any parameter could have the state "masked"."""
        return competes(self)

    def counts(self, kind: str) -> bool:
        """Whether fully trained parameters of a kind use up the budget."""
        counted = self.counted_in_budget
        return counted if isinstance(counted, bool) else kind in counted

    @classmethod
    def named(cls, name: str, **overrides: Any) -> "SelectConfig":
        """The config of a recipe, or of a score, with some fields replaced.

        Args:
            name: See `retouch.recipes.list()`.
            **overrides: Fields; a budget replaces any other budget, and a dict for `schedule` or
                `gate` replaces fields of the recipe's own.

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
        values["score"] = encoded_score(self.score)
        values["schedule"] = self.schedule.to_dict() if self.schedule is not None else None
        values["gate"] = _gates().plain(self.gate)
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
    new = overrides.get("gate")
    if base.get("gate") is not None and isinstance(new, Mapping) and "kind" not in new:
        overrides["gate"] = {**_gates().plain(base["gate"]), **new}
    return SelectConfig(**base | overrides)


def _gates() -> Any:
    """`retouch.optim.gates`, which stands right of configs."""
    from retouch.optim import gates

    return gates


def _download(source: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{source} is no folder, and without huggingface_hub nothing can be fetched: "
            '`pip install "retouch[hf]"`'
        ) from error
    return Path(hf_hub_download(source, FILE, subfolder=subfolder, **hub))
