"""Merging of adapters: LoRA factors (CoPA, published as RobustMerge) and adapters of a sequence (MOS)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from retouch.errors import HyperparameterError, ShapeError

__all__ = ["mos", "robust_merge"]


@torch.no_grad()
def robust_merge(
    factors: Sequence[tuple[Tensor, Tensor]],
    density: float = 0.2,
    tail: float = 0.2,
    scale: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Prunes LoRA factors and scales up the weak ranks (RobustMerge, arXiv 2502.17159).

    Of each factor the entries of large magnitude are kept; each rank is scaled by what pruning took from
    its row of A, where the smaller scales are raised to the quantile `tail`; both factors are summed over
    the adapters.

    Args:
        factors: For each adapter (A [r, in], B [out, r]).
        density: Kept are the entries at least as large as the ``int(n * (1 - density))``-th smallest
            (counted from 1; the paper's mask ratio, default 0.2): all equals of it too.
        tail: The fraction of a task's ranks whose scale is raised (default 0.2); the quantile is that
            of index ``int(r * (1 - tail))``.
        scale: A constant of the released code (2).

    Returns:
        A and B of the merged adapter, float64.

    Raises:
        ShapeError: The adapters have different shapes.
        HyperparameterError: A fraction is out of range.
    """
    if not 0 < density <= 1 or not 0 <= tail <= 1:
        raise HyperparameterError(
            f"density must be above 0 and at most 1, tail from 0 to 1; got {density!r} and {tail!r}"
        )
    shapes = {(tuple(a.shape), tuple(b.shape)) for a, b in factors}
    if len(shapes) != 1:
        raise ShapeError(f"adapters of different shapes cannot be merged: {sorted(shapes)}")
    wide = [(a.double(), b.double()) for a, b in factors]
    kept = [(_large(a, density), _large(b, density)) for a, b in wide]
    strength = torch.stack(
        [a.abs().sum(1) / k.abs().sum(1) for (a, _), (k, _) in zip(wide, kept, strict=True)]
    ).nan_to_num(1.0, posinf=1.0)  # nothing of that rank was kept: nothing to scale
    rank = strength.shape[1]
    bound = strength.sort(1).values[:, min(int(rank * (1 - tail)), rank - 1), None]
    strength = torch.maximum(strength, bound)
    merged_a = torch.stack([a for a, _ in kept]).sum(0) * scale
    scaled = torch.stack([s * b for s, (_, b) in zip(strength, kept, strict=True)])
    return merged_a, scaled.sum(0) * scale / strength.sum(0)


def _large(x: Tensor, density: float) -> Tensor:
    """Zero where the magnitude is below the threshold of `robust_merge`."""
    at = int(x.numel() * (1 - density))
    if at == 0:
        return x
    return torch.where(x.abs() >= x.abs().reshape(-1).kthvalue(at).values, x, 0.0)


@torch.no_grad()
def mos(current: Tensor, total: Tensor, earlier: int, momentum: float = 0.1) -> Tensor:
    """An adapter drawn towards the mean of the earlier ones, after an optimizer step (MOS).

    arXiv 2412.09441: ``(1 - m) * A + m * mean(earlier)``. The released forward repeats the blend once per
    block, also in evaluation; this is the text's single one.

    Args:
        current: The adapter's weight.
        total: The sum of the earlier adapters' weights: memory does not grow with their number.
        earlier: How many there are; with none the adapter stays as it is.
        momentum: m (default 0.1).
    """
    if not earlier:
        return current.clone()
    return ((1 - momentum) * current.double() + momentum / earlier * total.double()).to(
        current.dtype
    )
