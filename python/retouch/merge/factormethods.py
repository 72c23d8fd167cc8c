"""Merge methods on LoRA factors: RobustMerge (CoPA) and MOS."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from retouch.errors import FormatError, HyperparameterError
from retouch.linalg import one_thread
from retouch.merge import adapters
from retouch.merge.base import Job, Method, Param, register
from retouch.merge.sources import Factors

__all__ = ["MOS", "FactorMethod", "RobustMerge", "matched"]


class FactorMethod(Method):
    """Merges A with A and B with B of PEFT LoRA adapters, in float64.

    With a base the result is the base plus the merged adapter; without one it is the merged adapter, a
    folder that PEFT loads. Adapters change the same weights at the same ranks. Where the scales (alpha
    over rank) differ, each B is brought to the scale of the first adapter.
    """

    needs_factors = True

    @abstractmethod
    def join(
        self, pairs: Sequence[tuple[Tensor, Tensor]], shared: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """A and B of the result, float64, from those of each adapter at one scale."""

    def joined(self, factors: Sequence[Factors], shared: Mapping[str, Any]) -> Factors:
        """The merged factors, float64, at the scale of the first adapter."""
        first = factors[0]
        if any(f.scale and not first.scale for f in factors):
            raise HyperparameterError("the first adapter has alpha 0: nothing can be brought to it")
        pairs = [
            (f.a.double(), f.b.double() * (1.0 if f.scale == first.scale else f.scale / first.scale))
            for f in factors
        ]  # fmt: skip
        with one_thread():
            a, b = self.join(pairs, shared)
        return first._replace(a=a, b=b)

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        assert job.base is not None
        if job.factors is None:
            return job.base.float().to(job.out_dtype)
        found = self.joined(job.factors, job.shared)
        with one_thread(), torch.no_grad():
            change = (found.b @ found.a) * found.scale
        wide = job.base.double() + (change.t() if found.transposed else change)
        return wide.float().to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """The change, that before it is scaled, the base and the sum in float64."""
        return 8 * numel * 4

    @staticmethod
    def factor_memory(elements: int) -> int:
        """Bytes for factors of so many elements in all adapters: in float64, pruned, and stacked."""
        return 8 * 4 * elements


@register("robust_merge")
class RobustMerge(FactorMethod):
    """CoPA-Merging, published as RobustMerge: prunes factors, scales up weak ranks.

    The arithmetic is that of `adapters.robust_merge`.
    """

    paper = "arXiv 2502.17159"
    shared: ClassVar[Mapping[str, Param]] = {
        "density": Param(float, 0.2, 0, 1, help="what is kept of each factor, by magnitude"),
        "tail": Param(float, 0.2, 0, 1, help="the share of ranks whose scale is raised"),
        "scale": Param(float, 2.0, help="a constant of the released code"),
    }

    def join(
        self, pairs: Sequence[tuple[Tensor, Tensor]], shared: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `adapters.robust_merge`."""
        return adapters.robust_merge(pairs, shared["density"], shared["tail"], shared["scale"])


@register("mos")
class MOS(FactorMethod):
    """The last adapter drawn towards the mean of the earlier ones, once: `adapters.mos`.

    Adapters come in the order of their tasks. The paper blends after every optimizer step of the last
    task (the recipe `mos` trains so), and has bottleneck adapters; this is one blend of finished LoRA
    factors.
    """

    paper = "arXiv 2412.09441"
    models = (2, None)
    shared: ClassVar[Mapping[str, Param]] = {
        "momentum": Param(float, 0.1, 0, 1, help="how far towards the mean of the earlier adapters")
    }

    def join(
        self, pairs: Sequence[tuple[Tensor, Tensor]], shared: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `adapters.mos`."""
        sides = zip(*pairs, strict=True)
        a, b = (
            adapters.mos(side[-1], torch.stack(side[:-1]).sum(0), len(side) - 1, shared["momentum"])
            for side in sides
        )
        return a, b


def matched(
    found: Sequence[Factors | None], models: Sequence[str], name: str
) -> list[Factors] | None:
    """The factors of all models for one weight; None if none changes it.

    Raises:
        FormatError: Some change it and some do not, at other ranks, or as another layout.
    """
    having = [f for f in found if f is not None]
    if not having:
        return None
    if len(having) < len(found):
        without = next(m for m, f in zip(models, found, strict=True) if f is None)
        raise FormatError(f"{name}: {without} does not change it, but other adapters do")
    for model, one in zip(models, having, strict=True):
        first = having[0]
        if (one.a.shape, one.b.shape, one.transposed) != (
            first.a.shape, first.b.shape, first.transposed,
        ):  # fmt: skip
            raise FormatError(
                f"{name}: A {tuple(one.a.shape)} and B {tuple(one.b.shape)} of {model}, but A "
                f"{tuple(first.a.shape)} and B {tuple(first.b.shape)} of {models[0]}; factors are merged "
                "at one rank (merge the models, or the adapters with a base, by another method)"
            )
    return having
