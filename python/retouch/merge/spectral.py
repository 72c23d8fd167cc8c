"""Merge methods on singular vectors: TSV-M, Iso-C, Iso-CTS, KnOTS, WUDI, OPCM, Twin-Merging."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retouch import ops
from retouch.merge import editing, matrix
from retouch.merge.base import REQUIRED, Job, Method, Param, register
from retouch.merge.matrixmethod import LAMBDA, NUMBER, WEIGHT, MatrixMethod

__all__ = ["OPCM", "TSV", "WUDI", "IsoC", "IsoCTS", "KnOTS", "TwinMerging"]


@register("tsv")
class TSV(MatrixMethod):
    """Task singular vectors (TSV-M): `matrix.tsv`; other tensors: the mean difference."""

    paper = "arXiv 2412.00081"
    matrices = 8

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        return matrix.tsv(deltas, job.name)


@register("iso_c")
class IsoC(MatrixMethod):
    """Isotropic merging, common subspace: `matrix.iso_c`; other tensors: the mean difference."""

    paper = "arXiv 2502.04959"

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        return matrix.iso_c(deltas, job.name)


@register("iso_cts")
class IsoCTS(MatrixMethod):
    """Isotropic merging, common and task subspaces: `matrix.iso_cts`; other tensors: the mean."""

    paper = "arXiv 2502.04959"
    shared = {
        "lambda": LAMBDA,
        "fraction": Param(float, 0.8, 0, 1, help="directions of the common subspace"),
    }
    matrices = 10

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        return matrix.iso_cts(deltas, job.shared["fraction"], job.name)


@register("knots")
class KnOTS(MatrixMethod):
    """TIES or DARE-TIES in the shared basis of the tasks: `matrix.knots`.

    TIES is the authors': the entries at least as large as the threshold (all equals) are kept, the sign
    with the larger mass is elected, and what agrees with it is averaged by count. Tensors that are no
    matrices are merged the same way as they are.
    """

    paper = "arXiv 2410.19735"
    per_model = {
        "weight": WEIGHT,
        "density": Param(float, 0.2, 0, 1, help="fraction of the entries that is kept"),
    }
    shared = {
        "lambda": Param(float, 0.6, help="factor of the merged difference (searched per model)"),
        "inner": Param(str, "ties", choices=("ties", "dare_ties"), help="the element-wise merge"),
        "cut": Param(float, 1e-5, 0, help="singular values at most this large are left out"),
    }
    matrices = 8

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        return matrix.knots(deltas, lambda p: self.other(job, p), job.shared["cut"], job.name)

    def other(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of another tensor."""
        densities = job.values("density")
        if job.shared["inner"] == "dare_ties":
            kept = []
            for part, density, model in zip(deltas, densities, job.models, strict=True):
                draw = ops.uniform(part.shape, job.seed, f"{model}\0{job.name}", "cpu")
                kept.append(
                    torch.where(draw < density, part / density, 0.0) if density else 0 * part
                )
            return matrix.elected_mean(kept)
        pairs = zip(deltas, densities, strict=True)
        return matrix.elected_mean([matrix.at_threshold(d, density) for d, density in pairs])


@register("wudi")
class WUDI(MatrixMethod):
    """Least interference with the tasks' rows: `matrix.wudi`; other tensors: the mean difference.

    Dialect "paper" solves the quadratic problem exactly, "released" is 300 steps of Adam on the loss
    with norms that are not squared, as in the authors' code for vision models (which leaves tensors other
    than linear weights as the base has them).
    """

    paper = "arXiv 2503.08099"
    dialects = ("paper", "released")
    shared = {
        "lambda": LAMBDA,
        "squared": Param(bool, True, help="divide by squared norms"),
        "steps": Param(int, None, 1, help="steps of Adam; none for the exact minimiser"),
        "lr": Param(float, 1e-5, 0, help="of Adam"),
    }
    defaults = {"released": {"squared": False, "steps": 300}}

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        squared, steps, lr = (job.shared[k] for k in ("squared", "steps", "lr"))
        if steps is None:
            job.note("loss_of_sum", matrix.wudi_loss(sum(deltas, 0 * deltas[0]), deltas, squared))
        merged = matrix.wudi(deltas, squared, steps, lr, job.name)
        job.note("loss", matrix.wudi_loss(merged, deltas, squared))
        return merged

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        # the Gram matrix is in x in: taken as that of a matrix four times as wide as high
        return 8 * numel * (models + 6) + 8 * 4 * numel * (models if dialect == "released" else 3)


@dataclass
class _Norms:
    """Squared norms by tensor, so that their sum does not depend on the order."""

    merged: dict[str, float] = field(default_factory=dict)
    models: dict[str, list[float]] = field(default_factory=dict)
    scale: float = 1.0


@register("opcm")
class OPCM(MatrixMethod):
    """Models that arrive one by one, projected on what the earlier ones leave: `matrix.opcm`.

    The order of the models matters. Two passes: the factor that is common to all tensors is known only
    after the first.
    """

    paper = "arXiv 2501.09522"
    scope = "model"
    shared = {
        "lambda": LAMBDA,
        "alpha": Param(float, 0.5, 0, 1, help="share of singular values that is protected"),
    }
    matrices = 12

    def begin(self, job: Job) -> _Norms:
        """An empty state."""
        return _Norms()

    def observe(self, job: Job) -> None:
        """Adds the norms of this tensor."""
        assert job.base is not None
        base = job.base.double()
        pairs = zip(job.tensors, job.values("weight"), strict=True)
        job.state.models[job.name] = [float(((t - base) * w).square().sum()) for t, w in pairs]
        job.state.merged[job.name] = float(super().difference(job).square().sum())

    def settle(self, state: _Norms) -> bool:
        """The common factor; one pass is enough."""
        columns = zip(*state.models.values(), strict=True)
        norms = [math.sqrt(math.fsum(column)) for column in columns]
        state.scale = matrix.opcm_scale(math.sqrt(math.fsum(state.merged.values())), norms)
        state.models.clear()
        state.merged.clear()
        return False

    def state_memory(self, models: int, tensors: int) -> int:
        """One number for each model and tensor, and one for each tensor."""
        return NUMBER * (models + 1) * tensors

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        return matrix.opcm(deltas, job.shared["alpha"], job.name)

    other = matrix  # which sums what is not a matrix

    def difference(self, job: Job) -> Tensor:
        """The merged difference, not yet scaled by lambda."""
        scale: float = job.state.scale
        return super().difference(job) * scale


@register("twin")
class TwinMerging(Method):
    """A shared model, and compressed residuals of the experts that a router adds: Twin-Merging.

    The shared difference is lambda times the weighted sum; each model's residual to it is compressed
    (`editing.twin_residual`) and added `router` times. A plan is for one answer of the router.
    """

    paper = "arXiv 2406.15479"
    per_model = {
        "weight": WEIGHT,
        "router": Param(float, REQUIRED, help="what the router gives this model"),
    }
    shared = {
        "lambda": Param(float, 0.29, help="of the shared model (the released script's value)"),
        "density": Param(float, 0.1, 0, 1, help="what is kept of a residual"),
        "strategy": Param(str, "svd", choices=("svd", "magnitude")),
    }

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        assert job.base is not None
        base = job.base.double()
        deltas = [t.double() - base for t in job.tensors]
        shared = torch.zeros_like(base)
        for delta, weight in zip(deltas, job.values("weight"), strict=True):
            shared += delta * (weight * job.shared["lambda"])
        out = shared.clone()
        for delta, share in zip(deltas, job.values("router"), strict=True):
            if share:
                kept = editing.twin_residual(
                    delta - shared, job.shared["density"], job.shared["strategy"], job.name
                )
                out += share * kept
        return (base + out).float().to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        return 8 * numel * (models + 6)
