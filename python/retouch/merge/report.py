"""What a merge did to every tensor, and what looks wrong about it.

One pass over the written output beside its inputs, a stretch of a tensor at a time.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retouch.merge.plan import Input, Plan, TensorPlan

if TYPE_CHECKING:
    from retouch.merge.sources import Reader

__all__ = ["REPORT", "Report", "TensorReport", "survey", "warnings"]

REPORT = "merge_report.json"
STRETCH = 1 << 22  # elements that are widened to float64 at a time
STRANGER = 1.0  # |model - base| / |base| from which a model is hardly a fine-tune of the base
LOUD = 2.0  # |merged - base| / largest |model - base| from which the change was blown up


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the output.

    Attributes:
        name: Its name.
        method: What merged it; None: it was copied.
        bad: How many values are NaN or infinite.
        norm: Of the output.
        base_norm: Of the base; None without one.
        change: |output - base|.
        changes: |model - base| of each model.
        moved: How many values differ from the base's.
        numel: How many there are.
    """

    name: str
    method: str | None
    bad: int
    norm: float
    numel: int
    base_norm: float | None = None
    change: float | None = None
    changes: tuple[float, ...] = ()
    moved: int | None = None

    @property
    def ratio(self) -> float | None:
        """|output - base| over the largest |model - base|; None where nothing was changed."""
        largest = max(self.changes, default=0.0)
        return None if self.change is None or not largest else self.change / largest


@dataclass(frozen=True)
class Report:
    """What a merge did.

    Attributes:
        tensors: Every tensor of the output.
        warnings: What looks wrong, most serious first.
        untouched: Tensors that were merged and are those of the base, bit for bit.
        copied: Tensors that no method touched.
        missing: Tensors of the inputs that the output has not.
        strangers: For each model that is hardly a fine-tune of the base: |model - base| / |base|.
        notes: How the plan was made.
    """

    tensors: tuple[TensorReport, ...]
    warnings: tuple[str, ...]
    untouched: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    strangers: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: numbers that JSON has not (NaN, infinity) are None."""
        raw = asdict(self)
        for row, tensor in zip(raw["tensors"], self.tensors, strict=True):
            row["ratio"] = tensor.ratio
        return _finite(raw)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """The text of the file `REPORT`."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def survey(
    plan: Plan,
    readers: Mapping[str, "Reader"],
    output: Callable[[str], Tensor],
    *,
    notes: tuple[str, ...] = (),
) -> Report:
    """Compares what was written with what it was made of.

    Args:
        plan: What was carried out.
        readers: Its sources by id.
        output: Gives a tensor of the output by its name.
        notes: How the plan was made.

    Returns:
        Norms and counts of each tensor, and warnings.
    """
    rows = [_tensor(entry, readers, output(entry.name)) for entry in plan.tensors]
    merged = [row for row in rows if row.method is not None]
    strangers = _strangers(plan, rows)
    read = {(i.source, i.tensor) for t in plan.tensors for i in _inputs(t)}
    whole = [source.id for source in plan.sources if source.kind == "checkpoint"]
    unread = {name for id in whole for name in readers[id].names() if (id, name) not in read}
    missing = sorted(unread - {entry.name for entry in plan.tensors})
    untouched = tuple(row.name for row in merged if row.moved == 0)
    far = [
        f"{source} differs from the base by {share:.0%} of the base's norm: is it a fine-tune of it?"
        for source, share in strangers.items()
    ]
    found = warnings(rows, far, ": smaller weights or normalize: true")
    if merged and len(untouched) == len(merged):
        found.append("the output is the base: no tensor was changed")
    return Report(
        tuple(rows), tuple(found), untouched,
        tuple(row.name for row in rows if row.method is None), tuple(missing), strangers, notes,
    )  # fmt: skip


def warnings(rows: Sequence[TensorReport], far: Sequence[str] = (), advice: str = "") -> list[str]:
    """What looks wrong in numbers and norms, `far` between the two; `advice` against loud changes."""
    merged = [row for row in rows if row.method is not None]
    found = [f"{r.name}: {r.bad:,} values are NaN or infinite" for r in rows if r.bad]
    found += far
    loud = [r for r in merged if r.ratio is not None and r.ratio > LOUD]
    if loud:
        worst = max(loud, key=lambda r: r.ratio or 0.0)
        found.append(
            f"{len(loud)} tensors moved farther than any model did, {worst.name} "
            f"{worst.ratio:.1f} times as far{advice}"
        )
    return found


def _inputs(entry: TensorPlan) -> tuple[Input, ...]:
    return entry.inputs if entry.base is None else (entry.base, *entry.inputs)


def _strangers(plan: Plan, rows: list[TensorReport]) -> dict[str, float]:
    """Models that are as far from the base as the base is long."""
    totals: dict[str, float] = {}
    lengths: dict[str, float] = {}
    for entry, row in zip(plan.tensors, rows, strict=True):
        for given, change in zip(entry.inputs, row.changes, strict=False):
            totals[given.source] = totals.get(given.source, 0.0) + change**2
            lengths[given.source] = lengths.get(given.source, 0.0) + (row.base_norm or 0.0) ** 2
    shares = {s: math.sqrt(totals[s] / lengths[s]) for s in totals if lengths[s] > 0}
    return {source: share for source, share in shares.items() if share >= STRANGER}


def _tensor(entry: TensorPlan, readers: Mapping[str, "Reader"], out: Tensor) -> TensorReport:
    flat = out.reshape(-1)
    if entry.method is None or not out.is_floating_point():
        bad, norm = _measure(flat)
        return TensorReport(entry.name, entry.method, bad, norm, out.numel())
    bad, norm = _measure(flat)
    if entry.base is None:
        return TensorReport(entry.name, entry.method, bad, norm, out.numel())
    base = readers[entry.base.source].read(entry.base.tensor).reshape(-1)
    models = [readers[i.source].read(i.tensor).reshape(-1) for i in entry.inputs]
    squares = [0.0] * len(models)
    change = length = 0.0
    moved = 0
    for start in range(0, out.numel(), STRETCH):
        part = slice(start, start + STRETCH)
        origin = base[part].double()
        length += float(origin.square().sum())
        difference = flat[part].double() - origin
        moved += int(difference.ne(0).sum())
        change += float(difference.square().sum())
        for i, model in enumerate(models):
            squares[i] += float((model[part].double() - origin).square().sum())
    return TensorReport(
        entry.name, entry.method, bad, norm, out.numel(), math.sqrt(length), math.sqrt(change),
        tuple(math.sqrt(s) for s in squares), moved,
    )  # fmt: skip


def _measure(flat: Tensor) -> tuple[int, float]:
    """How many values are NaN or infinite, and the norm."""
    bad, square = 0, 0.0
    for start in range(0, flat.numel(), STRETCH):
        part = flat[start : start + STRETCH].double()
        bad += int(part.isfinite().logical_not().sum())
        square += float(part.square().sum())
    return bad, math.sqrt(square) if square == square else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
