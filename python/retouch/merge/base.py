"""What a merge method is: its parameters, what it needs, and the arithmetic of one tensor."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from retouch.errors import HyperparameterError
from retouch.names import close_to

if TYPE_CHECKING:
    from retouch.merge.sources import Factors

__all__ = ["REQUIRED", "Job", "Method", "Param", "method_named", "method_names", "register"]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()
"""The default of a parameter that has none."""


@dataclass(frozen=True)
class Param:
    """One parameter of a method.

    Attributes:
        kind: `float`, `int`, `bool` or `str`.
        default: Its value where none is given; `REQUIRED` if one must be given.
        low: The smallest value that is taken.
        high: The largest value that is taken.
        choices: The words that are taken (of a `str`), all if empty.
        help: What it does, for tables and the command line.
    """

    kind: type
    default: Any = REQUIRED
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    help: str = ""

    def check(self, name: str, value: Any) -> Any:
        """The value as `kind`.

        Raises:
            HyperparameterError: It is of another kind or out of range; `name` is named.
        """
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or value != value:  # NaN is no value
            raise HyperparameterError(f"{name} must be a {self.kind.__name__}, got {value!r}")
        low, high = self.low, self.high
        given: Any = value  # of a type that can be compared where there is a limit
        if (low is not None and given < low) or (high is not None and given > high):
            rule = f"at least {low}" if high is None else f"from {low} to {high}"
            raise HyperparameterError(f"{name} must be {rule}, got {value!r}")
        if self.choices and value not in self.choices:
            words = ", ".join(self.choices)
            raise HyperparameterError(f"{name} must be one of {words}; got {value!r}")
        return value


@dataclass
class Job:
    """One tensor to merge, or a stretch of one along its first dimension.

    Attributes:
        name: Of the output tensor.
        base: What differences are taken from; None if the plan has no base.
        tensors: One per model, contiguous, of one shape. Not to be written: they may be views of
            mapped files. float64 and float8 come as float32.
        models: The id of each model, also the key of its random numbers.
        parameters: For each model the value of every parameter of `Method.per_model`.
        shared: The value of every parameter of `Method.shared`.
        dialect: One of `Method.dialects`.
        seed: Of random masks.
        out_dtype: What `Method.merge` returns.
        state: What the passes over the whole model found (`Method.begin`); None for scope "tensor".
        local: What `Method.prepare` found in the whole tensor.
        factors: In place of `tensors`, for a method with `needs_factors`: the LoRA factors of each model;
            None for a weight that no adapter changes.
        masks: In place of what the method would keep of each model by size or at random: one tensor per
            model, nonzero where it stays. None leaves that to the method.
        start: Flat position of the first element in the whole tensor: not 0 only for a stretch.
        room: Bytes that a search in a whole tensor may use (`max_ram`); None for no limit.
        notes: What `note` was told; it goes into the report.
    """

    name: str
    base: Tensor | None
    tensors: list[Tensor]
    models: list[str]
    parameters: list[dict[str, Any]]
    shared: dict[str, Any]
    dialect: str
    seed: int = 0
    out_dtype: torch.dtype = torch.float32
    state: Any = None
    local: Any = None
    factors: list["Factors"] | None = None
    masks: list[Tensor] | None = None
    start: int = 0
    room: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def values(self, parameter: str) -> list[Any]:
        """One parameter of every model."""
        return [p[parameter] for p in self.parameters]

    def note(self, key: str, value: Any) -> None:
        """Remembers a JSON-able fact about this tensor for the report."""
        self.notes[key] = value

    def piece(self, begin: int, end: int) -> "Job":
        """The rows `begin` to `end` (along the first dimension), without copies."""
        first = self.tensors[0]
        row = first[0].numel()
        base = None if self.base is None else self.base[begin:end]
        tensors = [t[begin:end] for t in self.tensors]
        masks = None if self.masks is None else [m[begin:end] for m in self.masks]
        start = self.start + begin * row
        return replace(self, base=base, tensors=tensors, masks=masks, start=start)


class Method(ABC):
    """A merge method. One instance serves a whole merge; what it finds is kept in the job.

    Arithmetic is float32 (sums of many terms float64), rounded once to `Job.out_dtype`, and does not
    depend on threads.

    Attributes:
        name: What `register` was given.
        paper: Its source: arXiv number or address.
        per_model: Parameters that each model has (weight, density).
        shared: Parameters that all models share (normalize, lambda).
        base: Whether a base is needed ("required"), may be given ("optional") or is refused ("none").
        models: Fewest and most models beside the base; None for no limit.
        scope: "tensor": a tensor is merged from itself alone. "model": `begin`, `observe` and `settle`
            see all tensors first.
        pieces: Whether `merge` may be handed a stretch of a tensor along its first dimension. What it
            must know of the whole tensor comes from `prepare`.
        observes_pieces: Whether `observe` may be handed stretches of a tensor one after the other, with
            the same bits in the state however a tensor is cut (whole numbers are counted).
        needs_factors: Whether models are LoRA adapters and `merge` wants their factors, not their weights.
        fixes_base: Whether a coordinate keeps the base's value wherever all models have it, whatever
            the rest of the tensor holds: sparse deltas are then merged on their supports alone.
        dialects: Variants that go by this name; the first is the default.
        defaults: By dialect, defaults that differ from those of the parameters.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    per_model: ClassVar[Mapping[str, Param]] = {}
    shared: ClassVar[Mapping[str, Param]] = {}
    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    models: ClassVar[tuple[int, int | None]] = (1, None)
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"
    pieces: ClassVar[bool] = False
    observes_pieces: ClassVar[bool] = False
    needs_factors: ClassVar[bool] = False
    fixes_base: ClassVar[bool] = False
    dialects: ClassVar[tuple[str, ...]] = ("paper",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def merge(self, job: Job) -> Tensor:
        """The merged tensor, of `job.out_dtype`; its shape is that of the inputs."""

    def prepare(self, job: Job) -> Any:
        """What must be known of the whole tensor before any stretch of it; becomes `job.local`."""
        return None

    def global_scope(self, dialect: str) -> bool:
        """Whether this dialect needs passes over the whole model first."""
        return self.scope == "model"

    def begin(self, job: Job) -> Any:
        """A new state for the passes over the whole model; `job` is its first tensor."""
        return None

    def observe(self, job: Job) -> None:
        """Sees one whole tensor in one pass; adds to `job.state` what must not depend on the order.

        With `observes_pieces` it sees a stretch of one.
        """
        raise NotImplementedError

    def settle(self, state: Any) -> bool:
        """Ends a pass; whether another one is needed. The last one frees what `merge` does not need."""
        return False

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Bytes of anonymous memory that `merge` needs beside its inputs and its result."""
        return 0

    def survey_memory(self, numel: int, models: int, dialect: str) -> int:
        """Bytes of anonymous memory that `observe` needs beside its inputs; by default as `memory`."""
        return self.memory(numel, models, dialect)

    def state_memory(self, models: int, tensors: int) -> int:
        """Bytes that the state of the passes over so many tensors takes while they are made."""
        return 0

    def resolve(
        self,
        dialect: str | None,
        parameters: Sequence[Mapping[str, Any]],
        shared: Mapping[str, Any],
        where: str = "",
    ) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
        """Checks what was given and fills in the defaults.

        Args:
            dialect: None for the first one.
            parameters: For each model.
            shared: For all.
            where: What is being merged, for messages.

        Returns:
            Dialect, per-model parameters and shared parameters, all complete.

        Raises:
            HyperparameterError: A dialect or parameter is unknown, missing or out of range.
        """
        chosen = self.dialects[0] if dialect is None else dialect
        at = f" ({where})" if where else ""
        if chosen not in self.dialects:
            raise HyperparameterError(
                f"{self.name} has no dialect {chosen!r}{close_to(chosen, self.dialects)}; it has "
                f"{', '.join(self.dialects)}{at}"
            )
        own = self.defaults.get(chosen, {})

        def fill(given: Mapping[str, Any], known: Mapping[str, Param]) -> dict[str, Any]:
            for key in given:
                if key not in known:
                    raise HyperparameterError(
                        f"{self.name} has no such parameter {key!r}{close_to(key, known)}; here it takes "
                        f"{', '.join(known) or 'none'}{at}"
                    )
            out = {}
            for key, param in known.items():
                value = given.get(key, own.get(key, param.default))
                if value is REQUIRED:
                    raise HyperparameterError(f"{self.name} needs a value for {key!r}{at}")
                out[key] = (
                    value if value is None else param.check(f"{key} of {self.name}{at}", value)
                )
            return out

        return chosen, [fill(p, self.per_model) for p in parameters], fill(shared, self.shared)


_methods: dict[str, Method] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """A class decorator that gives a method its name.

    Raises:
        HyperparameterError: The name is taken.
    """

    def add(cls: M) -> M:
        if name in _methods:
            raise HyperparameterError(f"two merge methods are named {name!r}")
        cls.name = name
        _methods[name] = cls()
        return cls

    return add


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        HyperparameterError: There is none.
    """
    if name not in _methods:
        raise HyperparameterError(
            f"no merge method is named {name!r}{close_to(name, _methods)}; methods: "
            f"{', '.join(sorted(_methods))}"
        )
    return _methods[name]


def method_names() -> list[str]:
    """All names."""
    return sorted(_methods)
