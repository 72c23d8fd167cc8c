"""`Selection`: what is selected of one parameter, and how values move in and out of it."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from retouch import ops
from retouch.errors import LayoutError, MaskError, ShapeError

__all__ = ["Selection", "SelectionKind"]

SelectionKind = Literal["all", "none", "elements", "rows", "columns"]
_DIM = {"rows": 0, "columns": 1}


@dataclass(frozen=True, eq=False)
class Selection:
    """The coordinates of one parameter that may move.

    Attributes:
        kind: ``all`` and ``none``; ``elements`` are flat positions; ``rows`` and ``columns`` are
            whole slices along dimension 0 and 1 of the parameter as it is stored.
        shape: Of the parameter.
        index: Ascending unique positions on the CPU, int32 (int64 for parameters of 2**31 elements
            or more); None for ``all`` and ``none``.

    Raises:
        MaskError: The parts do not fit together.
    """

    kind: SelectionKind
    shape: tuple[int, ...]
    index: Tensor | None = None
    _moved: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        object.__setattr__(self, "shape", shape)
        if any(n < 0 for n in shape):
            raise MaskError(f"no parameter has shape {shape}")
        if self.kind in ("all", "none"):
            if self.index is not None:
                raise MaskError(f"a selection of kind {self.kind!r} has no index")
            return
        if self.kind not in ("elements", "rows", "columns"):
            raise MaskError(
                f"selection of kind {self.kind!r}; wanted all, none, elements, rows or columns"
            )
        if not isinstance(self.index, Tensor):
            raise MaskError(f"a selection of {self.kind} needs an index tensor")
        dim = _DIM.get(self.kind, -1)
        if dim >= len(shape):
            raise MaskError(f"a parameter of shape {shape} has no {self.kind}")
        length = self.numel if dim < 0 else shape[dim]
        object.__setattr__(self, "index", _checked(self.index, length, self.numel, self.kind))

    def simplest(self) -> "Selection":
        """The same coordinates, as "all" or "none" if they are that."""
        return self if self.index is None else self._like(self.kind, self.index)

    @classmethod
    def known(cls, kind: SelectionKind, shape: tuple[int, ...], index: Tensor) -> "Selection":
        """A selection of positions that a kernel has made, on the CPU: nothing is checked."""
        made = object.__new__(cls)
        for key, value in (("kind", kind), ("shape", shape), ("index", index), ("_moved", {})):
            object.__setattr__(made, key, value)
        return made

    # --- numbers ---------------------------------------------------------------------------------

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def count(self) -> int:
        """Elements selected."""
        if self.index is None:
            return self.numel if self.kind == "all" else 0
        if self.kind == "elements" or not self.index.numel():
            return self.index.numel()
        return self.index.numel() * (self.numel // self.shape[_DIM[self.kind]])

    @property
    def density(self) -> float:
        """Selected fraction."""
        return self.count / max(self.numel, 1)

    def flat(self) -> Tensor:
        """The flat positions of all selected elements, ascending, on the CPU."""
        dtype = ops.index_dtype(self.numel)
        if self.kind == "all":
            return torch.arange(self.numel, dtype=dtype)
        if self.index is None:
            return torch.empty(0, dtype=dtype)
        if self.kind == "elements":
            return self.index
        dim = _DIM[self.kind]
        outer, inner = _product(self.shape[:dim]), _product(self.shape[dim + 1 :])
        starts = torch.arange(outer, dtype=dtype)[:, None] * self.shape[dim] + self.index
        return (starts[:, :, None] * inner + torch.arange(inner, dtype=dtype)).reshape(-1)

    def positions(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The index on a device, kept there for the next call."""
        assert self.index is not None
        dtype = self.index.dtype if dtype is None else dtype
        if device.type == "cpu" and dtype == self.index.dtype:
            return self.index
        key = (device, dtype)
        if key not in self._moved:
            self._moved[key] = self.index.to(device, dtype)
        return self._moved[key]

    # --- sets ------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        """Whether the same coordinates are selected, whatever the kind."""
        if not isinstance(other, Selection):
            return NotImplemented
        if self.shape != other.shape or self.count != other.count:
            return False
        if self.kind == other.kind:
            a, b = self.index, other.index
            return a is b or (a is not None and b is not None and torch.equal(a, b))
        return torch.equal(self.flat(), other.flat())

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: "Selection") -> "Selection":
        """Coordinates in both."""
        if self._other(other).kind == "all" or self.kind == "none":
            return self
        if self.kind == "all" or other.kind == "none":
            return other
        a, b, kind = self._pair(other)
        return self._like(kind, ops.intersection(a, b))

    def __or__(self, other: "Selection") -> "Selection":
        """Coordinates in either."""
        if self._other(other).kind == "none" or self.kind == "all":
            return self
        if self.kind == "none" or other.kind == "all":
            return other
        a, b, kind = self._pair(other)
        return self._like(kind, ops.union(a, b))

    def __sub__(self, other: "Selection") -> "Selection":
        """Coordinates in this one only."""
        if self._other(other).kind == "none" or self.kind == "none":
            return self
        if other.kind == "all":
            return Selection("none", self.shape)
        if self.kind == "all":
            return ~other
        a, b, kind = self._pair(other)
        return self._like(kind, ops.difference(a, b))

    def __invert__(self) -> "Selection":
        """Coordinates that are not selected."""
        if self.index is None:
            return Selection("none" if self.kind == "all" else "all", self.shape)
        length = self.numel if self.kind == "elements" else self.shape[_DIM[self.kind]]
        return self._like(self.kind, ops.complement(self.index, length))

    def _other(self, other: "Selection") -> "Selection":
        if self.shape != other.shape:
            raise MaskError(f"selections of different shapes: {self.shape} and {other.shape}")
        return other

    def _pair(self, other: "Selection") -> tuple[Tensor, Tensor, SelectionKind]:
        if self.kind == other.kind and self.index is not None and other.index is not None:
            return self.index, other.index, self.kind
        return self.flat(), other.flat(), "elements"

    def _like(self, kind: SelectionKind, index: Tensor) -> "Selection":
        """A selection in its simplest form."""
        length = self.numel if kind == "elements" else self.shape[_DIM[kind]]
        if index.numel() == 0:
            return Selection("none", self.shape)
        if index.numel() == length:
            return Selection("all", self.shape)
        return Selection.known(kind, self.shape, index)

    # --- values ----------------------------------------------------------------------------------

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of the selected values: [k], [r, ...], [rows, c, ...] or the parameter's."""
        if self.kind == "all":
            return self.shape
        if self.index is None:
            return (0,)
        if self.kind == "elements":
            return (self.index.numel(),)
        shape = list(self.shape)
        shape[_DIM[self.kind]] = self.index.numel()
        return tuple(shape)

    def gather(self, tensor: Tensor, name: str = "the parameter") -> Tensor:
        """The selected values in float32 (float64 for float64), in their natural shape.

        A selection of ``all`` gives the tensor itself if it has that dtype already.
        """
        self._fits(tensor, name)
        if self.kind == "elements":
            return ops.gather(tensor, self.positions(tensor.device), name)
        return self._part(tensor).to(ops.value_dtype(tensor.dtype))

    def gather_add_(self, out: Tensor, tensor: Tensor, name: str) -> None:
        """``out += gather(tensor)``, in the dtype of `out`."""
        self._fits(tensor, name)
        self._fit_values(out, name)
        if self.kind == "elements":
            ops.gather_add_(out, tensor, self.positions(tensor.device), name)
            return
        out.detach().add_(self._part(tensor).to(out.dtype))

    def scatter_(self, param: Tensor, values: Tensor, name: str) -> None:
        """Writes values into the selected coordinates, rounded once to the parameter's dtype."""
        self._fits(param, name)
        self._fit_values(values, name)
        if self.kind == "elements":
            ops.scatter_(param, self.positions(param.device), values, name)
            return
        self._write(param, values.detach().to(param.dtype))

    def take(self, param: Tensor, name: str = "the parameter") -> Tensor:
        """A copy of the selected values, bit for bit, in the parameter's dtype."""
        self._fits(param, name)
        if self.kind == "elements":
            return ops.take(param, self.positions(param.device), name)
        part = self._part(param)
        return part.clone() if self.kind == "all" else part

    def put_(self, param: Tensor, values: Tensor, name: str) -> None:
        """Writes values of the parameter's dtype into the selected coordinates, bit for bit."""
        self._fits(param, name)
        self._fit_values(values, name)
        if values.dtype != param.dtype:
            raise LayoutError(f"values of {name} are {values.dtype}, the weight {param.dtype}")
        if self.kind == "elements":
            ops.put_(param, self.positions(param.device), values, name)
            return
        self._write(param, values.detach())

    def _part(self, tensor: Tensor) -> Tensor:
        plain = tensor.detach()
        if self.kind == "all":
            return plain
        if self.index is None:
            return plain.new_empty(0)
        return plain.index_select(_DIM[self.kind], self.positions(tensor.device))

    def _write(self, param: Tensor, values: Tensor) -> None:
        plain = param.detach()  # shares the version counter, so autograd notices
        if self.kind == "all":
            plain.copy_(values)
        elif self.index is not None:
            where = self.positions(param.device, torch.int64)
            plain.index_copy_(_DIM[self.kind], where, values.to(param.device))

    def _fits(self, tensor: Tensor, name: str) -> None:
        if tuple(tensor.shape) != self.shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}; its selection is for {self.shape}"
            )

    def _fit_values(self, values: Tensor, name: str) -> None:
        if tuple(values.shape) != self.value_shape:
            raise ShapeError(
                f"values of {name} have shape {tuple(values.shape)}; wanted {self.value_shape}"
            )


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _checked(index: Tensor, length: int, numel: int, kind: str) -> Tensor:
    """An index in its one form, or a MaskError."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise MaskError(
            f"the index of a selection of {kind} is {index.dtype} of shape {tuple(index.shape)}; "
            "wanted int32 or int64 in one dimension"
        )
    index = index.detach().cpu().contiguous()
    if index.numel():
        if int(index[0]) < 0 or int(index[-1]) >= length:
            raise MaskError(
                f"an index of {kind} goes from {int(index[0])} to {int(index[-1])}; "
                f"wanted 0 to {length - 1}"
            )
        if not bool((index[1:] > index[:-1]).all()):
            raise MaskError(f"an index of {kind} is not ascending and unique")
    return index.to(ops.index_dtype(numel))
