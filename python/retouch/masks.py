"""Masks: which coordinates may move. Selected means may move, everywhere.

A `Selection` says it for one parameter, a `Mask` for a model. Structured selections (rows, columns,
whole parameters) stay structured: they are the cheapest to store, to train and to combine.
"""

import difflib
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from retouch import maskfile, ops
from retouch.errors import MaskError

__all__ = ["Kind", "Mask", "Overlap", "Selection"]

Kind = Literal["all", "none", "elements", "rows", "columns"]
KINDS = ("all", "none", "elements", "rows", "columns")


@dataclass(frozen=True, eq=False)
class Selection:
    """What is selected of one parameter.

    Attributes:
        kind: "all", "none", "elements" (flat positions), "rows" (slices of dim 0) or "columns"
            (slices of dim 1), dims as stored.
        shape: Shape of the parameter.
        index: Ascending, unique positions, rows or columns; int32 (int64 for parameters of 2**31
            elements or more) on the CPU; None for "all" and "none".

    Raises:
        MaskError: The index does not fit kind and shape.
    """

    kind: Kind
    shape: tuple[int, ...]
    index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MaskError(f"kind of selection must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if (self.index is None) != (self.kind in ("all", "none")):
            raise MaskError(f"a selection of {self.kind} {'needs an' if self.index is None else 'has no'} index")
        if self.kind == "columns" and len(self.shape) < 2:
            raise MaskError(f"a parameter of shape {self.shape} has no columns")
        if self.kind == "rows" and not self.shape:
            raise MaskError("a scalar parameter has no rows")
        if self.index is None:
            return
        index = self.index.detach().cpu()
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise MaskError(
                f"index must be a 1-D int32 or int64 tensor, got {index.dtype} of shape {tuple(index.shape)}"
            )
        limit = self._limit
        if index.numel():
            if int(index[0]) < 0 or int(index[-1]) >= limit:
                raise MaskError(f"an index of {self.kind} is outside of 0..{limit - 1} (shape {self.shape})")
            if not bool((index[1:] > index[:-1]).all()):
                raise MaskError(f"the index of {self.kind} must be ascending and unique")
        object.__setattr__(self, "index", index.to(ops.index_dtype(self.numel)).contiguous())

    @property
    def _limit(self) -> int:
        """How many units of this kind the parameter has."""
        if self.kind in ("rows", "columns"):
            return self.shape[0 if self.kind == "rows" else 1]
        return self.numel

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """Elements selected."""
        if self.kind == "all":
            return self.numel
        if self.index is None:
            return 0
        if self.kind == "elements":
            return self.index.numel()
        units = self._limit
        return self.index.numel() * (self.numel // units) if units else 0

    def flat(self) -> Tensor:
        """The flat positions of the selected elements, ascending."""
        dtype = ops.index_dtype(self.numel)
        if self.kind == "all":
            return torch.arange(self.numel, dtype=dtype)
        if self.index is None:
            return torch.empty(0, dtype=dtype)
        if self.kind == "elements":
            return self.index
        wide, index = torch.int64, self.index.long()
        if self.kind == "rows":
            row = self.numel // self.shape[0] if self.shape[0] else 0
            return (index[:, None] * row + torch.arange(row, dtype=wide)).flatten().to(dtype)
        rows, columns, rest = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        start = torch.arange(rows, dtype=wide)[:, None, None] * (columns * rest)
        inner = index[None, :, None] * rest + torch.arange(rest, dtype=wide)[None, None, :]
        return (start + inner).flatten().to(dtype)

    def bool(self) -> Tensor:
        """A boolean tensor of the parameter's shape, True where selected."""
        out = torch.zeros(self.numel, dtype=torch.bool)
        out[self.flat().long()] = True
        return out.view(self.shape)

    # --- algebra -------------------------------------------------------------------------------

    def _with(self, other: "Selection", how: str) -> "Selection":
        if self.shape != other.shape:
            raise MaskError(f"selections of shapes {self.shape} and {other.shape} cannot be combined")
        a, b = self, other
        if "none" in (a.kind, b.kind) or "all" in (a.kind, b.kind):
            simple = _simple(a, b, how)
            if simple is not None:
                return simple
        if a.kind == b.kind and a.index is not None and b.index is not None:
            return _made(a.kind, a.shape, getattr(ops, how)(a.index, b.index))
        return _made("elements", a.shape, getattr(ops, how)(a.flat(), b.flat()))

    def __and__(self, other: "Selection") -> "Selection":
        return self._with(other, "intersection")

    def __or__(self, other: "Selection") -> "Selection":
        return self._with(other, "union")

    def __sub__(self, other: "Selection") -> "Selection":
        return self._with(other, "difference")

    def __invert__(self) -> "Selection":
        if self.kind == "all":
            return Selection("none", self.shape)
        if self.index is None:
            return Selection("all", self.shape)
        return _made(self.kind, self.shape, ops.complement(self.index, self._limit))

    def __eq__(self, other: object) -> bool:
        """Whether both select the same coordinates, whatever their kind."""
        if not isinstance(other, Selection):
            return NotImplemented
        if self.shape != other.shape or self.count != other.count:
            return False
        if self.kind == other.kind and self.index is not None and other.index is not None:
            return torch.equal(self.index, other.index)
        return self.kind == other.kind or torch.equal(self.flat(), other.flat())

    __hash__ = None  # type: ignore[assignment]

    # --- values --------------------------------------------------------------------------------

    def gather(self, tensor: Tensor) -> Tensor:
        """The selected values in float32 (float64 for float64), as a new tensor.

        Shape: [k] for elements, [r, ...] for rows, [rows, c, ...] for columns, the tensor's own for
        all, [0] for none.
        """
        if self.kind == "elements":
            assert self.index is not None
            return ops.gather(tensor, self.index, "tensor")
        part = self._part(tensor.detach())
        return part.to(ops.value_dtype(tensor.dtype), copy=part.data_ptr() == tensor.data_ptr())

    def gather_add_(self, out: Tensor, tensor: Tensor, name: str) -> None:
        """Adds the selected values to `out`, in its dtype."""
        if self.kind == "elements":
            assert self.index is not None
            ops.gather_add_(out, tensor, self.index, name)
        else:
            out.detach().add_(self._part(tensor.detach()).to(out.dtype))

    def scatter_(self, tensor: Tensor, values: Tensor, name: str) -> None:
        """Writes values where this selects, rounded once to the tensor's dtype."""
        if self.kind == "elements":
            assert self.index is not None
            ops.scatter_(tensor, self.index, values, name)
        else:
            self.put_(tensor, values.detach().to(tensor.dtype), name)

    def take(self, tensor: Tensor) -> Tensor:
        """The selected values, bit for bit, in the tensor's dtype and the shape of `gather`."""
        if self.kind == "elements":
            assert self.index is not None
            return ops.take(tensor, self.index, "tensor")
        part = self._part(tensor.detach())
        return part.clone() if part.data_ptr() == tensor.data_ptr() else part

    def put_(self, tensor: Tensor, values: Tensor, name: str) -> None:
        """Writes values where this selects, bit for bit."""
        if self.kind == "elements":
            assert self.index is not None
            ops.put_(tensor, self.index, values, name)
            return
        if tensor.dtype != values.dtype:
            raise MaskError(f"values of {name} are {values.dtype}, the weight {tensor.dtype}")
        with torch.no_grad():
            if self.kind == "all":
                tensor.copy_(values)
            elif self.index is not None:
                dim = 0 if self.kind == "rows" else 1
                where = self.index.to(device=tensor.device, dtype=torch.int64)
                tensor.index_copy_(dim, where, values.detach().to(tensor.device))

    def _part(self, tensor: Tensor) -> Tensor:
        if self.kind == "all":
            return tensor
        if self.index is None:
            return tensor.new_empty(0)
        return tensor.index_select(0 if self.kind == "rows" else 1, self.index.to(tensor.device))


def _made(kind: Kind, shape: tuple[int, ...], index: Tensor) -> Selection:
    """A selection in its simplest form."""
    if not index.numel():
        return Selection("none", shape)
    found = Selection(kind, shape, index)
    return Selection("all", shape) if found.count == found.numel else found


def _simple(a: Selection, b: Selection, how: str) -> Selection | None:
    """The result where one side selects everything or nothing."""
    nothing = Selection("none", a.shape)
    if how == "union":
        if "all" in (a.kind, b.kind):
            return Selection("all", a.shape)
        return b if a.kind == "none" else a
    if how == "intersection":
        if "none" in (a.kind, b.kind):
            return nothing
        return b if a.kind == "all" else a
    if a.kind == "none" or b.kind == "all":
        return nothing
    return a if b.kind == "none" else ~b  # a is everything


@dataclass(frozen=True)
class Overlap:
    """How two masks meet.

    Attributes:
        both: Coordinates in both.
        first: Coordinates in the first.
        second: Coordinates in the second.
        jaccard: both / either.
        expected: Coordinates in both that independent random masks with the same count per
            parameter would have on average.
    """

    both: int
    first: int
    second: int
    jaccard: float
    expected: float


class Mask(Mapping[str, Selection]):
    """Which coordinates of a model may move: a `Selection` per parameter name.

    Parameters without an entry are frozen. Names are those of `model.named_parameters()`; a tied
    parameter has one.

    Args:
        selections: By parameter name.
        model: The model, which is remembered weakly so that `retouch.wrap` finds it.
        metadata: How the mask was made; JSON-able, saved with it.
    """

    def __init__(
        self,
        selections: Mapping[str, Selection],
        model: nn.Module | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._selections = dict(selections)
        self._model = weakref.ref(model) if model is not None else None
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._numel = sum(p.numel() for _, p in own_parameters(model)) if model is not None else 0

    # --- mapping -------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Selection:
        return self._selections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._selections)

    def __len__(self) -> int:
        return len(self._selections)

    def model(self) -> nn.Module | None:
        """The model that the mask was made for, if it is known and still there."""
        return self._model() if self._model is not None else None

    # --- making --------------------------------------------------------------------------------

    @classmethod
    def full(cls, model: nn.Module) -> Self:
        """Everything may move."""
        return cls({n: Selection("all", tuple(p.shape)) for n, p in own_parameters(model)}, model)

    @classmethod
    def from_indices(cls, indices: Mapping[str, Any], model: nn.Module) -> Self:
        """Given flat positions, by parameter name; any order, lists or integer tensors.

        Raises:
            MaskError: No such parameter, a position outside of it, or one given twice.
        """
        shapes = {n: tuple(p.shape) for n, p in own_parameters(model)}
        chosen = {}
        for name, given in indices.items():
            if name not in shapes:
                raise MaskError(f"the model has no parameter {name}{_near(name, shapes)}")
            index = torch.as_tensor(given)
            if index.numel() and index.dtype.is_floating_point:
                raise MaskError(f"positions of {name} must be integers, got {index.dtype}")
            index = index.reshape(-1).to(torch.int64).sort().values
            try:
                chosen[name] = Selection("elements", shapes[name], index)
            except MaskError as e:
                raise MaskError(f"{name}: {e}") from None
        return cls(chosen, model)

    def check(self, model: nn.Module) -> None:
        """Raises MaskError, naming the parameter, unless the mask fits the model."""
        shapes = {n: tuple(p.shape) for n, p in own_parameters(model)}
        for name, selection in self.items():
            if name not in shapes:
                raise MaskError(
                    f"the mask selects {name}, which {type(model).__name__} does not have"
                    f"{_near(name, shapes)}; it was made for another model"
                )
            if shapes[name] != selection.shape:
                raise MaskError(
                    f"the mask has {name} with shape {selection.shape}, {type(model).__name__} has "
                    f"{shapes[name]}; it was made for another model"
                )

    # --- algebra -------------------------------------------------------------------------------

    def _combined(self, other: "Mask", how: str) -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        out = {}
        for name in [*self, *(n for n in other if n not in self)]:
            shape = (self.get(name) or other[name]).shape
            none = Selection("none", shape)
            a, b = self.get(name, none), other.get(name, none)
            try:
                found = a._with(b, how)
            except MaskError as e:
                raise MaskError(f"{name}: {e}") from None
            if found.count:
                out[name] = found
        return Mask(out, self.model() or other.model(), {"algebra": how})._sized(self, other)

    def _sized(self, *others: "Mask") -> "Mask":
        self._numel = max([self._numel, *(o._numel for o in others)])
        return self

    def __and__(self, other: "Mask") -> "Mask":
        return self._combined(other, "intersection")

    def __or__(self, other: "Mask") -> "Mask":
        return self._combined(other, "union")

    def __sub__(self, other: "Mask") -> "Mask":
        return self._combined(other, "difference")

    def __invert__(self) -> "Mask":
        """Everything that is not selected; parameters without an entry become wholly selected.

        Raises:
            MaskError: The mask does not know its model, so it does not know what it leaves out.
        """
        model = self.model()
        if model is None:
            raise MaskError("~mask needs the model, which this mask does not know: use Mask.full(model) - mask")
        return Mask.full(model) - self

    def __eq__(self, other: object) -> bool:
        """Whether both select the same coordinates."""
        if not isinstance(other, Mask):
            return NotImplemented
        a, b = ({n: s for n, s in m.items() if s.count} for m in (self, other))
        return a.keys() == b.keys() and all(a[n] == b[n] for n in a)

    __hash__ = None  # type: ignore[assignment]

    def overlap(self, other: "Mask") -> Overlap:
        """How many coordinates two masks share, against chance."""
        both, expected = (self & other).count, 0.0
        for name, a in self.items():
            b = other.get(name)
            if b is not None and a.numel:
                expected += a.count * b.count / a.numel
        either = self.count + other.count - both
        return Overlap(both, self.count, other.count, both / either if either else 0.0, expected)

    # --- figures -------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Coordinates that may move."""
        return sum(s.count for s in self.values())

    @property
    def numel(self) -> int:
        """All parameters of the model (of the masked ones where the model is not known)."""
        return self._numel or sum(s.numel for s in self.values())

    @property
    def density(self) -> float:
        """count / numel."""
        return self.count / max(self.numel, 1)

    def summary(self) -> dict[str, Any]:
        """The figures of `print_trainable_parameters`, per parameter too.

        Returns:
            `trainable`, `all`, `density`, `state_bytes` (two float32 moments, as AdamW keeps them),
            `delta_bytes` (positions and values, uncompressed) and `parameters`: for each name its
            `kind`, `selected`, `numel`.
        """
        model = self.model()
        width = {n: p.element_size() for n, p in own_parameters(model)} if model is not None else {}
        delta = 0
        for name, s in self.items():
            delta += s.count * width.get(name, 4)
            delta += s.index.numel() * s.index.element_size() if s.index is not None else 0
        return {
            "trainable": self.count,
            "all": self.numel,
            "density": self.density,
            "state_bytes": 8 * self.count,
            "delta_bytes": delta,
            "parameters": {
                n: {"kind": s.kind, "selected": s.count, "numel": s.numel} for n, s in self.items()
            },
        }

    def print_trainable_parameters(self, per_parameter: bool = False) -> None:
        """Prints what trains, as PEFT does, and what it costs.

        Args:
            per_parameter: Also a line for each parameter that has selected coordinates.
        """
        figures = self.summary()
        print(
            f"trainable params: {figures['trainable']:,d} || all params: {figures['all']:,d} || "
            f"trainable%: {100 * figures['density']:.4f} || "
            f"optimizer state (AdamW): {figures['state_bytes'] / 2**20:.2f} MiB || "
            f"delta: {figures['delta_bytes'] / 2**20:.2f} MiB"
        )
        if per_parameter:
            for name, row in figures["parameters"].items():
                if row["selected"]:
                    share = 100 * row["selected"] / row["numel"]
                    print(f"{name:60s} {row['kind']:9s} {row['selected']:>12,d} {share:8.3f}%")

    def __repr__(self) -> str:
        used = sum(1 for s in self.values() if s.count)
        return f"Mask({self.count:,} of {self.numel:,} weights in {used} parameters, density {self.density:.4%})"

    def _repr_html_(self) -> str:
        from retouch import maskview

        return maskview.html(self)

    def plot(self, ax: Any = None) -> Any:
        """Draws the density of each module kind (rows) in each layer (columns); needs matplotlib.

        Args:
            ax: Axes to draw on; new ones by default.

        Returns:
            The axes.
        """
        from retouch import maskview

        return maskview.plot(self, ax)

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes the mask as one safetensors file (`mask.safetensors` if `path` is a folder).

        The file appears under its name only when it is complete.
        """
        entries = {n: (s.kind, s.shape, s.index) for n, s in self.items()}
        maskfile.save(Path(path), entries, {"numel": self.numel, "metadata": self.metadata})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Self:
        """Reads a mask; no code is executed.

        Args:
            path: The file, or a folder with `mask.safetensors`.
            model: If given, the mask must fit it, and `retouch.wrap` will find it.

        Raises:
            FormatError: The file is damaged or of an unknown version.
            MaskError: The mask does not fit the model.
        """
        entries, extra = maskfile.load(Path(path))
        chosen = {}
        for name, (kind, shape, index) in entries.items():
            try:
                chosen[name] = Selection(kind, shape, index)
            except MaskError as e:
                raise maskfile.damaged(Path(path), f"{name}: {e}") from None
        mask = cls(chosen, None, extra["metadata"])
        mask._numel = int(extra["numel"])
        if model is not None:
            mask.check(model)
            mask._model = weakref.ref(model)
        return mask


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model, each tied one once, without the compact values of an engine."""
    for name, param in model.named_parameters():
        if not name.startswith("_retouch."):
            yield name, param


def _near(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""

