"""Edits of one difference: the unified view of delta editing, Twin-Merging's residuals.

"A Unified View of Delta Parameter Editing" (arXiv 2410.13841) sees DARE, BitDelta, Twin-Merging and
ExPO as edits whose effect on the loss is its gradient times the edit. It has no released code: the
general forms here are as its text describes them.
"""

import torch
from torch import Tensor

from retouch import ops
from retouch.errors import HyperparameterError
from retouch.linalg import sequential, svd

__all__ = ["dare", "sign_magnitudes", "truncated", "twin_residual"]


def dare(delta: Tensor, kept: Tensor, drop: float, share: float = 0.0) -> Tensor:
    """Drop and rescale, in the general form that keeps a share of what is dropped.

    Kept elements are multiplied by ``(1 - share * drop) / (1 - drop)``, the others by `share`, so the
    expectation over masks is `delta`. `share` 0 is DARE (arXiv 2311.03099).

    Args:
        delta: Any float tensor.
        kept: Bool tensor of its shape.
        drop: Probability with which an element is dropped, below 1.
        share: What a dropped element keeps, from 0 to below 1.
    """
    if not (0 <= drop < 1 and 0 <= share < 1):
        raise HyperparameterError(
            f"drop and share must be at least 0 and below 1, got {drop!r} and {share!r}"
        )
    wide = delta.double()
    return torch.where(kept, wide * ((1 - share * drop) / (1 - drop)), wide * share)


@sequential
def sign_magnitudes(delta: Tensor, levels: int = 1) -> Tensor:
    """Signs with few magnitudes: BitDelta (arXiv 2402.10193) with one, or the general form with more.

    Elements are ranked by magnitude (equals by position) and split into `levels` groups of nearly equal
    size; each takes the mean magnitude of its group, so the mean magnitude is that of `delta`. As in the
    released code, 0 counts as positive.
    """
    if levels < 1:
        raise HyperparameterError(f"levels must be at least 1, got {levels!r}")
    flat = delta.double().reshape(-1)
    size = torch.empty_like(flat)
    order = flat.abs().sort(stable=True).indices
    for group in order.tensor_split(levels):
        if len(group):
            size[group] = flat[group].abs().mean()
    return torch.where(flat < 0, -size, size).reshape(delta.shape)


@sequential
def truncated(delta: Tensor, rank: int, name: str = "matrix") -> Tensor:
    """The best rank-k approximation [out, in]."""
    u, s, vh = svd(delta, name)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def twin_residual(residual: Tensor, density: float, strategy: str, name: str = "tensor") -> Tensor:
    """What Twin-Merging (arXiv 2406.15479) keeps of a model's difference to the shared model.

    Args:
        residual: Any shape; vectors and scalars are kept whole.
        density: The fraction kept.
        strategy: "svd" (that fraction of the singular triplets, at least one) or "magnitude" (exactly
            that fraction of the elements, rounded down; of equals the first).
        name: For errors.
    """
    if residual.ndim < 2:
        return residual.double()
    if strategy == "svd":
        flat = residual.reshape(residual.shape[0], -1)
        rank = max(1, int(min(flat.shape) * density))
        return truncated(flat, rank, name).reshape(residual.shape)
    wide = residual.double()
    index = ops.topk([wide], [name], int(wide.numel() * density), absolute=True)[0].long()
    out = torch.zeros_like(wide).reshape(-1)
    out[index] = wide.reshape(-1)[index]
    return out.reshape(wide.shape)
