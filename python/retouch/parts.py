"""What competes, cut into parts: vectors of scores of units, and what becomes of chosen units."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from retouch import ops
from retouch.config import SelectConfig
from retouch.eligible import Candidate, as_matrices, as_units, from_units
from retouch.errors import HyperparameterError
from retouch.selection import Selection

__all__ = ["Part", "parts", "plain"]


@dataclass(frozen=True)
class Part:
    """Scores of units, and what becomes of the chosen ones.

    Attributes:
        name: For errors: a parameter, or a layer.
        group: What shares its budget.
        values: Scores of the units, of any shape.
        units: Their number.
        selections: From ascending flat positions in `values` to selections.
        place: What groups of other layers it shares with them what a density leaves over.
    """

    name: str
    group: str
    values: Tensor
    units: int
    selections: Callable[[Tensor], dict[str, Selection]]
    place: str = ""


def parts(
    config: SelectConfig, masked: Mapping[str, Candidate], scores: Mapping[str, Tensor]
) -> list[Part]:
    """The parts in the order of the model.

    Args:
        config: Its granularity, scope, aggregate and block_size.
        masked: What competes.
        scores: Of each; empty for ``direction="random"``, where a number for each unit is enough.

    Raises:
        HyperparameterError: A parameter has no units of this granularity.
    """
    if config.granularity == "layer":
        layers: dict[str, list[Candidate]] = {}
        for name, c in masked.items():
            layers.setdefault(c.layer or name, []).append(c)
        return [_layer_part(config, name, members, scores) for name, members in layers.items()]
    if config.granularity == "expert":
        modules: dict[str, list[Candidate]] = {}
        for name, c in masked.items():
            modules.setdefault(name.rpartition(".")[0], []).append(c)
        return [_expert_part(config, name, members, scores) for name, members in modules.items()]
    return [_part(config, c, scores.get(name)) for name, c in masked.items()]


def _part(config: SelectConfig, candidate: Candidate, score: Tensor | None) -> Part:
    name, shape = candidate.name, candidate.shape
    siblings, place = _siblings(candidate)
    group = {
        "global": "", "layer": candidate.layer or name, "tensor": name, "siblings": siblings,
    }[config.scope]  # fmt: skip
    if config.granularity == "element":
        if score is None:
            score = ops.uniform(shape, config.seed, name, "cpu")
        return Part(
            name, group, score, candidate.numel,
            lambda index: {name: plain(_elements(shape, index))},
        )  # fmt: skip
    if config.granularity == "block":
        return _block_part(config, candidate, group, score)
    dims: tuple[int, ...] = ()  # the tensor is one unit
    if config.granularity != "tensor":
        dims = candidate.row_dims if config.granularity == "row" else candidate.column_dims or ()
    units = math.prod(shape[d] for d in dims)
    if score is None:
        values = ops.uniform((units,), config.seed, name, "cpu")
    else:
        values = _aggregated(score, dims, candidate.row_dims, config.aggregate)
    return Part(
        name, group, values, units, lambda index: {name: _units_selection(index, shape, dims)},
        place,
    )  # fmt: skip


def _elements(shape: tuple[int, ...], index: Tensor) -> Selection:
    index = index.to("cpu", ops.index_dtype(math.prod(shape)))
    return Selection.known("elements", shape, index)


def _siblings(candidate: Candidate) -> tuple[str, str]:
    """The modules of its kind beside its own, and what they are in any layer."""
    holder = candidate.name.rpartition(".")[0].rpartition(".")[0]
    in_layer = holder.removeprefix(candidate.layer or "").lstrip(".")
    return f"{holder} ({candidate.kind})", f"{in_layer} ({candidate.kind})"


def _block_part(
    config: SelectConfig, candidate: Candidate, group: str, score: Tensor | None
) -> Part:
    name, shape = candidate.name, candidate.shape
    size = config.block_size or 1
    count, rows, columns = candidate.matrix
    down, across = -(-rows // size), -(-columns // size)
    units = count * down * across
    if score is None:
        values = ops.uniform((units,), config.seed, name, "cpu")
    else:
        edge = (0, across * size - columns, 0, down * size - rows)
        grid = nn.functional.pad(as_matrices(score, candidate), edge)
        grid = grid.reshape(count, down, size, across, size).transpose(2, 3)
        heights = torch.full((down,), size).clamp(max=rows - size * torch.arange(down))
        widths = torch.full((across,), size).clamp(max=columns - size * torch.arange(across))
        sizes = (heights[:, None] * widths).flatten().repeat(count).to(score.device)
        sums = _sums(grid.reshape(units, size * size), config.aggregate)
        values = _finished(sums, sizes, config.aggregate)

    def selections(index: Tensor) -> dict[str, Selection]:
        if index.numel() in (0, units):
            return {name: Selection("all" if index.numel() else "none", shape)}
        index = index.cpu().to(torch.int64)[:, None, None]
        row = index // across % down * size + torch.arange(size)[:, None]
        column = index % across * size + torch.arange(size)
        matrix = index // (across * down)
        flat = ((matrix * rows + row) * columns + column)[(row < rows) & (column < columns)]
        where = from_units(flat.sort().values, shape, candidate.row_dims)
        return {name: Selection("elements", shape, where)}

    return Part(name, group, values, units, selections)


def _expert_part(
    config: SelectConfig, module: str, members: list[Candidate], scores: Mapping[str, Tensor]
) -> Part:
    """The experts of one module: a unit is an expert's part of all its parameters that compete."""
    for c in members:
        if c.experts is None:
            raise HyperparameterError(
                f"{c.name} of shape {c.shape} holds no fused experts, and granularity='expert' is for "
                "these alone: name them in target_modules, or train it whole (modules_to_save)"
            )
    units = members[0].experts or 0
    if config.direction == "random":
        values = ops.uniform((units,), config.seed, module, "cpu")
    else:
        each = [as_units(scores[c.name], (0,)) for c in members]
        sums = torch.stack([_sums(one, config.aggregate) for one in each]).sum(0)
        values = _finished(sums, sum(one.shape[1] for one in each), config.aggregate)

    def selections(index: Tensor) -> dict[str, Selection]:
        return {c.name: _units_selection(index, c.shape, (0,)) for c in members}

    group = "" if config.scope == "global" else members[0].layer or module
    return Part(module, group, values, units, selections)


def _layer_part(
    config: SelectConfig, name: str, members: list[Candidate], scores: Mapping[str, Tensor]
) -> Part:
    if config.direction == "random":
        values = ops.uniform((1,), config.seed, name, "cpu")
    else:
        rows = [as_units(scores[c.name], c.row_dims) for c in members]
        values = _whole(rows, config.aggregate)

    def selections(index: Tensor) -> dict[str, Selection]:
        return {c.name: Selection("all", c.shape) for c in members} if index.numel() else {}

    return Part(name, "", values, 1, selections)


def _units_selection(index: Tensor, shape: tuple[int, ...], dims: tuple[int, ...]) -> Selection:
    """The selection of whole units: rows or columns as stored where that is what they are."""
    units = math.prod(shape[d] for d in dims)
    if index.numel() in (0, units):
        return Selection("all" if index.numel() else "none", shape)
    if dims == (0,):
        return Selection("rows", shape, index)
    if dims == (1,):
        return Selection("columns", shape, index)
    size = math.prod(shape) // units
    positions = index.to(torch.int64)[:, None] * size + torch.arange(size, device=index.device)
    return Selection("elements", shape, from_units(positions.reshape(-1), shape, dims))


def plain(selection: Selection) -> Selection:
    """The selection as "all" if it is that."""
    return Selection("all", selection.shape) if selection.count == selection.numel else selection


# --- scores of larger units --------------------------------------------------------------------------


# torch sums to a single number with as many partial sums as there are threads. Sums of rows, one number
# each, and numpy's sums do not depend on threads.


def _aggregated(
    score: Tensor, dims: tuple[int, ...], row_dims: tuple[int, ...], aggregate: str
) -> Tensor:
    """One float32 score per unit, summed in float64."""
    if not dims:
        return _whole([as_units(score, row_dims)], aggregate)
    units = as_units(score, dims)
    return _finished(_sums(units, aggregate), units.shape[1], aggregate)


def _whole(parts: list[Tensor], aggregate: str) -> Tensor:
    """One float32 score for several tensors of rows together."""
    sums = np.concatenate([_sums(part, aggregate).cpu().numpy() for part in parts])
    count = sum(part.numel() for part in parts)
    return _finished(torch.from_numpy(np.sum(sums, keepdims=True)), count, aggregate)


def _sums(units: Tensor, aggregate: str) -> Tensor:
    """Float64 sums (of squares for l2) of each unit."""
    wide = units.to(torch.float64) if aggregate == "l2" or units.shape[0] == 1 else units
    if aggregate == "l2":
        wide = wide * wide
    if units.shape[0] == 1:
        return torch.from_numpy(np.sum(wide.cpu().numpy(), axis=1))
    return wide.sum(1, dtype=torch.float64)


def _finished(sums: Tensor, count: int | Tensor, aggregate: str) -> Tensor:
    if aggregate in ("mean", "abs_of_mean"):
        sums = sums / (count if isinstance(count, Tensor) else max(count, 1))
    if aggregate == "abs_of_mean":
        sums = sums.abs()
    elif aggregate == "l2":
        sums = sums.sqrt()
    return sums.to(torch.float32)
