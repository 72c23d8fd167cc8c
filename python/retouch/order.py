"""The order of many scores: ranks, quantiles and draws, without sorting all of them at once."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from retouch import ops
from retouch.errors import ScoreError

__all__ = ["below_quantile", "clocks", "drawn", "relative_ranks", "worst"]

_CHUNK = 2**22  # scores that become keys at once
_RANGE = 2**24  # scores that are sorted at once
_BINS = 2**16


# --- order statistics ----------------------------------------------------------------------------------


def worst(
    values: Sequence[Tensor], picked: Sequence[Tensor], *, largest: bool, absolute: bool
) -> float:
    """The worst of the scores at some flat positions, of which there is at least one."""
    found = _at(values, picked, absolute)
    return float(found.min() if largest else found.max())


def below_quantile(
    values: Sequence[Tensor],
    names: Sequence[str],
    quantile: float,
    *,
    largest: bool,
    absolute: bool,
) -> list[Tensor]:
    """The flat positions of all scores strictly above (largest) or below a quantile of them.

    The quantile is interpolated linearly between the two scores around position
    ``quantile * (n - 1)``, with the decimal digits of the quantile as they are written. At most half
    of the positions are in memory beside the result.

    Args:
        values: Scores of any shapes.
        names: A name for each, for errors.
        quantile: In [0, 1].
        largest: Those above it if True, else those below.
        absolute: Compare magnitudes.

    Raises:
        ScoreError: A score is NaN.
    """
    n = sum(v.numel() for v in values)
    if n == 0:
        return [torch.empty(0, dtype=torch.int32) for _ in values]
    position = Fraction(str(quantile)) * (n - 1)
    low = math.floor(position)
    from_top = n - low <= low + 2
    k = n - low if from_top else low + 2
    picked = ops.topk(list(values), list(names), k, largest=from_top, absolute=absolute)
    two = _at(values, picked, absolute).topk(min(2, k), largest=not from_top).values
    first, second = sorted((float(two[0]), float(two[-1])))
    share = float(position - low)
    bound = first + share * (second - first) if share else first
    if math.isinf(bound) and (bound > 0) == largest:
        return [torch.empty(0, dtype=ops.index_dtype(v.numel())) for v in values]
    # the next float32 on the wanted side, since `threshold` also takes what equals its bound
    limit = np.float32(bound)
    if largest and float(limit) <= bound:
        limit = np.nextafter(limit, np.float32("inf"))
    elif not largest and float(limit) >= bound:
        limit = np.nextafter(limit, np.float32("-inf"))
    return ops.threshold(
        list(values), list(names), float(limit), largest=largest, absolute=absolute
    )


def _at(values: Sequence[Tensor], picked: Sequence[Tensor], absolute: bool) -> Tensor:
    found = torch.cat(
        [
            v.detach().reshape(-1).index_select(0, p.to(v.device)).to(torch.float64).cpu()
            for v, p in zip(values, picked, strict=True)
        ]
    )
    return found.abs() if absolute else found


# --- draws -----------------------------------------------------------------------------------------------


def clocks(weights: Tensor, seed: int, name: str) -> Tensor:
    """Times at which exponential clocks of these rates first ring; infinite for a rate of 0.

    The k that ring first are k draws without replacement, each with chances in proportion to the
    weights that are left (Efraimidis and Spirakis, 2006).

    Raises:
        ScoreError: A weight is negative, infinite or NaN.
    """
    flat = weights.detach().to(torch.float64)
    if not bool(((flat >= 0) & torch.isfinite(flat)).all()):
        raise ScoreError(
            f"the score of {name} is negative, infinite or NaN; direction='weighted' draws in "
            "proportion to the scores"
        )
    uniform = ops.uniform(weights.shape, seed, name, weights.device).to(torch.float64)
    times = -torch.log1p(-uniform) / flat
    return torch.where(flat > 0, times, torch.inf).to(torch.float32)


def drawn(probabilities: Tensor, seed: int, name: str) -> Tensor:
    """The flat positions that are drawn, each on its own, with these probabilities.

    Raises:
        ScoreError: A probability is outside of [0, 1] or NaN.
    """
    p = probabilities.detach()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ScoreError(
            f"the score of {name} is not within [0, 1]; direction='bernoulli' takes scores as "
            "probabilities"
        )
    hits = ops.uniform(p.shape, seed, name, p.device) < p
    return hits.reshape(-1).nonzero().squeeze(1).to(ops.index_dtype(p.numel()))


# --- ranks -----------------------------------------------------------------------------------------------


def relative_ranks(scores: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """The rank of each score among all of them, from 0 for the worst to 1 for the best.

    Equal scores have the mean of their ranks. The ranks are exact, and independent of how the scores
    are cut into tensors. Scores are counted by the upper half of their bits; then ranges of at most
    2**24 scores are sorted one after another, or, where so many share their upper half, counted by
    the lower half. Beside the scores and the ranks, 4 bytes each, that takes about half a GiB; the time
    is a pass over the scores for each range.

    Args:
        scores: Float tensors of any shapes.
        names: A name for each, for errors.

    Returns:
        Float32 tensors of the same shapes.

    Raises:
        ScoreError: A score is NaN.
    """
    flats = [s.detach().reshape(-1) for s in scores]
    n = sum(f.numel() for f in flats)
    ranks = [torch.empty(s.shape, dtype=torch.float32, device=s.device) for s in scores]
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for flat, name in zip(flats, names, strict=True):
        for _, keys in _keys(flat, name):
            counts += torch.bincount((keys >> 16) + _BINS // 2, minlength=_BINS).cpu()
    below = 0
    for first, end, members in _ranges(counts.tolist()):
        if end - first == 1:
            _by_lower_half(flats, names, ranks, first, below, n)
        else:
            _by_sorting(flats, names, ranks, first, end, below, n)
        below += members
    return ranks


def _keys(flat: Tensor, name: str) -> Iterator[tuple[int, Tensor]]:
    """Chunks of scores as int32 numbers of the same order, with -0 equal to 0."""
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.float32)
        if bool(torch.isnan(part).any()):
            raise ScoreError(f"the score of {name} is NaN; ranks need numbers")
        bits = (part + 0.0).view(torch.int32)
        yield start, bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _ranges(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Bins from first to end that hold some scores but not too many, and how many."""
    first, members = 0, 0
    for bin, count in enumerate(counts):
        if members and members + count > _RANGE:
            yield first, bin, members
            first, members = bin, 0
        if not members:
            first = bin
        members += count
    if members:
        yield first, len(counts), members


def _members(
    flats: Sequence[Tensor], names: Sequence[str], first: int, end: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each tensor the flat positions and keys whose upper halves are in some bins."""
    for i, (flat, name) in enumerate(zip(flats, names, strict=True)):
        for start, keys in _keys(flat, name):
            upper = (keys >> 16) + _BINS // 2
            where = ((upper >= first) & (upper < end)).nonzero().squeeze(1)
            if where.numel():
                yield i, where + start, keys.index_select(0, where)


def _middles(counts: Tensor, below: int, n: int) -> Tensor:
    """The mean relative rank of each key, from how many scores have it."""
    middle = below + counts.cumsum(0) - counts + (counts - 1).to(torch.float64) / 2
    return (middle / (n - 1) if n > 1 else torch.ones_like(middle)).to(torch.float32)


def _by_sorting(
    flats: Sequence[Tensor],
    names: Sequence[str],
    ranks: Sequence[Tensor],
    first: int,
    end: int,
    below: int,
    n: int,
) -> None:
    found = list(_members(flats, names, first, end))
    device = found[0][2].device
    keys = torch.cat([k.to(device) for _, _, k in found])
    _, place, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    all_ranks = _middles(counts, below, n)[place]
    parts = all_ranks.split([k.numel() for _, _, k in found])
    for (i, where, _), part in zip(found, parts, strict=True):
        ranks[i].view(-1)[where] = part.to(ranks[i].device)


def _by_lower_half(
    flats: Sequence[Tensor],
    names: Sequence[str],
    ranks: Sequence[Tensor],
    bin: int,
    below: int,
    n: int,
) -> None:
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for _, _, keys in _members(flats, names, bin, bin + 1):
        counts += torch.bincount(keys & 0xFFFF, minlength=_BINS).cpu()
    table = _middles(counts, below, n)
    for i, where, keys in _members(flats, names, bin, bin + 1):
        ranks[i].view(-1)[where] = table.to(keys.device)[(keys & 0xFFFF).to(torch.int64)]
