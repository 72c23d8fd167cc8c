"""Merge methods that are told more than weights: Fisher merging, RegMean, AlphaRL, RELEX, edits."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retouch import ops
from retouch.errors import FormatError
from retouch.merge import editing, statistics, trajectory
from retouch.merge.base import REQUIRED, Job, Method, Param, register
from retouch.merge.matrixmethod import LAMBDA, NUMBER, WEIGHT, MatrixMethod, mean, statistic
from retouch.merge.statistics import IN_OUT

__all__ = ["RELEX", "AlphaRL", "BitDelta", "DareShare", "Fisher", "RankK", "RegMean"]


@dataclass
class _Sizes:
    squares: dict[str, list[float]] = field(default_factory=dict)
    factors: list[float] = field(default_factory=list)


@register("fisher")
class Fisher(Method):
    """Mean of the weights by their Fisher information: `statistics.fisher_mean`.

    Dialect "normalized" divides each model's coefficient by the norm of its Fisher information, so that
    models count equally.
    """

    paper = "arXiv 2111.09832"
    base = "none"
    dialects = ("paper", "normalized")
    per_model = {
        "weight": Param(float, 1.0, 0, help="coefficient of the model"),
        "fisher": Param(
            str, REQUIRED, help="safetensors with its Fisher information, by parameter name"
        ),
    }
    shared = {"floor": Param(float, 1e-6, 0, help="added to every Fisher value")}

    def global_scope(self, dialect: str) -> bool:
        """Whether the norms of the whole model count."""
        return dialect == "normalized"

    def begin(self, job: Job) -> _Sizes:
        """An empty state."""
        return _Sizes()

    def observe(self, job: Job) -> None:
        """Adds the norms of this tensor."""
        job.state.squares[job.name] = [float(f.double().square().sum()) for f in self.files(job)]

    def settle(self, state: _Sizes) -> bool:
        """The common factor; one pass is enough."""
        columns = zip(*state.squares.values(), strict=True)
        inverse = [1 / max(math.sqrt(math.fsum(column)), 1e-300) for column in columns]
        state.factors = [x / sum(inverse) for x in inverse]
        state.squares.clear()
        return False

    def survey_memory(self, numel: int, models: int, dialect: str) -> int:
        """One Fisher tensor in float64, and its square."""
        return 16 * numel

    def state_memory(self, models: int, tensors: int) -> int:
        """One number for each model and tensor."""
        return NUMBER * models * tensors

    def files(self, job: Job) -> list[Tensor]:
        """The Fisher information of every model for this tensor."""
        out = []
        for path in job.values("fisher"):
            found = statistic(path, job.name)
            if found is None:
                raise FormatError(f"{path} holds no Fisher information for {job.name}")
            out.append(found)
        return out

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        factors = [1.0] * len(job.tensors) if job.state is None else job.state.factors
        weights = [w * f for w, f in zip(job.values("weight"), factors, strict=True)]
        merged = statistics.fisher_mean(
            job.tensors, self.files(job), weights, job.shared["floor"], job.name
        )
        return merged.float().to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        return 8 * numel * 6 + 4 * numel * models


@register("regmean")
class RegMean(Method):
    """The layer nearest to all models' outputs: `statistics.regmean`.

    Tensors for which a model has no Gram matrix take the plain mean, and the report says so.
    """

    paper = "arXiv 2212.09849"
    base = "none"
    per_model = {
        "weight": Param(float, 1.0, 0, help="factor of the model's Gram matrices"),
        "gram": Param(
            str,
            REQUIRED,
            help="safetensors with X'X of each layer's inputs by its weight's name: `collect_gram`",
        ),
    }
    shared = {"shrink": Param(float, 0.9, 0, 1, help="factor of the off-diagonal entries")}

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        grams, turned, tensors = [], set(), job.tensors
        for path, weight in zip(job.values("gram"), job.values("weight"), strict=True):
            found = statistic(path, job.name)
            if found is None and (found := statistic(path, job.name + IN_OUT)) is not None:
                turned.add(path)
            if found is not None:
                grams.append(found.double() * weight)
        if len(grams) == len(tensors) and tensors[0].ndim == 2:
            if turned and turned != set(job.values("gram")):
                raise FormatError(
                    f"{job.name} is stored as [in, out] for some of the Gram files, for others not"
                )
            tensors = [t.T for t in tensors] if turned else tensors
            merged = statistics.regmean(tensors, grams, job.shared["shrink"], job.name)
            merged = merged.T.contiguous() if turned else merged
        else:
            job.note("gram", "not measured for every model: plain mean")
            merged = mean([t.double() for t in job.tensors])
        return merged.float().to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        # Gram matrices are in x in: taken as those of a matrix four times as wide as high
        return 8 * numel * 4 * (models + 6)


def _deltas(job: Job) -> list[Tensor]:
    assert job.base is not None
    base = job.base.double()
    return [t.double() - base for t in job.tensors]


def _added(job: Job, change: Tensor) -> Tensor:
    assert job.base is not None
    return (job.base.double() + change).float().to(job.out_dtype)


@register("relex")
class RELEX(Method):
    """The model expected at a later step of training: `trajectory.relex` on every tensor."""

    paper = "arXiv 2605.21468"
    models = (2, None)
    per_model = {"step": Param(float, REQUIRED, help="training step of this checkpoint")}
    shared = {
        "target": Param(float, REQUIRED, help="the step to predict"),
        "rank": Param(int, 1, 1, help="directions that are followed"),
    }

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        target, rank = job.shared["target"], job.shared["rank"]
        return _added(
            job, trajectory.relex(_deltas(job), job.values("step"), target, rank, job.name)
        )

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        return 8 * numel * (2 * models + 3)


@register("alpharl")
class AlphaRL(Method):
    """The rank-1 update at which an accuracy is expected: `trajectory.alpharl` on matrices.

    Other tensors are those of the last checkpoint. Checkpoints come in the order of training.
    """

    paper = "arXiv 2510.00553"
    models = (3, None)
    per_model = {"accuracy": Param(float, REQUIRED, help="of this checkpoint")}
    shared = {"target": Param(float, REQUIRED, help="the accuracy to reach")}

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        deltas = _deltas(job)
        if deltas[0].ndim != 2:
            return _added(job, deltas[-1])
        accuracies, target = job.values("accuracy"), job.shared["target"]
        return _added(job, trajectory.alpharl(deltas, accuracies, target, job.name))

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        return 8 * numel * (models + 5)


@register("rank")
class RankK(MatrixMethod):
    """One model whose differences keep their leading rank: `trajectory.rank_k`; vectors stay."""

    paper = "arXiv 2510.00553"
    models = (1, 1)
    shared = {
        "lambda": LAMBDA,
        "rank": Param(int, 1, 1, help="singular triplets kept"),
        "keep_norm": Param(bool, True, help="scale to the norm of the difference"),
    }

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        return trajectory.rank_k(deltas[0], job.shared["rank"], job.shared["keep_norm"], job.name)


@register("dare_share")
class DareShare(Method):
    """The sum of differences with dropped elements that keep a share: `editing.dare`.

    The general form of DARE in the unified view of delta editing; without a share it is DARE. Masks are
    counter-based: they depend on seed, model, tensor and position.
    """

    paper = "arXiv 2410.13841"
    per_model = {
        "weight": WEIGHT,
        "density": Param(float, REQUIRED, 0, 1, help="probability of being kept"),
        "share": Param(float, 0.0, 0, 1, help="what a dropped element keeps"),
    }

    def merge(self, job: Job) -> Tensor:
        """The merged tensor."""
        total: Tensor | None = None
        for delta, p, model in zip(_deltas(job), job.parameters, job.models, strict=True):
            draw = ops.uniform(delta.shape, job.seed, f"{model}\0{job.name}", "cpu")
            edited = editing.dare(delta, draw < p["density"], 1 - p["density"], p["share"])
            total = edited * p["weight"] if total is None else total + edited * p["weight"]
        assert total is not None
        return _added(job, total)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """Float64 copies of the tensors."""
        return 8 * numel * (models + 4)


@register("bitdelta")
class BitDelta(MatrixMethod):
    """The sum of differences whose matrices keep signs and few magnitudes.

    `editing.sign_magnitudes`; BitDelta (arXiv 2402.10193) has one magnitude per tensor and leaves
    tensors that are no matrices whole.
    """

    paper = "arXiv 2410.13841"
    shared = {"lambda": LAMBDA, "levels": Param(int, 1, 1, help="magnitudes per tensor")}

    def matrix(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of a matrix."""
        out = torch.zeros_like(deltas[0])
        for delta in deltas:
            out += editing.sign_magnitudes(delta, job.shared["levels"])
        return out

    def other(self, job: Job, deltas: list[Tensor]) -> Tensor:
        """The merged difference of another tensor."""
        return mean(deltas) * len(deltas)
