"""Extrapolation from several checkpoints of one training run: AlphaRL, RELEX, and rank-k updates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from retouch.errors import HyperparameterError
from retouch.linalg import finite, sequential, svd

__all__ = ["alpharl", "rank_k", "relex", "relex_weights"]


@sequential
def rank_k(delta: Tensor, rank: int = 1, keep_norm: bool = True, name: str = "matrix") -> Tensor:
    """The best rank-k approximation of a difference, by default at the difference's own norm.

    The rank study of AlphaRL (arXiv 2510.00553): rank 1 at the full norm keeps nearly all of what
    reinforcement learning brought.

    Args:
        delta: [out, in].
        rank: Singular triplets kept.
        keep_norm: Scale the result to the Frobenius norm of `delta`.
        name: For errors.
    """
    u, s, vh = svd(delta, name)
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    kept = float(s[:rank].square().sum())
    return low * (float(s.square().sum()) / kept) ** 0.5 if keep_norm and kept > 0 else low


@sequential
def alpharl(
    deltas: Sequence[Tensor], accuracies: Sequence[float], target: float, name: str = "matrix"
) -> Tensor:
    """The rank-1 update at which a target accuracy is expected (AlphaRL, arXiv 2510.00553).

    The leading left vector of each checkpoint's difference, times its singular value, is regressed on
    accuracy by partial least squares with one component (features and accuracy standardised); the
    line is solved for the target, and the vector there multiplied with the last checkpoint's right
    vector. Signs are made to agree from the last checkpoint backwards.

    The released code that builds the model uses undefined names and adds to the last checkpoint; this is
    the paper's text: the result is added to the base.

    Args:
        deltas: T >= 3 differences [out, in] of checkpoints to their base, in order.
        accuracies: One per checkpoint.
        target: The accuracy to reach, such as that expected of the end of the run.
        name: For errors.

    Raises:
        HyperparameterError: Fewer than 3 checkpoints, or their accuracies are all the same.
    """
    if len(deltas) < 3 or len(deltas) != len(accuracies):
        raise HyperparameterError(
            f"wanted at least 3 checkpoints with one accuracy each, got {len(deltas)} checkpoints and "
            f"{len(accuracies)} accuracies"
        )
    rows: list[Tensor] = []
    right = torch.empty(0)
    for delta in reversed(deltas):
        u, s, vh = svd(delta, name)
        row = u[:, 0] * s[0]
        if not rows:
            right = vh[0]
        elif float(row @ rows[-1]) < 0:
            row = -row
        rows.append(row)
    x = torch.stack(rows[::-1])
    y = torch.tensor(list(accuracies), dtype=torch.float64)
    if float(y.std()) == 0:
        raise HyperparameterError(
            "all accuracies are the same: there is no direction of improvement to extrapolate"
        )
    middle, spread = x.mean(0), x.std(0)
    spread = torch.where(spread == 0, 1.0, spread)
    x, centred = (x - middle) / spread, y - y.mean()
    direction = x.T @ centred
    length = direction.norm()
    if float(length) == 0:
        return torch.outer(middle, right)
    scores = x @ (direction / length)
    loadings = x.T @ scores / scores.square().sum()
    slope = scores @ centred / scores.square().sum()
    at = (target - y.mean()) / slope
    return torch.outer(at * loadings * spread + middle, right)


@sequential
def relex_weights(gram: Tensor, steps: Sequence[float], target: float, rank: int = 1) -> Tensor:
    """What each checkpoint's difference counts in the extrapolation of RELEX.

    Args:
        gram: [T, T], inner products of the T differences.
        steps: The training step of each.
        target: The step to predict.
        rank: Leading directions of the trajectory that are followed (default 1, the paper's).

    Returns:
        [T] float64: the prediction is the sum of the differences times these.

    Raises:
        HyperparameterError: Fewer than 2 different steps.
    """
    t = torch.tensor(list(steps), dtype=torch.float64)
    if len(t) != len(gram) or len(t.unique()) < 2:
        raise HyperparameterError(
            f"wanted a step for each of {len(gram)} checkpoints, at least two of them different; got "
            f"{list(steps)}"
        )
    values, vectors = torch.linalg.eigh(gram.double())
    out = torch.zeros_like(t)
    top = float(values[-1].clamp(min=0).sqrt())
    for k in range(1, min(rank, len(t)) + 1):
        size = float(values[-k].clamp(min=0).sqrt())
        if size <= 1e-6 * top or size == 0:  # rounding, not a direction
            break
        u = vectors[:, -k]
        course = u * size
        slope = (t - t.mean()) @ (course - course.mean()) / (t - t.mean()).square().sum()
        out += u / size * (course.mean() + slope * (target - t.mean()))
    return out


@sequential
def relex(
    deltas: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    rank: int = 1,
    name: str = "tensor",
) -> Tensor:
    """The difference expected at a later step (RELEX, arXiv 2605.21468).

    The differences of a tensor lie near few directions; the coordinate along each is continued by a
    least-squares line over the steps.

    Args:
        deltas: T >= 2 tensors of any one shape, of checkpoints to their base.
        steps: The training step of each.
        target: The step to predict.
        rank: Directions followed (default 1, the paper's).
        name: For errors.
    """
    rows = torch.stack([finite(d, name).reshape(-1) for d in deltas])
    weights = relex_weights(rows @ rows.T, steps, target, rank)
    return (weights @ rows).reshape(deltas[0].shape)
