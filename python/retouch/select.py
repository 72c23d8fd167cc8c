"""`select`: from a score and a budget to a mask.

What competes is cut into parts (`retouch.parts`); parts that share a budget are ranked together by the
exact top-k of `retouch.ops`, with ties to the lowest (part, position); the chosen units become
selections.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from retouch import ops, order
from retouch.batches import Batches
from retouch.collected import Collected
from retouch.config import BUDGETS, SelectConfig, resolve
from retouch.eligible import Candidate, as_units, candidates, from_units
from retouch.errors import BudgetError, HyperparameterError, ScoreError
from retouch.masks import Mask
from retouch.parts import Part, parts, plain
from retouch.passes import LossFn, undisturbed
from retouch.quotas import shares
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
    known = candidates(model, config)
    masked = {name: c for name, c in known.items() if c.state == "masked"}
    full = {name: c for name, c in known.items() if c.state == "full"}
    chosen = {name: Selection("all", c.shape) for name, c in full.items()}
    score = None
    if masked:
        score = as_score("random" if config.score is None else config.score, config.seed)
        picked = _choose(model, config, score, masked, full, data, loss_fn)
        if config.polarity == "freeze":
            none = {name: Selection("none", c.shape) for name, c in masked.items()}
            picked = {name: ~picked.get(name, none[name]) for name in masked}
        chosen |= picked
    chosen = {name: chosen[name] for name in known if name in chosen and chosen[name].count}
    if not chosen:
        frozen = config.polarity == "freeze"
        raise BudgetError(
            f"the budget ({_budget(config)}) {'freezes all' if frozen else 'selects nothing'} of "
            f"{sum(c.numel for c in masked.values()):,} eligible coordinates in {len(masked)} "
            f"parameters; {'lower' if frozen else 'raise'} it"
        )
    metadata = {
        "config": config.to_dict(),
        "seed": config.seed,
        "score": None if score is None else repr(score),
        "model": _model_id(model),
        "eligible": sum(c.numel for c in masked.values()),
    }
    return Mask(chosen, model, metadata)


# --- choosing ----------------------------------------------------------------------------------------


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
    made = score.made(masked, data) if _ranks_only(config) else None
    if config.direction == "random":
        pass  # a number per unit is enough, see `parts`
    elif made is not None:
        scores = made.values
    elif absolute:
        scores = {name: c.param.detach() for name, c in masked.items()}
    else:
        if data is not None and not isinstance(data, Collected):
            data = Batches(data, samples=config.samples, max_batches=config.max_batches)
        with undisturbed(model, config.seed):
            scores = score(model, masked, data, loss_fn)
    if config.scope in ("row", "group"):
        return _choose_in_rows(config, masked, scores, absolute)
    found = [_drawable(p, config) for p in parts(config, masked, scores)]
    largest = config.direction in ("top", "random")
    names, values = [p.name for p in found], [p.values for p in found]
    if config.threshold is not None:
        picked = ops.threshold(values, names, config.threshold, largest=largest, absolute=absolute)
        return _together(found, picked)
    if config.direction == "bernoulli":
        return _together(found, [order.drawn(p.values, config.seed, p.name) for p in found])
    groups: dict[str, list[Part]] = {}
    for part in found:
        groups.setdefault(part.group, []).append(part)
    quotas: Mapping[str, int] = {}
    if config.scope == "siblings":
        quotas = _quotas(config, groups)
    elif config.quota == "score":
        quotas = _by_score(config, groups)
    chosen: dict[str, Selection] = {}
    wanted: list[tuple[list[Part], list[str], list[Tensor], int]] = []
    for group, members in groups.items():
        names, values = [p.name for p in members], [p.values for p in members]
        if config.quantile is not None:
            picked = order.below_quantile(
                values, names, config.quantile, largest=largest, absolute=absolute
            )
            chosen |= _together(members, picked)
            continue
        if config.lora_rank is not None:
            k = _size_of_lora(masked[group], config.lora_rank)
        elif group in quotas:
            k = quotas[group]
        else:
            k = _number(config, sum(p.units for p in members), group, full)
        _check_positive(config, members, k)
        wanted.append((members, names, values, k))
    if made is not None:
        best = made.topk([n for _, n, _, _ in wanted], [k for *_, k in wanted], largest=largest)
    else:
        best = ops.topk_each(
            [v for _, _, v, _ in wanted], [n for _, n, _, _ in wanted], [k for *_, k in wanted],
            largest=largest, absolute=absolute,
        )  # fmt: skip
    for (members, names, values, k), picked in zip(wanted, best, strict=True):
        if config.ties == "all" and k:
            bound = order.worst(values, picked, largest=largest, absolute=absolute)
            picked = ops.threshold(values, names, bound, largest=largest, absolute=absolute)
        chosen |= _together(members, picked)
    return chosen


def _drawable(part: Part, config: SelectConfig) -> Part:
    """With scores that top-k turns into draws, for direction="weighted"."""
    if config.direction != "weighted":
        return part
    return replace(part, values=order.clocks(part.values, config.seed, part.name))


def _check_positive(config: SelectConfig, members: Sequence[Part], k: int) -> None:
    if config.direction == "weighted":
        positive = sum(int(torch.isfinite(p.values).sum()) for p in members)
        if k > positive:
            raise BudgetError(
                f"cannot draw {k:,} {config.granularity}s: only {positive:,} have a score above 0"
            )


def _quotas(config: SelectConfig, groups: Mapping[str, Sequence[Part]]) -> dict[str, int]:
    """How many of each set of siblings: the floor of the density, and at random what that leaves."""
    quotas: dict[str, int] = {}
    if config.density is None:
        return quotas
    places: dict[str, list[str]] = {}
    for group, members in groups.items():
        places.setdefault(members[0].place, []).append(group)
        quotas[group] = _floor(config.density, sum(p.units for p in members))
    for alike in places.values():
        sizes = {group: sum(p.units for p in groups[group]) for group in alike}
        left = _floor(config.density, sum(sizes.values())) - sum(quotas[g] for g in alike)
        short = [g for g in alike if Fraction(str(config.density)) * sizes[g] > quotas[g]]
        draws = {g: float(ops.uniform((1,), config.seed, f"{g} gets more", "cpu")) for g in short}
        for group in sorted(short, key=lambda g: draws[g])[:left]:
            quotas[group] += 1
    return quotas


def _by_score(config: SelectConfig, groups: Mapping[str, Sequence[Part]]) -> dict[str, int]:
    """How many of each group, by the mean of its finite scores.

    Units with a score of infinity are given: they are in the share of their group. Those of minus
    infinity are nobody's.
    """
    units, given, most, weights = 0, [], [], []
    for group, members in groups.items():
        values = [p.values for p in members]
        finite = [v[torch.isfinite(v)] for v in values]
        count = sum(v.numel() for v in finite)
        mean = sum(ops.total(v) for v in finite) / max(count, 1)
        if mean < 0:
            raise ScoreError(
                f"the scores of {group} have the mean {mean:g}, and quota='score' shares a budget in "
                "proportion to means: wanted scores >= 0"
            )
        weights.append(mean)
        given.append(sum(int((v == math.inf).sum()) for v in values))
        most.append(count)
        units += sum(p.units for p in members)
    total = _floor(config.density, units)
    if total < sum(given):
        given, most = shares(given, given, total), [0] * len(given)
    found = shares(weights, most, total - sum(given))
    return {group: a + b for group, a, b in zip(groups, given, found, strict=True)}


def _together(found: Sequence[Part], picked: Sequence[Tensor]) -> dict[str, Selection]:
    chosen: dict[str, Selection] = {}
    for part, positions in zip(found, picked, strict=True):
        chosen |= part.selections(positions)
    return chosen


def _ranks_weights_themselves(
    config: SelectConfig, score: Score, masked: Mapping[str, Candidate]
) -> bool:
    """Whether top-k can read the weights, so that no tensor of scores need be made."""
    dtypes = {c.param.dtype for c in masked.values()}
    return (
        isinstance(score, Magnitude)
        and config.quota == "size"
        and config.granularity == "element"
        and config.direction != "random"
        and len(dtypes) == 1
    )


def _ranks_only(config: SelectConfig) -> bool:
    """Whether nothing is asked of the scores of elements but which are best."""
    return (
        config.granularity == "element"
        and config.direction in ("top", "bottom")
        and config.scope in ("global", "layer", "tensor")
        and config.quota == "size"
        and config.ties != "all"
        and config.threshold is None
        and config.quantile is None
    )


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
        elif config.direction == "weighted":
            score = order.clocks(score, config.seed, name)
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
        largest = config.direction in ("top", "random")
        index = ops.topk_rows(rows, name, k, largest=largest, absolute=absolute)
        chosen[name] = plain(Selection("elements", c.shape, from_units(index, c.shape, c.row_dims)))
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
    return f"direction={config.direction!r}"


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
