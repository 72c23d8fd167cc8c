"""Merging by singular vectors: TSV-M, Iso-C, Iso-CTS, KnOTS, WUDI, OPCM.

The functions take the differences of T models to a base, [out, in] each, and return what is to be
added to it, in float64. Their results do not depend on the signs of singular vectors, nor on threads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retouch.errors import HyperparameterError
from retouch.linalg import finite, polar, sequential, shrunk_towards, svd

__all__ = [
    "aligned",
    "at_threshold",
    "elected_mean",
    "iso_c",
    "iso_cts",
    "knots",
    "opcm",
    "opcm_project",
    "opcm_scale",
    "tsv",
    "wudi",
    "wudi_loss",
]


@sequential
def tsv(deltas: Sequence[Tensor], name: str = "matrix") -> Tensor:
    """Task singular vectors, merged (TSV-M, arXiv 2412.00081).

    Each difference keeps its `min(out, in) // T` leading singular triplets (at least one); the left
    and the right vectors of all tasks are then made orthonormal by their polar factors.
    """
    keep = max(1, min(deltas[0].shape) // len(deltas))
    left, values, right = [], [], []
    for delta in deltas:
        u, s, vh = svd(delta, name)
        left.append(u[:, :keep])
        values.append(s[:keep])
        right.append(vh[:keep])
    u, vh = polar(torch.cat(left, 1), name), polar(torch.cat(right), name)
    return (u * torch.cat(values)) @ vh


@sequential
def iso_c(deltas: Sequence[Tensor], name: str = "matrix") -> Tensor:
    """Isotropic merging in the common subspace (Iso-C, arXiv 2502.04959).

    The sum of the differences with every singular value replaced by their mean. Where the sum has not
    full rank, its null space takes part with directions of LAPACK's choice, as in the released code.
    """
    u, s, vh = svd(_sum(deltas, name), name)
    return s.mean() * (u @ vh) if s.numel() else u @ vh


@sequential
def iso_cts(deltas: Sequence[Tensor], fraction: float = 0.8, name: str = "matrix") -> Tensor:
    """Isotropic merging in common and task-specific subspaces (Iso-CTS, arXiv 2502.04959).

    The leading left directions of the sum make the common space. What it leaves of each difference
    contributes its leading triplets, equally many per task. All directions together are made
    orthonormal, with the mean of their singular values.

    Args:
        deltas: T matrices [out, in].
        fraction: Of the `min(out, in)` directions, those of the common space (default 0.8, the
            paper's); rounded so that the rest is a multiple of T.
        name: For errors.
    """
    if not 0 <= fraction <= 1:
        raise HyperparameterError(f"fraction must be from 0 to 1, got {fraction!r}")
    total, tasks = min(deltas[0].shape), len(deltas)
    own = round((total - int(total * fraction)) / tasks)
    own = min(own, total // tasks)
    common = total - own * tasks
    u, s, vh = svd(_sum(deltas, name), name)
    left, values, right = [], [], []
    space = u[:, :common]
    for delta in deltas:
        rest = delta.double() - space @ (space.T @ delta.double())
        a, b, c = svd(rest, name)
        left.append(a[:, :own])
        values.append(b[:own])
        right.append(c[:own])
    left.append(space)
    values.append(s[:common])
    right.append(vh[:common])
    u, vh = polar(torch.cat(left, 1), name), polar(torch.cat(right), name)
    return torch.cat(values).mean() * (u @ vh)


@sequential
def knots(
    deltas: Sequence[Tensor],
    merge: Callable[[list[Tensor]], Tensor],
    cut: float = 1e-5,
    name: str = "matrix",
) -> Tensor:
    """Merging in a shared basis (KnOTS, arXiv 2410.19735).

    The differences side by side have one singular value decomposition; `merge` is an element-wise
    merge of the tasks' coordinates in its left basis.

    Args:
        deltas: T matrices [out, in].
        merge: From T matrices [rank, in] to one (the paper: TIES with the largest 20 % kept, or
            DARE-TIES).
        cut: Singular values at most this large are left out (default 1e-5, the released code).
        name: For errors.
    """
    u, parts = aligned(deltas, cut, name)
    if not u.shape[1]:
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    return u @ merge(parts).double()


@sequential
def aligned(
    deltas: Sequence[Tensor], cut: float = 1e-5, name: str = "matrix"
) -> tuple[Tensor, list[Tensor]]:
    """The shared basis of KnOTS and each task's coordinates: ``deltas[t] = u @ parts[t]``."""
    u, s, vh = svd(torch.cat([d.double() for d in deltas], 1), name)
    keep = s > cut
    u, right = u[:, keep], s[keep, None] * vh[keep]
    return u, list(right.split(deltas[0].shape[1], 1))


def at_threshold(delta: Tensor, density: float) -> Tensor:
    """Zero below the magnitude of rank ``int(n * density)`` (counted from 0): equals of it are kept.

    The trimming of the released TIES and KnOTS: at least ``int(n * density) + 1`` entries are kept.
    """
    flat = delta.abs().reshape(-1)
    rank = len(flat) - int(len(flat) * density)
    if rank < 1:
        return delta
    return torch.where(delta.abs() >= flat.kthvalue(rank).values, delta, 0.0)


def elected_mean(deltas: Sequence[Tensor]) -> Tensor:
    """The mean of the entries that agree with the sign of the sum (the merge of TIES).

    Where the sum is 0 the sign is that of the majority of signs in the whole tensor.
    """
    sign = torch.stack(list(deltas)).sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        # the released code takes the side of the negatives where no sign won
        agrees = torch.where(sign > 0, delta > 0, delta < 0)
        total += torch.where(agrees, delta, 0.0)
        count += agrees
    return total / count.clamp(min=1)


@sequential
def wudi(
    deltas: Sequence[Tensor],
    squared: bool = True,
    steps: int | None = None,
    lr: float = 1e-5,
    name: str = "matrix",
) -> Tensor:
    """The difference that interferes least with every task's rows (WUDI, arXiv 2503.08099).

    Minimises `wudi_loss`, from the sum of the differences.

    Args:
        deltas: T matrices [out, in].
        squared: Each task's term is divided by its squared norm (the paper), or by its norm (the
            released code for ViT).
        steps: None for the exact minimiser nearest to the sum (the loss is quadratic); else so many
            steps of Adam (the released code: 300).
        lr: Of Adam (released: 1e-5).
        name: For errors.
    """
    total = _sum(deltas, name)
    scales = _wudi_scales(deltas, squared)
    if steps is None:
        gram = total.new_zeros(2 * total.shape[1:])
        moment = torch.zeros_like(total)
        for delta, scale in zip(deltas, scales, strict=True):
            one = delta.double().T @ delta.double() * scale
            gram += one
            moment += delta.double() @ one
        return shrunk_towards(total, gram, moment, name)
    grams = [d.double().T @ d.double() * s for d, s in zip(deltas, scales, strict=True)]
    value, first, second = total.clone(), torch.zeros_like(total), torch.zeros_like(total)
    for step in range(1, steps + 1):
        grad = torch.zeros_like(total)
        for delta, gram in zip(deltas, grams, strict=True):
            grad += 2 * (value - delta.double()) @ gram
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad.square()
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        value = value - lr * (first / (1 - 0.9**step)) / root
    return value


@sequential
def wudi_loss(merged: Tensor, deltas: Sequence[Tensor], squared: bool = True) -> float:
    """The sum over tasks of ``|(merged - delta) delta'|^2``, each over the norm of `delta`."""
    loss = 0.0
    for delta, scale in zip(deltas, _wudi_scales(deltas, squared), strict=True):
        wide = delta.double()
        loss += float(((merged.double() - wide) @ wide.T).square().sum()) * scale
    return loss


def _wudi_scales(deltas: Sequence[Tensor], squared: bool) -> list[float]:
    norms = [float(d.double().norm()) for d in deltas]
    # a task without a change has no rows to interfere with
    return [0.0 if n == 0 else 1 / (n * n if squared else n) for n in norms]


@sequential
def opcm_project(previous: Tensor, delta: Tensor, alpha: float, name: str = "matrix") -> Tensor:
    """What a new difference has outside of the leading directions of an earlier one.

    In the singular basis of `previous`, the diagonal and the leading block of `delta` become 0. The
    block ends before the first index at which the running share of the singular values exceeds
    `alpha` (counted from 0, as the released code does; its documentation counts from 1).
    """
    if not bool(previous.any()):
        return delta.double()
    u, s, vh = svd(previous, name, full=True)
    share = s.cumsum(0) / s.sum()
    split = int((share > alpha).to(torch.int8).argmax()) if bool((share > alpha).any()) else len(s)
    inside = u.T @ delta.double() @ vh.T
    inside.diagonal().zero_()
    inside[:split, :split] = 0
    return u @ inside @ vh


@sequential
def opcm(deltas: Sequence[Tensor], alpha: float = 0.5, name: str = "matrix") -> Tensor:
    """Sequential merging by orthogonal projection (OPCM, arXiv 2501.09522), one tensor, not scaled.

    The paper rescales the merged model after every step, so that its distance from the base is the mean
    of those seen; the next step multiplies that scale away again. So the scale matters once, at the
    end: `opcm_scale`. Matrices are projected, other tensors summed.

    Args:
        deltas: In the order in which the models come.
        alpha: See `opcm_project` (default 0.5, the paper's).
        name: For errors.
    """
    total = finite(deltas[0], name)
    for delta in deltas[1:]:
        new = finite(delta, name) if delta.ndim != 2 else opcm_project(total, delta, alpha, name)
        total = total + new
    return total


def opcm_scale(merged: float, norms: Sequence[float]) -> float:
    """The factor that brings the merged model's norm to the mean of the models' norms.

    Args:
        merged: Norm of all tensors of the merged difference together.
        norms: Of each model's difference.
    """
    return sum(norms) / len(norms) / merged if merged > 0 else 1.0


def _sum(deltas: Sequence[Tensor], name: str) -> Tensor:
    total = finite(deltas[0], name)
    for delta in deltas[1:]:
        total = total + finite(delta, name)
    return total
