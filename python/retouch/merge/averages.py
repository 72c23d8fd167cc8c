"""Sums of models and of their differences to a base: no selection, one pass."""

from typing import ClassVar

import torch
from torch import Tensor

from retouch.errors import HyperparameterError
from retouch.merge.base import Job, Method, Param, register
from retouch.merge.streams import Streams

WEIGHT = Param(float, help="the model's part in the sum")
LAMBDA = Param(float, 1.0, help="multiplies the merged difference")


def normalize(default: bool) -> Param:
    """The parameter of that name."""
    return Param(bool, default, help="divide by the sum of the weights")


def divisor(job: Job) -> float:
    """The sum of the weights if they are to be normalised; 1 where it is next to nothing."""
    total = sum(job.values("weight"))
    return total if job.shared["normalize"] and abs(total) >= 1e-8 else 1.0


@register("linear")
class Linear(Method):
    """The weighted mean of models (model soup, arXiv 2203.05482), or their weighted sum.

    No base. ``normalize`` divides by the sum of the weights, which must not be 0.
    """

    paper = "2203.05482"
    per_model = {"weight": WEIGHT}
    shared = {"normalize": normalize(True)}
    base = "none"
    pieces = True
    dialects = ("paper", "mergekit")

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        weights = job.values("weight")
        total = sum(weights) if job.shared["normalize"] else 1.0
        if total == 0:
            raise HyperparameterError(
                f"{job.name}: the weights of linear sum to 0 and cannot be normalised: normalize=False"
            )
        return Streams.of(job, weights).blend("sum", job.out_dtype, divide=total)


@register("ema")
class EMA(Method):
    """One step of an exponential moving average: decay * average + (1 - decay) * model.

    The base is the average so far; keep it in float32 (``out_dtype``), or small steps round away.
    """

    shared = {"decay": Param(float, 0.999, 0.0, 1.0, help="what the average keeps of itself")}
    models = (1, 1)
    pieces = True
    fixes_base = True

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return Streams.of(job).blend("sum", job.out_dtype, lam=1.0 - job.shared["decay"])


@register("task_arithmetic")
class TaskArithmetic(Method):
    """Base plus lambda times the weighted sum of differences (arXiv 2212.04089).

    A negative weight or lambda forgets (task negation). The paper's grid for lambda is 0 to 1; with 8
    tasks .3 to .4 is usual.
    """

    paper = "2212.04089"
    per_model = {"weight": Param(float, 1.0, help=WEIGHT.help)}
    shared = {"normalize": normalize(False), "lambda": LAMBDA}
    pieces = True
    fixes_base = True
    dialects: ClassVar[tuple[str, ...]] = ("paper", "mergekit")

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        streams = Streams.of(job, job.values("weight"))
        return streams.blend("sum", job.out_dtype, divide=divisor(job), lam=job.shared["lambda"])


@register("expo")
class ExPO(Method):
    """Extrapolates from a base through one model: model + alpha (model - base) (arXiv 2404.16792).

    The paper's base is the SFT model and its model the aligned one; alpha .3 to .5.
    """

    paper = "2404.16792"
    shared = {"alpha": Param(float, 0.3, help="how far beyond the model")}
    models = (1, 1)
    pieces = True
    fixes_base = True

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return Streams.of(job).blend("sum", job.out_dtype, lam=1.0 + job.shared["alpha"])


@register("passthrough")
class Passthrough(Method):
    """One model's tensor, times a scale."""

    per_model = {"scale": Param(float, 1.0, help="multiplies the tensor")}
    base = "none"
    models = (1, 1)
    pieces = True
    dialects = ("paper", "mergekit")

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        scale = job.values("scale")[0]
        if scale == 1.0 and job.tensors[0].dtype == job.out_dtype:
            return job.tensors[0]
        return Streams.of(job, [scale]).blend("sum", job.out_dtype)


@register("magmax")
class MagMax(Method):
    """Of all differences the one of largest magnitude, the later model's where equal (arXiv 2407.06322)."""

    paper = "2407.06322"
    shared = {"lambda": Param(float, 0.5, help=LAMBDA.help)}
    pieces = True
    fixes_base = True

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return Streams.of(job).blend("largest", job.out_dtype, lam=job.shared["lambda"])


@register("nearswap")
class Nearswap(Method):
    """Moves each weight of the first model (the base) towards the other by at most t (mergekit)."""

    shared = {"t": Param(float, low=0.0, help="the largest step")}
    models = (1, 1)
    pieces = True
    fixes_base = True
    dialects = ("mergekit",)

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        t = job.shared["t"]
        assert job.base is not None
        out = torch.empty(job.tensors[0].shape, dtype=torch.float32)
        out = Streams.of(job).blend("sum", torch.float32, onto_base=False)
        share = (t / out.abs().clamp_(min=1e-6)).clamp_(0, 1)
        return (out.mul_(share).add_(job.base.float())).to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """See `Method`."""
        return 12 * numel


@register("ram")
class RAM(Method):
    """Sums differences that one model has alone, averages those of several (RAM, arXiv 2601.13572).

    Differences up to epsilon in magnitude are dropped. Made for the sparse changes of RL.
    """

    paper = "2601.13572"
    shared = {"epsilon": Param(float, 1e-5, low=0.0, help="what is no difference")}
    pieces = True
    fixes_base = True
    dialects = ("mergekit",)

    def streams(self, job: Job) -> Streams:
        """The differences that count."""
        streams = Streams.of(job)
        streams.low = [(job.shared["epsilon"], -1)] * len(job.tensors)
        return streams

    def factors(self, job: Job) -> list[float]:
        """What multiplies a difference that no other model shares."""
        return [1.0] * len(job.tensors)

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return self.streams(job).blend("active", job.out_dtype, per_model=self.factors(job))


@register("ramplus_tl")
class RAMPlus(RAM):
    """RAM that enlarges what a model has alone by 1 + r clip(shared / alone, 0, alpha), by tensor."""

    shared = {
        **RAM.shared, "r": Param(float, 0.1, help="strength"),
        "alpha": Param(float, 0.2, low=0.0, help="limit of the ratio"),
    }  # fmt: skip
    fixes_base = False  # its counts are those of the whole tensor

    def prepare(self, job: Job) -> list[float]:
        """The factors, from how many differences each model shares and has alone."""
        eps, n = job.shared["epsilon"], len(job.tensors)
        alone, shared = [0] * n, [0] * n
        assert job.base is not None
        step = (
            max(1, (1 << 22) // max(1, job.tensors[0][:1].numel())) if job.tensors[0].dim() else 1
        )
        for at in range(0, len(job.tensors[0]) if job.tensors[0].dim() else 1, step):
            part = job.piece(at, at + step) if job.tensors[0].dim() else job
            assert part.base is not None
            base = part.base.float()
            active = [(t.float() - base).abs() > eps for t in part.tensors]
            count = torch.stack([a.to(torch.int16) for a in active]).sum(0)
            for i, a in enumerate(active):
                alone[i] += int((a & (count == 1)).sum())
                shared[i] += int((a & (count > 1)).sum())
        r, alpha = job.shared["r"], job.shared["alpha"]
        return [
            1.0 + r * min(max(s / a, 0.0), alpha) if a else 1.0
            for a, s in zip(alone, shared, strict=True)
        ]

    def factors(self, job: Job) -> list[float]:
        """See `RAM`."""
        return list(job.local)
