"""`select`: from a score and a budget to a mask.

What competes is cut into parts, each a vector of scores of units (elements, rows, columns, blocks,
tensors or layers); parts that share a budget are ranked together by the exact top-k of `retouch.ops`, with
ties to the lowest (part, position); the chosen units become selections.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retouch import ops
from retouch.batches import Batches
from retouch.collected import Collected
from retouch.config import BUDGETS, SelectConfig, resolve
from retouch.eligible import Candidate, as_matrices, as_units, candidates, from_units
from retouch.errors import BudgetError, HyperparameterError
from retouch.masks import Mask
from retouch.passes import LossFn, undisturbed
from retouch.scores import Magnitude, Score, as_score
from retouch.selection import Selection

__all__ = ["select"]


def select(
    model: nn.Module,
    config: SelectConfig | str,
    data: Any = None,
    *,
    loss_fn: LossFn | None = None,
    **overrides: Any,
) -> Mask:
    """Selects the coordinates of a model that may move.

    The model is left as it was: gradients, `requires_grad`, modes, buffers and the random states of
    Python, numpy and torch. An autocast context around the call applies to scoring.

    Args:
        model: The model; whether its parameters require gradients plays no part.
        config: A `SelectConfig`, the name of a recipe (`retouch.recipes.list()`), or of a score.
        data: For scores that need data: a `DataLoader` or list of batches, or one batch. A mapping
            is passed as ``model(**batch)``, a tuple as ``model(*batch)``.
        loss_fn: ``loss_fn(model, batch)`` gives the loss; default ``model(**batch).loss``.
        **overrides: Fields of `SelectConfig` that replace those of `config`; a budget replaces any
            other budget.

    Returns:
        The mask. Its metadata hold the config, the seed, the score and the id of the model.

    Raises:
        HyperparameterError: An unknown name or value, or nothing that could be selected.
        BudgetError: The budget selects nothing, or more than there is.
        ScoreError: No data or loss where the score needs them, or scores that are NaN.
        EngineError: A gradient score of a model that is wrapped.

    Example:
        >>> mask = retouch.select(model, "fisher", data=loader, density=0.005)
    """
    config = resolve(config, overrides)
    found = candidates(model, config)
    masked = {name: c for name, c in found.items() if c.state == "masked"}
    full = {name: c for name, c in found.items() if c.state == "full"}
    chosen = {name: Selection("all", c.shape) for name, c in full.items()}
    score = None
    if masked:
        score = as_score("random" if config.score is None else config.score, config.seed)
        chosen |= _choose(model, config, score, masked, full, data, loss_fn)
    chosen = {name: chosen[name] for name in found if name in chosen and chosen[name].count}
    if not chosen:
        raise BudgetError(
            f"the budget ({_budget(config)}) selects nothing of "
            f"{sum(c.numel for c in masked.values()):,} eligible coordinates in {len(masked)} "
            "parameters; raise it"
        )
    metadata = {
        "config": config.to_dict(),
        "seed": config.seed,
        "score": None if score is None else repr(score),
        "model": _model_id(model),
        "eligible": sum(c.numel for c in masked.values()),
    }
    return Mask(chosen, model, metadata)


# --- parts that compete ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Scores of units, and what becomes of the chosen ones.

    Attributes:
        name: For errors: a parameter, or a layer.
        group: What shares its budget.
        values: Scores of the units, of any shape.
        units: Their number.
        selections: From ascending flat positions in `values` to selections.
    """

    name: str
    group: str
    values: Tensor
    units: int
    selections: Callable[[Tensor], dict[str, Selection]]


def _choose(
    model: nn.Module,
    config: SelectConfig,
    score: Score,
    masked: Mapping[str, Candidate],
    full: Mapping[str, Candidate],
    data: Any,
    loss_fn: LossFn | None,
) -> dict[str, Selection]:
    _check_columns(config, masked)
    absolute = _ranks_weights_themselves(config, score, masked)
    scores: Mapping[str, Tensor] = {}
    if config.direction == "random":
        pass  # a number per unit is enough, see _values
    elif absolute:
        scores = {name: c.param.detach() for name, c in masked.items()}
    else:
        if data is not None and not isinstance(data, Collected):
            data = Batches(data, samples=config.samples, max_batches=config.max_batches)
        with undisturbed(model, config.seed):
            scores = score(model, masked, data, loss_fn)
    if config.scope in ("row", "group"):
        return _choose_in_rows(config, masked, scores, absolute)
    parts = _parts(config, masked, scores)
    largest = config.direction != "bottom"
    names, values = [p.name for p in parts], [p.values for p in parts]
    if config.threshold is not None:
        picked = ops.threshold(values, names, config.threshold, largest=largest, absolute=absolute)
        return _together(parts, picked)
    chosen: dict[str, Selection] = {}
    for group in dict.fromkeys(p.group for p in parts):
        members = [p for p in parts if p.group == group]
        if config.lora_rank is not None:
            k = _size_of_lora(masked[group], config.lora_rank)
        else:
            k = _number(config, sum(p.units for p in members), group, full)
        picked = ops.topk(
            [p.values for p in members], [p.name for p in members], k,
            largest=largest, absolute=absolute,
        )  # fmt: skip
        chosen |= _together(members, picked)
    return chosen


def _together(parts: Sequence[_Part], picked: Sequence[Tensor]) -> dict[str, Selection]:
    chosen: dict[str, Selection] = {}
    for part, positions in zip(parts, picked, strict=True):
        chosen |= part.selections(positions)
    return chosen


def _ranks_weights_themselves(
    config: SelectConfig, score: Score, masked: Mapping[str, Candidate]
) -> bool:
    """Whether top-k can read the weights, so that no tensor of scores need be made."""
    dtypes = {c.param.dtype for c in masked.values()}
    return (
        isinstance(score, Magnitude)
        and config.granularity == "element"
        and config.direction != "random"
        and len(dtypes) == 1
    )


def _parts(
    config: SelectConfig, masked: Mapping[str, Candidate], scores: Mapping[str, Tensor]
) -> list[_Part]:
    if config.granularity == "layer":
        layers: dict[str, list[Candidate]] = {}
        for name, c in masked.items():
            layers.setdefault(c.layer or name, []).append(c)
        return [_layer_part(config, name, members, scores) for name, members in layers.items()]
    return [_part(config, c, scores.get(name)) for name, c in masked.items()]


def _part(config: SelectConfig, candidate: Candidate, score: Tensor | None) -> _Part:
    name, shape = candidate.name, candidate.shape
    group = {"global": "", "layer": candidate.layer or name, "tensor": name}[config.scope]
    if config.granularity == "element":
        if score is None:
            score = ops.uniform(shape, config.seed, name, "cpu")
        return _Part(
            name, group, score, candidate.numel,
            lambda index: {name: _plain(Selection("elements", shape, index))},
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
    return _Part(
        name, group, values, units, lambda index: {name: _units_selection(index, shape, dims)}
    )


def _block_part(
    config: SelectConfig, candidate: Candidate, group: str, score: Tensor | None
) -> _Part:
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

    return _Part(name, group, values, units, selections)


def _layer_part(
    config: SelectConfig, name: str, members: list[Candidate], scores: Mapping[str, Tensor]
) -> _Part:
    if config.direction == "random":
        values = ops.uniform((1,), config.seed, name, "cpu")
    else:
        rows = [as_units(scores[c.name], c.row_dims) for c in members]
        values = _whole(rows, config.aggregate)

    def selections(index: Tensor) -> dict[str, Selection]:
        return {c.name: Selection("all", c.shape) for c in members} if index.numel() else {}

    return _Part(name, "", values, 1, selections)


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


def _plain(selection: Selection) -> Selection:
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


# --- rows with a budget each ---------------------------------------------------------------------------


def _choose_in_rows(
    config: SelectConfig,
    masked: Mapping[str, Candidate],
    scores: Mapping[str, Tensor],
    absolute: bool,
) -> dict[str, Selection]:
    chosen = {}
    quotas = _allocated(config, masked, scores, absolute) if config.allocation is not None else {}
    for name, c in masked.items():
        score = scores.get(name)
        if score is None:
            score = ops.uniform(c.shape, config.seed, name, "cpu")
        rows = as_units(score, c.row_dims)
        if not rows.numel():
            continue
        if config.group_size is not None:
            rows = _groups(rows, config.group_size, name)
        k = config.k_per_row if config.k_per_row is not None else config.k
        if k is None:
            k = _floor(config.density, rows.shape[1])
        if k > rows.shape[1]:
            raise BudgetError(
                f"cannot select {k} in each {config.scope} of {name}, whose {config.scope}s have "
                f"{rows.shape[1]} elements"
            )
        k = min(quotas.get(name, k), rows.shape[1])
        index = ops.topk_rows(
            rows, name, k, largest=config.direction != "bottom", absolute=absolute
        )
        chosen[name] = _plain(
            Selection("elements", c.shape, from_units(index, c.shape, c.row_dims))
        )
    return chosen


def _groups(rows: Tensor, size: int, name: str) -> Tensor:
    """Rows cut into groups of consecutive elements."""
    if rows.shape[1] % size:
        raise HyperparameterError(
            f"the rows of {name} have {rows.shape[1]} elements, which cannot be cut into groups of "
            f"{size}: use another group_size, or leave it out (exclude_modules)"
        )
    return rows.reshape(-1, size)


def _allocated(
    config: SelectConfig,
    masked: Mapping[str, Candidate],
    scores: Mapping[str, Tensor],
    absolute: bool,
) -> dict[str, int]:
    """How many to select in each row of a tensor, by its hits in a selection over all tensors."""
    total = _floor(config.allocation, sum(c.numel for c in masked.values()))
    picked = ops.topk(
        [scores[n] for n in masked], list(masked), total,
        largest=config.direction != "bottom", absolute=absolute,
    )  # fmt: skip
    hits = {name: index.numel() for name, index in zip(masked, picked, strict=True)}
    fewest = min((n for n in hits.values() if n), default=1)
    least = config.k_per_row or 1
    # rounded half up, in whole numbers
    return {name: max(least, (2 * least * n + fewest) // (2 * fewest)) for name, n in hits.items()}


# --- budgets ---------------------------------------------------------------------------------------------


def _floor(density: float | None, units: int) -> int:
    """floor(density * units) with the decimal digits of the density."""
    return math.floor(Fraction(str(density)) * units)


def _size_of_lora(candidate: Candidate, rank: int) -> int:
    count, rows, columns = candidate.matrix
    return min(count * rank * (rows + columns), candidate.numel)


def _number(config: SelectConfig, units: int, group: str, full: Mapping[str, Candidate]) -> int:
    """How many units of a group to select."""
    counted = sum(c.numel for c in full.values() if config.counts(c.kind))
    k = config.k if config.k is not None else _floor(config.density, units + counted)
    if counted:
        if k <= counted:
            kinds = ", ".join(sorted({c.kind for c in full.values() if config.counts(c.kind)}))
            raise BudgetError(
                f"the budget of {k:,} coordinates ({_budget(config)}) is used up by "
                f"{counted:,} that are trained whole ({kinds}): raise it, let them compete "
                "(for example heads='masked'), or set counted_in_budget=False"
            )
        k -= counted
    if k > units:
        where = f" of {group}" if group else ""
        raise BudgetError(f"cannot select {k:,} of {units:,} eligible {config.granularity}s{where}")
    return k


def _budget(config: SelectConfig) -> str:
    for name in BUDGETS:
        if getattr(config, name) is not None:
            return f"{name}={getattr(config, name)}"
    return "no budget"


def _check_columns(config: SelectConfig, masked: Mapping[str, Candidate]) -> None:
    without = [c.name for c in masked.values() if c.column_dims is None]
    if config.granularity == "column" and without:
        raise HyperparameterError(
            f"{', '.join(without[:3])} {'has' if len(without) == 1 else 'have'} no columns: train "
            "biases and norms whole or not at all (biases='full' or 'frozen')"
        )


def _model_id(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None
