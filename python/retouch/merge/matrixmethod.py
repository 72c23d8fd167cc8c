"""What methods on matrices have in common, and statistics that come as files beside the models."""

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from retouch.deltasource import Source
from retouch.linalg import one_thread
from retouch.merge.base import Job, Method, Param

__all__ = ["LAMBDA", "NUMBER", "WEIGHT", "MatrixMethod", "mean", "statistic"]

WEIGHT = Param(float, 1.0, help="factor of the model's difference to the base")
LAMBDA = Param(float, 1.0, help="factor of the merged difference")
NUMBER = 128
"""Bytes of a Python number in a list in a dictionary, with its share of both, generously."""


class MatrixMethod(Method):
    """Merges the differences of matrices as matrices, and those of other tensors in a simpler way.

    Arithmetic is float64 on one thread, so no bit depends on the number of threads. Which tensor is a
    matrix is a matter of its shape: embeddings are matrices too. Where that is not wanted, or too large,
    a plan gives them another method.
    """

    per_model: ClassVar[Mapping[str, Param]] = {"weight": WEIGHT}
    shared: ClassVar[Mapping[str, Param]] = {"lambda": LAMBDA}
    matrices: ClassVar[int] = 4
    """float64 copies of a matrix that are needed at once, beside one for each model."""

    @abstractmethod
    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix, from the weighted ones [out, in]; all float64."""

    def other(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """That of a tensor with another number of dimensions: the mean."""
        return mean(deltas)

    def difference(self, job: Job) -> Tensor:
        """The merged difference, not yet scaled by lambda."""
        assert job.base is not None
        base = job.base.double()
        pairs = zip(job.tensors, job.values("weight"), strict=True)
        deltas = [(tensor.double() - base) * weight for tensor, weight in pairs]
        with one_thread(), torch.no_grad():
            merge = self.matrix if base.ndim == 2 else self.other
            merged: Tensor = merge(job, deltas)
        return merged

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        assert job.base is not None
        scale: float = job.shared["lambda"]
        change = self.difference(job) * scale
        return (job.base.double() + change).float().to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        return 8 * numel * (models + self.matrices)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Of float64 tensors."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total / len(tensors)


@lru_cache(maxsize=64)
def _file(path: str, stamp: int) -> Mapping[str, Callable[[], Tensor]]:
    return Source(path).read


def statistic(path: str, name: str) -> Tensor | None:
    """A tensor that was measured beside a model, by the name of its parameter; None if not there.

    Args:
        path: A safetensors file, or a folder of them.
        name: Of the parameter, as in the checkpoint.
    """
    # a file that was measured anew is another one
    stamp = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
    found = _file(path, stamp).get(name)
    return None if found is None else found()
