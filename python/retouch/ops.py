"""Tensor operations with two implementations and one result.

Contiguous float32, float16 and bfloat16 tensors on the CPU go without a copy to the Rust kernels of
`retouch._core`; everything else (other devices, float64, other strides) runs the same operation in
libtorch ops. Beside this module only optimizers choose (`retouch.optim`: `steps`, `lowbit`,
`adafactor`), by the same rule; nothing else calls the tensor kernels.

Index tensors hold ascending, unique flat positions: int32, or int64 for tensors of 2**31 elements or
more. Values are widened on load, computed in float32 (float64 for float64 weights) and rounded once.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from retouch import _core, errors

_HALVES = frozenset({torch.float16, torch.bfloat16})
_KERNEL_DTYPES = _HALVES | {torch.float32}
# The names of the safetensors format, so that a fingerprint is the same for a tensor and for its file.
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
_SIGNED_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**20  # elements of a product that are in memory at once
_forced = False


@contextlib.contextmanager
def force_torch() -> Iterator[None]:
    """Runs every operation in libtorch ops, as on a device without Rust kernels (for tests)."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def _native(*tensors: Tensor) -> bool:
    """Whether the Rust kernels take these tensors."""
    return not _forced and all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.dtype in _KERNEL_DTYPES
        and t.layout == torch.strided
        and t.is_contiguous()
        for t in tensors
    )


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of positions in a tensor of `numel` elements."""
    return torch.int32 if numel < 2**31 else torch.int64


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of `dtype` are computed in: float64 for itself, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tensor(positions: np.ndarray) -> Tensor:
    return torch.from_numpy(positions)


def total(tensor: Tensor) -> float:
    """The sum in float64; by rows, so that it does not depend on the number of threads."""
    flat = tensor.detach().reshape(-1)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024)
    return math.fsum(rows.sum(1, dtype=torch.float64).tolist())


# --- selecting ---------------------------------------------------------------------------------


def topk(
    scores: Sequence[Tensor],
    names: Sequence[str],
    k: int,
    *,
    largest: bool = True,
    absolute: bool = False,
) -> list[Tensor]:
    """Exactly the k best of all scores together; ties go to the lowest (tensor, flat position).

    Args:
        scores: Float tensors of any shapes; nothing is concatenated on the CPU.
        names: A name for each, for errors.
        k: How many to select in all, 0 <= k <= number of elements.
        largest: The largest if True, else the smallest.
        absolute: Compare magnitudes.

    Returns:
        For each score its selected flat positions, ascending, on the score's device.

    Raises:
        ScoreError: A score is NaN.
        BudgetError: k is larger than the number of elements.
    """
    if _native(*scores) and len({s.dtype for s in scores}) <= 1:
        found = _core.topk(
            [s.detach() for s in scores], list(names), k, largest=largest, absolute=absolute
        )
        return [_tensor(p) for p in found]
    keys = [_keys(s, n, largest, absolute) for s, n in zip(scores, names, strict=True)]
    total = sum(x.numel() for x in keys)
    _check_budget(k, total)
    flat = torch.cat([x.to(keys[0].device) for x in keys]) if keys else torch.empty(0)
    chosen = _chosen(flat.unsqueeze(0), k).squeeze(0)
    out = []
    for key, part in zip(keys, chosen.split([x.numel() for x in keys]), strict=True):
        out.append(_positions(part, key))
    return out


def topk_each(
    scores: Sequence[Sequence[Tensor]],
    names: Sequence[Sequence[str]],
    ks: Sequence[int],
    *,
    largest: bool = True,
    absolute: bool = False,
) -> list[list[Tensor]]:
    """`topk` of many groups of scores, each with a k of its own, all at once."""
    flat = [score for group in scores for score in group]
    if not _native(*flat) or len({s.dtype for s in flat}) > 1:
        each = zip(scores, names, ks, strict=True)
        return [topk(s, n, k, largest=largest, absolute=absolute) for s, n, k in each]
    found = _core.topk_each(
        [s.detach() for s in flat], [name for group in names for name in group],
        [len(group) for group in scores], list(ks), largest=largest, absolute=absolute,
    )  # fmt: skip
    rest = iter(found)
    return [[_tensor(next(rest)) for _ in group] for group in scores]


def topk_mask(
    scores: Tensor, name: str, k: int, *, largest: bool = True, absolute: bool = False
) -> Tensor:
    """`topk` of one tensor as a bool tensor of its shape: True at the k best."""
    if _native(scores):
        chosen = torch.empty(scores.shape, dtype=torch.bool)
        _core.topk_bytes_(
            chosen.view(torch.uint8), scores.detach(), name, k, largest=largest, absolute=absolute
        )
        return chosen
    (where,) = topk([scores], [name], k, largest=largest, absolute=absolute)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[where.long()] = True
    return chosen.view(scores.shape)


def finite(values: Sequence[Tensor], names: Sequence[str]) -> bool:
    """Whether no value of any tensor is infinite or NaN; `names` are for errors."""
    if _native(*values) and len({v.dtype for v in values}) <= 1:
        return _core.finite([v.detach() for v in values], list(names))
    return all(bool(torch.isfinite(v).all()) for v in values)


def topk_rows(
    scores: Tensor, name: str, k: int, *, largest: bool = True, absolute: bool = False
) -> Tensor:
    """Exactly the k best of each row (last dimension): ascending flat positions."""
    if _native(scores):
        return _tensor(
            _core.topk_rows(scores.detach(), name, k, largest=largest, absolute=absolute)
        )
    row = scores.shape[-1] if scores.dim() else 1
    keys = _keys(scores, name, largest, absolute)
    _check_budget(k, row)
    return _positions(_chosen(keys.reshape(-1, row), k).flatten(), keys)


def threshold(
    scores: Sequence[Tensor],
    names: Sequence[str],
    value: float,
    *,
    largest: bool = True,
    absolute: bool = False,
) -> list[Tensor]:
    """All scores >= value (largest) or <= value (smallest): ascending flat positions of each."""
    if _native(*scores) and len({s.dtype for s in scores}) <= 1:
        found = _core.threshold(
            [s.detach() for s in scores], list(names), value, largest=largest, absolute=absolute
        )
        return [_tensor(p) for p in found]
    bound = torch.tensor(value, dtype=torch.float32).item()
    out = []
    for score, name in zip(scores, names, strict=True):
        keys = _keys(score, name, largest, absolute)
        out.append(_positions(keys >= (bound if largest else -bound), keys))
    return out


def _check_budget(k: int, eligible: int) -> None:
    if not 0 <= k <= eligible:
        raise errors.BudgetError(f"cannot select {k} of {eligible} eligible coordinates")


def _keys(score: Tensor, name: str, largest: bool, absolute: bool) -> Tensor:
    """The score, flat, in an order in which larger is better and -0 equals 0."""
    flat = score.detach().reshape(-1)
    bad = torch.isnan(flat).nonzero()
    if bad.numel():
        raise errors.ScoreError(
            f"the score of {name} is NaN at flat position {int(bad[0])}; selection needs numbers"
        )
    flat = flat.to(value_dtype(flat.dtype))
    flat = flat.abs() if absolute else flat + 0.0
    return flat if largest else -flat


def _chosen(keys: Tensor, k: int) -> Tensor:
    """True at the k largest of each row; ties go to the lowest column."""
    if k == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    bound = keys.topk(k, dim=1).values[:, -1:]
    above, tie = keys > bound, keys == bound
    need = k - above.sum(1, keepdim=True)
    return above | (tie & (tie.cumsum(1) <= need))


def _positions(chosen: Tensor, like: Tensor) -> Tensor:
    where = chosen.nonzero().squeeze(1)
    return where.to(device=like.device, dtype=index_dtype(like.numel()))


def uniform(shape: Sequence[int], seed: int, name: str, device: torch.device | str) -> Tensor:
    """Uniform float32 numbers in [0, 1); each depends on (seed, name, flat position) alone.

    Made on the CPU (Philox4x32-10) and moved, so that a mask is the same on every device.
    """
    out = torch.empty(tuple(shape), dtype=torch.float32)
    _core.uniform_(out, seed, name)
    return out.to(device)


# --- algebra of positions ------------------------------------------------------------------------


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.promote_types(a.dtype, b.dtype)
    return a.cpu().to(both).contiguous(), b.cpu().to(both).contiguous()


def union(a: Tensor, b: Tensor) -> Tensor:
    """Positions in either of two ascending indices."""
    return _tensor(_core.union(*_pair(a, b)))


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Positions in both of two ascending indices."""
    return _tensor(_core.intersection(*_pair(a, b)))


def places(a: Tensor, b: Tensor) -> Tensor:
    """Where in the first of two ascending indices those positions stand that the second has too."""
    return _tensor(_core.places(*_pair(a, b)))


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Positions in the first but not in the second of two ascending indices."""
    return _tensor(_core.difference(*_pair(a, b)))


def complement(a: Tensor, length: int) -> Tensor:
    """Positions below `length` that are not in an ascending index."""
    return _tensor(_core.complement(a.cpu().contiguous(), length))


# --- moving values -------------------------------------------------------------------------------


def gather(source: Tensor, index: Tensor, name: str) -> Tensor:
    """`source.flatten()[index]` in the dtype it is computed in, float32 (float64 for float64)."""
    out = torch.empty(index.shape, dtype=value_dtype(source.dtype), device=source.device)
    if _native(source, out):
        _core.gather_(out, source.detach(), index.cpu(), name)
        return out
    return out.copy_(source.detach().reshape(-1).index_select(0, index.to(source.device)))


def gather_add_(out: Tensor, source: Tensor, index: Tensor, name: str) -> None:
    """`out += source.flatten()[index]`, in the dtype of `out`."""
    if _native(source, out) and out.dtype == torch.float32:
        _core.gather_(out.detach(), source.detach(), index.cpu(), name, accumulate=True)
        _written(out)
        return
    part = source.detach().reshape(-1).index_select(0, index.to(source.device))
    out.detach().add_(part.to(out.dtype))


def selected(left: Tensor, right: Tensor, index: Tensor, name: str) -> Tensor:
    """`(left.T @ right).flatten()[index]`, without the rest of the product.

    Args:
        left: [tokens, rows].
        right: [tokens, columns], of the dtype of `left`.
        index: Positions in [rows, columns].
        name: Of the weight, for errors.

    Returns:
        float32 [k] (float64 for float64). The Rust kernel sums in float32 in an order that depends on
        nothing but the number of tokens; elsewhere blocks of rows are multiplied densely, a few MiB
        at a time, and rounded to the dtype of `left` as torch rounds a product.
    """
    left, right = left.detach().contiguous(), right.detach().contiguous()
    out = torch.empty(index.shape, dtype=value_dtype(left.dtype), device=left.device)
    if _native(left, right, out) and left.dtype == right.dtype:
        _core.selected_(out, left, right, index.cpu(), name)
        return out
    where, columns = index.to(left.device), right.shape[1]
    rows = max(1, _BLOCK // max(columns, 1))
    firsts = range(0, left.shape[1], rows)
    bounds = torch.tensor([*(first * columns for first in firsts), left.shape[1] * columns])
    cuts = torch.searchsorted(where, bounds.to(where)).tolist()
    for first, start, end in zip(firsts, cuts[:-1], cuts[1:], strict=True):
        if start < end:
            block = left[:, first : first + rows].t() @ right
            out[start:end] = block.reshape(-1).index_select(0, where[start:end] - first * columns)
    return out


def scatter_(target: Tensor, index: Tensor, values: Tensor, name: str) -> None:
    """`target.flatten()[index] = values`, rounded once to the dtype of the target."""
    if _native(target, values) and values.dtype == torch.float32:
        _core.scatter_(target.detach(), index.cpu(), values.detach(), name)
        _written(target)
        return
    put_(target, index, values.detach().to(target.dtype), name)


def take(source: Tensor, index: Tensor, name: str) -> Tensor:
    """`source.flatten()[index]`, bit for bit, in the dtype of the source."""
    if _native(source):
        out = torch.empty(index.shape, dtype=source.dtype)
        _core.take_(out, source.detach(), index.cpu(), name)
        return out
    flat = source.detach().reshape(-1).view(_bits(source.dtype))
    return flat.index_select(0, index.to(source.device)).view(source.dtype)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """An integer dtype of the same width: copies of it are exact, and float8 has few ops."""
    return dtype if dtype.is_complex else _SIGNED_OF_WIDTH[dtype.itemsize]


def put_(target: Tensor, index: Tensor, values: Tensor, name: str) -> None:
    """`target.flatten()[index] = values`, bit for bit; dtypes must be equal."""
    if target.dtype != values.dtype:
        raise errors.LayoutError(f"values of {name} are {values.dtype}, the weight {target.dtype}")
    if _native(target, values):
        _core.put_(target.detach(), index.cpu(), values.detach(), name)
        _written(target)
        return
    where = index.to(device=target.device, dtype=torch.int64)
    if where.numel() and (int(where.min()) < 0 or int(where.max()) >= target.numel()):
        raise errors.MaskError(
            f"index of {name} is not valid: a position is outside of its {target.numel()} elements"
        )
    plain = target.detach().view(_bits(target.dtype))
    values = values.detach().to(target.device).view(_bits(target.dtype))
    if plain.is_contiguous():
        plain.view(-1).index_copy_(0, where, values)
    else:
        plain.index_put_(tuple(torch.unravel_index(where, plain.shape)), values)


def _written(tensor: Tensor) -> None:
    # Writing through a raw pointer is invisible to autograd, which must refuse stale saved tensors.
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def accumulate_(
    score: Tensor, value: Tensor, name: str, *, map: str = "id", weight: float = 1.0
) -> None:
    """`score += weight * map(value)` with `map` one of "id", "abs", "square"; score is float32."""
    if _native(score, value) and score.dtype == torch.float32 and score.shape == value.shape:
        _core.accumulate_(score.detach(), value.detach(), name, map=map, weight=weight)
        _written(score)
        return
    if score.shape != value.shape:
        raise errors.ShapeError(
            f"score of {name} has shape {tuple(score.shape)}, its gradient {tuple(value.shape)}"
        )
    score.detach().add_(mapped(value.detach().to(score.dtype), map), alpha=weight)


def mapped(x: Tensor, map: str) -> Tensor:
    """`map(x)` with `map` one of "id", "abs", "square"."""
    if map == "id":
        return x
    if map == "abs":
        return x.abs()
    if map == "square":
        return x.square()
    raise errors.HyperparameterError(f"map must be one of id, abs, square, got {map}")


def accumulate_outer_(
    score: Tensor, left: Tensor, right: Tensor, name: str, *, map: str = "id"
) -> None:
    """`score += sum of map(left[b].T @ right[b])` over the samples b of a batch.

    Args:
        score: float32 [rows, columns].
        left: [samples, tokens, rows].
        right: [samples, tokens, columns], of the dtype of `left`.
        name: Of the weight, for errors.
        map: "id", "abs" or "square". A product of 16-bit factors is rounded to their dtype before it,
            as a gradient is.

    No tensor with the products of all samples is made. Where none needs to stand alone, all are one
    large product. The Rust kernel, for the rest in float32, adds token after token and sample after
    sample, in an order that depends on nothing; elsewhere it is one product and one pass over the
    score for each sample.

    Raises:
        ShapeError: The shapes do not fit.
    """
    left, right = left.detach(), right.detach()
    if (
        left.dim() != 3
        or right.dim() != 3
        or left.shape[:2] != right.shape[:2]
        or score.shape != (left.shape[2], right.shape[2])
    ):
        raise errors.ShapeError(
            f"score of {name} has shape {tuple(score.shape)}, "
            f"the factors of its samples {tuple(left.shape)} and {tuple(right.shape)}"
        )
    total = score.detach()
    if left.dtype not in _HALVES and (map == "id" or left.shape[1] == 1):
        # a sum of products, or products of two vectors each
        left, right = mapped(left.flatten(0, 1), map), mapped(right.flatten(0, 1), map)
        total.add_(left.t() @ right)
        return
    left, right = left.contiguous(), right.contiguous()
    if _native(score, left, right) and left.dtype == right.dtype == score.dtype == torch.float32:
        _core.accumulate_outer_(total, left, right, len(left), map=map)
        _written(score)
        return
    product = left.new_empty(score.shape)
    for a, b in zip(left, right, strict=True):
        wide = torch.mm(a.t(), b, out=product).to(torch.float32)
        if map == "square":
            total.addcmul_(wide, wide)
        else:
            total.add_(mapped(wide, map))


# --- bits ------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> Tensor:
    """The raw bytes of a tensor in row-major order, as uint8 on the CPU (a view where possible)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def diff(base: Tensor, tuned: Tensor, name: str) -> Tensor:
    """Flat positions whose bits differ, ascending; any dtype (NaN payloads and -0 count)."""
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise errors.ShapeError(
            f"{name} is {base.dtype} of shape {tuple(base.shape)} in the base, "
            f"but {tuned.dtype} of shape {tuple(tuned.shape)} in the other"
        )
    width = base.element_size()
    if base.device.type == "cpu" and not _forced:
        return _tensor(_core.diff(_bytes(base), _bytes(tuned), width, name))
    bits = _SIGNED_OF_WIDTH[width]
    one, other = (t.detach().contiguous().reshape(-1).view(bits) for t in (base, tuned))
    where = (one != other).nonzero().squeeze(1)
    return where.to(index_dtype(base.numel()))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the safetensors format.

    Raises:
        LayoutError: The format has no such dtype.
    """
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        raise errors.LayoutError(f"the safetensors format has no {dtype}")
    return name


def fingerprint(tensor: Tensor, index: Tensor | None = None, values: Tensor | None = None) -> str:
    """A 128-bit hash (hex) of dtype, shape and bytes, the same for a tensor and for its file.

    With `index` and `values` (of the tensor's dtype) it is the hash that the tensor would have if
    `tensor.flatten()[index]` were `values`; the tensor is not copied on the CPU.
    """
    name = dtype_name(tensor.dtype)
    if (index is None) != (values is None):
        raise errors.ShapeError("index and values must be given together")
    patch = None if values is None else _bytes(values)
    where = None if index is None else index.cpu().contiguous()
    return _core.fingerprint(_bytes(tensor), name, list(tensor.shape), where, patch)
