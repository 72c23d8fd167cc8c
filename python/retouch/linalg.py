"""Linear algebra whose bits depend on nothing but its input.

LAPACK splits its sums by the number of threads, so singular vectors differ in their last bits between
one thread and two. Everything here runs in float64 on one thread, whatever torch is set to. Between
machines, and versions of LAPACK, the last bits may still differ.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from retouch.errors import ScoreError

__all__ = ["finite", "one_thread", "polar", "sequential", "shrunk_towards", "svd"]

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_inside = 0
_before = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch and LAPACK compute on the calling thread alone. May be nested and shared."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.get_num_threads()
        _inside += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            # the library's setting is one for the process: others may still be inside
            if _inside == 0:
                torch.set_num_threads(_before)


def sequential(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: the function runs in `one_thread`, without gradients."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with one_thread(), torch.no_grad():
            return function(*args, **kwargs)

    return run


def finite(x: Tensor, name: str) -> Tensor:
    """The matrix in float64.

    Raises:
        ScoreError: A value is NaN or infinite.
    """
    wide = x.double()
    if not bool(wide.isfinite().all()):
        raise ScoreError(f"{name} holds NaN or infinity")
    return wide


def svd(x: Tensor, name: str = "matrix", full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition, in float64, with signs that do not depend on LAPACK.

    Of each left vector the entry of the largest magnitude (the first of equals) is positive. Vectors of
    equal singular values are defined up to a rotation only: there LAPACK's choice stays.

    Args:
        x: [m, n] of any float dtype.
        name: For errors.
        full: Square U and Vh (the further vectors keep their signs), else thin ones.

    Returns:
        U [m, r], S [r] descending, Vh [r, n], with r = min(m, n).

    Raises:
        ScoreError: A value is NaN or infinite.
    """
    u, s, vh = torch.linalg.svd(finite(x, name), full_matrices=full)
    if s.numel():
        rank = torch.arange(len(s))
        negative = u[u[:, : len(s)].abs().argmax(0), rank] < 0
        u[:, : len(s)] *= torch.where(negative, -1.0, 1.0)
        vh[: len(s)] *= torch.where(negative, -1.0, 1.0)[:, None]
    return u, s, vh


def polar(x: Tensor, name: str = "matrix") -> Tensor:
    """The orthogonal factor: the nearest matrix with orthonormal columns (or rows), float64."""
    u, _, vh = svd(x, name)
    return u @ vh


def shrunk_towards(start: Tensor, gram: Tensor, moment: Tensor, name: str = "gram") -> Tensor:
    """The solution X of ``X @ gram = moment`` that is nearest to `start`.

    Where `gram` is regular that is ``moment @ inverse(gram)``. In directions that it does not see
    (its null space, up to rounding) X stays at `start`, as gradient descent would.

    Args:
        start: [m, n].
        gram: [n, n], symmetric and positive semi-definite.
        moment: [m, n].
        name: For errors.

    Returns:
        [m, n], float64.

    Raises:
        ScoreError: `gram` holds NaN or infinity, or has a negative eigenvalue beyond rounding.
    """
    start, gram, moment = start.double(), finite(gram, name), moment.double()
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    top = float(values.abs().max()) if values.numel() else 0.0
    cut = top * len(values) * torch.finfo(torch.float64).eps
    if values.numel() and float(values[0]) < -max(cut, 1e-6 * top):
        raise ScoreError(
            f"{name} is not positive semi-definite (an eigenvalue is {float(values[0]):.3g}): "
            "a Gram matrix is X'X of the layer's inputs"
        )
    seen = values > cut
    inverse = torch.where(seen, 1 / values.where(seen, torch.ones_like(values)), 0.0)
    rest = (moment - start @ gram) @ vectors
    out: Tensor = start + (rest * inverse) @ vectors.T
    return out
