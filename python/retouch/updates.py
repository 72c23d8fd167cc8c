"""How sparse an update is: the measurements of arXiv 2505.11711, and what they depend on.

A weight counts as unchanged if its bits, or its value within a tolerance, are those of the base. Both
depend on the dtype that the weights are stored in: bfloat16 has a spacing of 0.4 to 0.8 % of a weight,
and a smaller update is lost in it, so the same training looks sparser than in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retouch.deltaentry import Entry
from retouch.deltasource import Source
from retouch.deltaview import ulps
from retouch.errors import FormatError
from retouch.masks import Mask, Selection
from retouch.slots import same_bits

if TYPE_CHECKING:
    from retouch.delta import Delta

__all__ = ["Updates", "mask_of", "measure"]

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Updates:
    """What moved between two models, of their floating-point tensors.

    Attributes:
        numel: Weights in all; of the changed tensors alone if the base was not given.
        changed: Weights whose bits differ.
        beyond: Weights that differ by more than `atol`.
        atol: The tolerance.
        one_ulp: Changed weights that moved to the next float and no further.
        densities: Changed fraction of each tensor, by name.
        ranks: Rank of the change of each matrix by its shorter side; empty unless asked for.
        dtypes: Weights by dtype.
        warnings: What to bear in mind with these figures.
    """

    numel: int
    changed: int
    beyond: int
    atol: float
    one_ulp: int
    densities: Mapping[str, float] = field(repr=False)
    ranks: Mapping[str, float] = field(repr=False)
    dtypes: Mapping[str, int]
    warnings: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that kept their bits."""
        return 1 - self.changed / max(self.numel, 1)

    @property
    def sparsity_at_tolerance(self) -> float:
        """Fraction of the weights that moved by at most `atol`."""
        return 1 - self.beyond / max(self.numel, 1)

    @property
    def mean_density(self) -> float:
        """Changed fraction, averaged over tensors of any size (what the paper prints per layer)."""
        return sum(self.densities.values()) / max(len(self.densities), 1)

    @property
    def mean_rank(self) -> float | None:
        """Rank of the change by the shorter side, averaged over matrices; None if not asked for."""
        return sum(self.ranks.values()) / len(self.ranks) if self.ranks else None

    def __str__(self) -> str:
        stored = ", ".join(f"{n:,} {dtype}" for dtype, n in self.dtypes.items())
        lines = [
            f"{self.changed:,} of {self.numel:,} weights changed: sparsity {self.sparsity:.2%}",
            f"  beyond {self.atol:g}: {self.beyond:,}, sparsity {self.sparsity_at_tolerance:.2%}",
            f"  to the next float and no further: {self.one_ulp:,}",
            f"  density averaged over tensors: {self.mean_density:.2%}",
            f"  stored as: {stored}",
        ]
        if self.mean_rank is not None:
            lines.append(f"  rank of the change, of the shorter side: {self.mean_rank:.1%}")
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def measure(delta: "Delta", base: Any, atol: float, ranks: bool) -> Updates:
    """See `Delta.updates`."""
    source = Source(base) if base is not None else None
    shapes, dtypes = _tensors(delta, source)
    changed = beyond = one_ulp = 0
    densities, by_rank = dict.fromkeys(shapes, 0.0), {}
    upcast = 0
    for name, entry in delta.items():
        if name not in shapes or entry.kind in ("added", "removed"):
            continue
        old, new = _both(name, entry, source)
        differs = ~same_bits(old, new)  # a whole tensor holds unchanged values too
        steps = ulps(old, new)
        changed += int(differs.sum())
        beyond += int((~torch.isclose(new.double(), old.double(), rtol=0.0, atol=atol)).sum())
        one_ulp += int(((steps == 1) & differs).sum())
        densities[name] = int(differs.sum()) / max(shapes[name].numel(), 1)
        if entry.dtype == torch.float32:
            upcast += _is_upcast(old) != _is_upcast(new)
        if ranks and len(entry.shape) == 2:
            by_rank[name] = _rank(entry, new.double() - old.double())
    numel = sum(shape.numel() for shape in shapes.values())
    warnings = []
    if source is None:
        warnings.append("only tensors that changed are counted: pass the base for all of them")
    half = [str(d).removeprefix("torch.") for d in _HALF if any(x == d for x in dtypes.values())]
    if half:
        warnings.append(
            f"weights are stored in {' and '.join(half)}: an update below half of their spacing is "
            "lost and counts as none; the same training in float32 would look denser"
        )
    if upcast:
        warnings.append(
            f"{upcast} float32 tensors hold values that were once in 16 bits in one of the two models "
            "and not in the other: some of the changes are rounding"
        )
    by_dtype: dict[str, int] = {}
    for name, dtype in dtypes.items():
        key = str(dtype).removeprefix("torch.")
        by_dtype[key] = by_dtype.get(key, 0) + shapes[name].numel()
    return Updates(
        numel, changed, beyond, atol, one_ulp, densities, by_rank, by_dtype, tuple(warnings)
    )


def mask_of(delta: "Delta") -> Mask:
    """See `Delta.mask`."""
    chosen = {}
    for name, entry in delta.items():
        if entry.index is not None:
            chosen[name] = Selection("elements", entry.shape, entry.index)
        elif entry.kind == "dense" and entry.old is not None and entry.value is not None:
            differs = ~same_bits(entry.old.reshape(-1), entry.value.reshape(-1))
            index = differs.nonzero().squeeze(1)
            chosen[name] = Selection("elements", entry.shape, index)
        elif entry.kind in ("dense", "dense-add", "low-rank"):
            chosen[name] = Selection("all", entry.shape)
    return Mask(chosen)


def _tensors(
    delta: "Delta", source: Source | None
) -> tuple[dict[str, torch.Size], dict[str, torch.dtype]]:
    """Shapes and dtypes of the floating-point tensors that count, each once."""
    shapes, dtypes = {}, {}
    if source is None:
        for name, entry in delta.items():
            if entry.dtype.is_floating_point and entry.kind not in ("added", "removed"):
                shapes[name], dtypes[name] = torch.Size(entry.shape), entry.dtype
        return shapes, dtypes
    for first, names in source.names.items():
        tensor = source.read[first]()
        if tensor.is_floating_point():
            name = next((n for n in names if n in delta), first)
            shapes[name], dtypes[name] = tensor.shape, tensor.dtype
    return shapes, dtypes


def _both(name: str, entry: Entry, source: Source | None) -> tuple[Tensor, Tensor]:
    """Old and new values of an entry, flat."""
    old = entry.old
    if old is None and source is not None:
        old = entry.read(source.read[name]())
    new = entry.after(old)
    if old is None or new is None:
        raise FormatError(
            f"the delta does not hold the old values of {name}: pass base=, the model that it is for"
        )
    return old.detach().reshape(-1).cpu(), new.detach().reshape(-1).cpu()


def _is_upcast(values: Tensor) -> bool:
    """Whether float32 values are all bfloat16 ones."""
    return bool((values.to(torch.bfloat16).float() == values).all())


def _rank(entry: Entry, change: Tensor) -> float:
    dense = torch.zeros(entry.shape, dtype=torch.float32).reshape(-1)
    where = slice(None) if entry.index is None else entry.index.long()
    dense[where] = change.float()
    rank = int(torch.linalg.matrix_rank(dense.view(entry.shape)))
    return rank / max(min(entry.shape), 1)
