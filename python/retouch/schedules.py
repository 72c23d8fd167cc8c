"""`Schedule`: when the mask changes, and what becomes of values and state then, as plain data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from retouch.errors import HyperparameterError
from retouch.names import close_to

__all__ = ["Schedule", "StatePolicy"]

Change = Literal["replace", "grow", "shrink", "drop_grow", "cycle", "freeze"]
Initial = Literal["none", "all", "random"]
Order = Literal["ascending", "descending", "shuffled"]
Ramp = Literal["constant", "linear", "cosine", "cubic", "exponential"]
StatePolicy = Literal["intersect", "keep", "reset", "seeded"]
Rewind = Literal["none", "dropped", "all"]
Clock = Literal["coordinate", "shared"]
Signal = Literal[
    "grad_l1", "grad_l1_mean", "grad_change_l1", "weight_change_l1", "weight_change_mean"
]

_WORDS: dict[str, tuple[str, ...]] = {
    "unit": ("step", "epoch"), "change": get_args(Change), "initial": get_args(Initial),
    "order": get_args(Order), "ramp": get_args(Ramp), "state": get_args(StatePolicy),
    "clock": get_args(Clock), "signal": get_args(Signal),
    "rewind": get_args(Rewind),
}  # fmt: skip
EVERYTHING = "all"


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Schedule:
    """When the selection of a `SelectConfig` changes during training.

    Steps are optimizer steps that were really taken: neither skipped ones of a `GradScaler` nor the
    trial step of ``torch.distributed.checkpoint`` count. A change happens after a step and holds
    from the next one on, unless `now` says otherwise. The same schedule, seed and training give the
    same masks in every process, and again after a checkpoint.

    Raises:
        HyperparameterError: A value that is wrong in itself, or fields that exclude each other.

    Example:
        >>> SelectConfig(direction="random", granularity="layer", k=2, schedule=Schedule(every=20))
    """

    every: int | None = _help("Steps, or epochs, between changes; None: one selection, no change.")
    unit: Literal["step", "epoch"] = _help("What `every` counts.", "step")
    start: int = _help(
        "Steps before the first selection (with freeze: before the first check); until then "
        "`initial` is trained. 0: select before the first step, or, where gradients of the training "
        "are collected, as soon as they are.",
        0,
    )
    stop: int | None = _help("No change from this step on.")
    collect: int | Literal["all"] = _help(
        "The score is taken of the gradients of this many training steps before each change (all: "
        "of all since the last one), accumulated over micro-batches and processes as the optimizer "
        "sees them, but before clipping. 0: of the data and weights, as by `retouch.select`.",
        0,
    )
    now: bool = _help(
        "Select by the gradient of the very step that is being taken, before it is taken. Until then "
        "dense gradients stay with the weights: clipping sees them, model.zero_grad() clears them and "
        "optimizer.zero_grad() does not. Only with collect=1, in one process, without a GradScaler.",
        False,
    )
    initial: Literal["none", "all", "random"] = _help(
        "What is trained before the first selection, beside what is trained whole: nothing, all "
        "that competes, or a random selection of the budget.",
        "none",
    )
    change: Literal["replace", "grow", "shrink", "drop_grow", "cycle", "freeze"] = _help(
        "replace: select anew. grow: keep what is selected and add the best of the rest up to the "
        "budget of the time. shrink: keep the best of what is selected. drop_grow: drop the "
        "fraction `drop` of the selected that moved least, and add the best of the rest. cycle: "
        "the next units of the `order`. freeze: freeze tensors whose `signal` is below "
        "`threshold`, for good.",
        "replace",
    )
    drop: float = _help("With drop_grow: the fraction to drop; follows the ramp down to 0.", 0.2)
    drop_first: float | None = _help("With drop_grow: the fraction at the first change, if other.")
    order: Literal["ascending", "descending", "shuffled"] = _help(
        "With cycle: the order of the units (layers, tensors, or windows of elements); shuffled "
        "anew each time round.",
        "shuffled",
    )
    ramp: Literal["constant", "linear", "cosine", "cubic", "exponential"] = _help(
        "How the budget (grow, shrink, replace), or the dropped fraction, goes from its first to "
        "its last value over `rounds` changes.",
        "constant",
    )
    density_from: float | None = _help(
        "With a ramp: the density of the first change. Default: 1/rounds of the last for grow, 1 "
        "for shrink, the last for replace.",
    )
    rounds: int | None = _help("Changes until the ramp has reached its end, which then holds.")
    rewind: Literal["none", "dropped", "all"] = _help(
        "What goes back to the base at a change: nothing, the weights that are frozen by it, or all.",
        "none",
    )
    signal: Literal[
        "grad_l1", "grad_l1_mean", "grad_change_l1", "weight_change_l1", "weight_change_mean"
    ] = _help(
        "With freeze, of each tensor: the L1 norm of the selected gradients, of their change since "
        "the last check, or of the change of the weights since; `_mean`: divided by their number.",
        "grad_l1",
    )
    threshold: float | None = _help("With freeze: tensors below it are frozen.")
    state: Literal["intersect", "keep", "reset", "seeded"] = _help(
        "Optimizer state at a change. intersect: survivors keep theirs, newcomers start at 0, the "
        "rest is freed. keep: what leaves is put aside, on the CPU, and comes back with the "
        "coordinate. reset: all start at 0. seeded: as intersect, newcomers start with the moments "
        "of the collected gradients.",
        "intersect",
    )
    clock: Literal["coordinate", "shared"] = _help(
        "The steps that Adam's bias correction counts: of each coordinate, or one for each tensor, "
        "with which late joiners take up to 6.6 times the step.",
        "coordinate",
    )

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if value not in words:
                hint = close_to(value, words) if isinstance(value, str) else ""
                raise self._wrong(f"{name}={value!r}; wanted one of {', '.join(words)}{hint}")
        for name, least in (("every", 1), ("start", 0), ("stop", 1), ("rounds", 1)):
            self._check_int(name, least)
        if self.collect != EVERYTHING:
            self._check_int("collect", 0)
        for name in ("drop", "drop_first", "density_from"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise self._wrong(f"{name}={value!r}; wanted a fraction in (0, 1]")
        if (self.change == "freeze") != (self.threshold is not None):
            raise self._wrong("threshold belongs to change='freeze', which needs it")
        if self.change != "replace" and self.every is None:
            raise self._wrong(f"change={self.change!r} needs every=")
        if self.ramp != "constant" and self.rounds is None:
            raise self._wrong(f"ramp={self.ramp!r} needs rounds=, the changes that it takes")
        if self.now and self.collect != 1:
            raise self._wrong("now=True selects by the gradient of one step: set collect=1")
        if self.state == "seeded" and (not self.collect or self.change == "cycle"):
            raise self._wrong("state='seeded' takes moments from collected gradients: set collect=")
        window = self.every if self.unit == "step" else None
        if isinstance(self.collect, int) and window is not None and self.collect > window:
            raise self._wrong(f"collect={self.collect} steps do not fit between changes {window}")

    def _wrong(self, what: str) -> HyperparameterError:
        return HyperparameterError(f"Schedule: {what}")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(f"{name}={value!r}; wanted an integer >= {least}")

    def budget(self, number: int, last: float) -> float:
        """The budget of a change.

        Args:
            number: Of the change; the first is 0.
            last: Where the ramp ends, in any unit in which 1 would be all that competes.
        """
        if self.ramp == "constant" or self.change == "drop_grow" or self.rounds is None:
            return last
        first = self.density_from
        if first is None:
            first = {"grow": last / self.rounds, "shrink": 1.0}.get(self.change, last)
        done = min(number / max(self.rounds - 1, 1), 1.0)
        return last if done == 1.0 else first + (last - first) * self._progress(done)

    def dropped(self, number: int) -> float:
        """The fraction that is dropped at a change; the first is number 0."""
        if number == 0 and self.drop_first is not None:
            return self.drop_first
        if self.ramp == "constant":
            return self.drop
        done = min(number / (self.rounds or 1), 1.0)
        return self.drop * (1.0 - self._progress(done))

    def _progress(self, done: float) -> float:
        """From 0 to 1 as a share of the changes is done."""
        if self.ramp == "cosine":
            return (1 - math.cos(math.pi * done)) / 2
        if self.ramp == "cubic":  # fast first, as in gradual pruning (arXiv 1710.01878)
            return 1 - (1 - done) ** 3
        if self.ramp == "exponential":
            return (1 - math.exp(-done)) / (1 - math.exp(-1))
        return done

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schedule":
        """The schedule of `to_dict`.

        Raises:
            HyperparameterError: An unknown field.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise HyperparameterError(
                    f"Schedule has no field {name!r}{close_to(str(name), known)}; "
                    f"its fields are {', '.join(known)}"
                )
        return cls(**values)
