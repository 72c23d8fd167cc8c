"""Merging by statistics of the training data: Fisher merging and RegMean.

What each model learned of its data comes as tensors beside it: the diagonal of its Fisher information,
or the Gram matrix of each layer's inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retouch.errors import ScoreError, ShapeError
from retouch.linalg import sequential, shrunk_towards

__all__ = ["IN_OUT", "fisher_mean", "regmean"]

IN_OUT = (
    ":in_out"  # behind the name of a Gram matrix whose weight is stored as [in, out], as `Conv1D`'s
)


@torch.no_grad()
def fisher_mean(
    weights: Sequence[Tensor],
    fishers: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    floor: float = 1e-6,
    name: str = "tensor",
) -> Tensor:
    """The mean of weights, each by its Fisher information (arXiv 2111.09832).

    ``sum(c * (F + floor) * w) / sum(c * (F + floor))``

    Args:
        weights: T tensors of one shape.
        fishers: T tensors of that shape, non-negative.
        coefficients: c, one per model; None for equal ones.
        floor: Added to every Fisher value (default 1e-6, the released code): where no model has
            information the result is the plain mean.
        name: For errors.

    Returns:
        float64.

    Raises:
        ShapeError: A Fisher tensor has another shape than the weights.
        ScoreError: A Fisher value is negative, NaN or infinite.
    """
    factors = [1.0] * len(weights) if coefficients is None else coefficients
    above = torch.zeros(weights[0].shape, dtype=torch.float64)
    below = torch.zeros_like(above)
    for weight, fisher, c in zip(weights, fishers, factors, strict=True):
        if fisher.shape != weight.shape:
            raise ShapeError(
                f"the Fisher information of {name} has shape {tuple(fisher.shape)}, the weight "
                f"{tuple(weight.shape)}"
            )
        wide = fisher.double()
        if not bool((wide.isfinite() & (wide >= 0)).all()):
            raise ScoreError(
                f"the Fisher information of {name} has values that are negative, NaN or infinite"
            )
        share = c * (wide + floor)
        above += share * weight.double()
        below += share
    return above / below


@sequential
def regmean(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    shrink: float = 0.9,
    name: str = "matrix",
) -> Tensor:
    """The linear layer nearest to all models' outputs on their own inputs (RegMean, 2212.09849).

    ``sum(W_t @ G_t) @ inverse(sum(G_t))``, with the off-diagonal of every G multiplied by `shrink`. In
    directions in which no model had inputs, the plain mean.

    Args:
        weights: T matrices [out, in].
        grams: T Gram matrices [in, in] of the layer's inputs, X'X (or that over the tokens).
        shrink: From 0 (only the diagonal) to 1 (default 0.9, the paper's).
        name: For errors.

    Returns:
        float64.

    Raises:
        ShapeError: A Gram matrix has another shape.
        ScoreError: A Gram matrix holds NaN, or is not positive semi-definite.
    """
    total = torch.zeros(2 * weights[0].shape[1:], dtype=torch.float64)
    moment = torch.zeros(weights[0].shape, dtype=torch.float64)
    mean = torch.zeros_like(moment)
    for weight, gram in zip(weights, grams, strict=True):
        if gram.shape != total.shape:
            raise ShapeError(
                f"the Gram matrix of {name} has shape {tuple(gram.shape)}, wanted "
                f"{tuple(total.shape)}: one row and column per input feature"
            )
        shrunk = gram.double() * shrink
        shrunk.diagonal().copy_(gram.diagonal())
        total += shrunk
        moment += weight.double() @ shrunk
        mean += weight.double() / len(weights)
    return shrunk_towards(mean, total, moment, f"the Gram matrix of {name}")
