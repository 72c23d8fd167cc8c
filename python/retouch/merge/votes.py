"""Merges that compare models coordinate by coordinate."""

from typing import Any

import torch
from torch import Tensor

from retouch import ops
from retouch.errors import HyperparameterError
from retouch.merge.averages import LAMBDA, WEIGHT, TaskArithmetic
from retouch.merge.base import Job, Method, Param, register
from retouch.merge.streams import Histogram, Streams


@register("sens_merging")
class SensMerging(TaskArithmetic):
    """Sens-Merging (arXiv 2502.12420): task arithmetic with a given coefficient for each model and layer.

    Provisional: there is no released code, and we know the paper from secondary sources. How it finds the
    coefficients is not implemented; hand them over as each tensor's ``weight``.
    """

    paper = "2502.12420"
    per_model = {"weight": WEIGHT}
    dialects = ("paper",)


@register("sce")
class SCE(Method):
    """SCE (FuseChat, arXiv 2408.07990): select by variance, weigh by energy, erase the minority sign.

    Of each tensor the int(select_topk nonzero) coordinates of largest variance across models (ties by lowest
    position); a model's weight is the mean square of its selected differences.
    """

    paper = "2408.07990"
    shared = {"select_topk": Param(float, 1.0, 0.0, 1.0, help="the share of varying coordinates")}
    dialects = ("mergekit",)

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        streams, n = Streams.of(job), job.tensors[0].numel()
        topk = job.shared["select_topk"]
        if topk < 1 and n and len(job.tensors) > 1:
            variance = streams.blend("variance", torch.float32, onto_base=False)
            count = int(topk * int((variance != 0).sum()))
            index = ops.topk([variance], [job.name], count)[0]
            mask = torch.zeros(n, dtype=torch.float32)
            mask[index.long()] = 1.0
            streams.factors = [mask.view(variance.shape)] * len(job.tensors)
        energy = [square / max(n, 1) for square in streams.gram().diagonal().tolist()]
        total = sum(energy)
        tiny = total < 1e-6
        streams.weights = [1 / len(energy) if tiny else e / total for e in energy]
        job.note("weights", streams.weights)
        return streams.blend("elect", job.out_dtype, vote="mass", zero=1.0, take="weighted_mean")

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """See `Method`."""
        return 10 * numel


@register("consensus")
class Consensus(Method):
    """Consensus task arithmetic on TALL masks (arXiv 2405.07813).

    A model needs a coordinate where its difference exceeds tall_lambda times what the others add to the sum;
    the sum stays where at least k models need it. With ``task`` the mask of that model alone is used.
    """

    paper = "2405.07813"
    per_model = {
        "tall_lambda": Param(float, 0.4, low=0.0, help="searched from .2 to .6 for each task")
    }
    shared = {
        "k": Param(int, 2, low=1, help="how many models must need a coordinate"),
        "lambda": LAMBDA,
        "task": Param(int, None, low=0, help="the model (from 0) whose mask is used alone"),
    }
    pieces = True
    fixes_base = True

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return Streams.of(job).blend(
            "standing", job.out_dtype, per_model=job.values("tall_lambda"), least=job.shared["k"],
            lam=job.shared["lambda"], own=_task(job, required=False),
        )  # fmt: skip


def _task(job: Job, *, required: bool) -> int | None:
    task: int | None = job.shared["task"]
    if task is not None and task >= len(job.tensors):
        raise HyperparameterError(
            f"task {task} is no model: there are {len(job.tensors)}, counted from 0"
        )
    return task


@register("emr")
class EMR(Method):
    """EMR-Merging (arXiv 2405.17461), rebuilt for one task: elected largest differences, masked and rescaled.

    The scale is the ratio of mean magnitudes, summed over tensors, of the model's differences and of what
    the mask leaves (the authors' code for 8 tasks). One pass before the merge.
    """

    paper = "2405.17461"
    shared = {"task": Param(int, low=0, help="the model (from 0) that is rebuilt")}
    scope = "model"
    pieces = True

    def begin(self, job: Job) -> dict[str, float]:
        """See `Method`."""
        return {"model": 0.0, "masked": 0.0}

    def _masked(self, job: Job, dtype: torch.dtype, **options: Any) -> Tensor:
        own = _task(job, required=True)
        return Streams.of(job).blend(
            "elect", dtype, vote="mass", zero=-1.0, take="largest", own=own, **options
        )

    def observe(self, job: Job) -> None:
        """See `Method`."""
        n = max(job.tensors[0].numel(), 1)
        own = _task(job, required=True)
        assert own is not None
        job.state["model"] += Streams.of(job).sums()[own][0] / n
        masked = self._masked(job, torch.float32, onto_base=False)
        part = Job(job.name, None, [masked], [job.models[own]], [], {}, job.dialect)
        job.state["masked"] += Streams.of(part).sums()[0][0] / n

    def survey_memory(self, numel: int, models: int, dialect: str) -> int:
        """What the mask leaves of the tensor."""
        return 4 * numel

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        model, masked = job.state["model"], job.state["masked"]
        return self._masked(job, job.out_dtype, lam=model / masked if masked else 1.0)


@register("localize_stitch")
class LocalizeStitch(Method):
    """Localize-and-Stitch without data (arXiv 2408.13656): largest differences, averaged where they meet.

    Of each model the differences strictly larger than the k-th largest of the whole model, k =
    int(density n): k - 1 or fewer, as in the authors' code. Two passes before the merge.
    """

    paper = "2408.13656"
    per_model = {"density": Param(float, 0.05, 0.0, 1.0, help="the share that is kept")}
    scope = "model"
    pieces = True
    observes_pieces = True

    def begin(self, job: Job) -> dict[str, Any]:
        """See `Method`."""
        n = len(job.tensors)
        return {
            "histograms": [Histogram() for _ in range(n)],
            "density": job.values("density"),
            "pass": 0,
        }

    def observe(self, job: Job) -> None:
        """See `Method`."""
        streams = Streams.of(job)
        for t, histogram in enumerate(job.state["histograms"]):
            histogram.add(streams.one(t))

    def settle(self, state: Any) -> bool:
        """See `Method`."""
        state["pass"] += 1
        for histogram, density in zip(state["histograms"], state["density"], strict=True):
            histogram.settle(max(1, int(histogram.total * density)))
        return bool(state["pass"] < 2)

    def survey_memory(self, numel: int, models: int, dialect: str) -> int:
        """What the kernel counts with."""
        return Histogram.counting(numel)

    def state_memory(self, models: int, tensors: int) -> int:
        """One histogram for each model."""
        return Histogram.memory(models)

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        streams = Streams.of(job)
        if job.masks is None:
            streams.low = [(h.value, -1) for h in job.state["histograms"]]
        return streams.blend("active", job.out_dtype, per_model=[1.0] * len(job.tensors))


@register("pcb")
class PCB(Method):
    """PCB-Merging (arXiv 2410.02396): differences compete within a model and between models.

    The authors' code for language models: magnitudes clamped at their 1e-4 quantiles, scores exp(T norm^2)
    tanh(delta sum), those under the (1 - ratio) quantile count nothing. Four passes before the merge.
    """

    paper = "2410.02396"
    per_model = {"weight": Param(float, 1.0, help=WEIGHT.help)}
    shared = {"ratio": Param(float, 0.1, 0.0, 1.0, help="the share of scores that counts")}
    scope = "model"
    pieces = True
    observes_pieces = True

    def begin(self, job: Job) -> dict[str, Any]:
        """See `Method`."""
        n = len(job.tensors)
        return {
            "pass": 0, "ratio": job.shared["ratio"],
            "low": [Histogram() for _ in range(n)], "high": [Histogram() for _ in range(n)],
            "floor": [Histogram(True) for _ in range(n)], "top": [Histogram(True) for _ in range(n)],
        }  # fmt: skip

    def _parts(self, job: Job) -> tuple[list[Tensor], list[Tensor]]:
        """Signed clamped differences, and scores, of each model; float32."""
        assert job.base is not None
        base = job.base.float()
        deltas = [t.float() - base for t in job.tensors]
        total = torch.stack(deltas).sum(0)
        clamped, scores = [], []
        for t, d in enumerate(deltas):
            low, high = job.state["low"][t].value, job.state["high"][t].value
            a = d.abs().clamp(low, max(high, low))
            norm = (a - low) / (high - low) if high > low else torch.zeros_like(a)
            clamped.append(d.sign() * a)
            scores.append(torch.exp(len(deltas) * norm * norm) * torch.tanh(d * total))
        return clamped, scores

    def observe(self, job: Job) -> None:
        """See `Method`."""
        state = job.state
        if state["pass"] < 2:
            streams = Streams.of(job)
            for t in range(len(job.tensors)):
                state["low"][t].add(streams.one(t))
                state["high"][t].add(streams.one(t))
            return
        for t, score in enumerate(self._parts(job)[1]):
            part = Streams.of(Job(job.name, None, [score], [job.models[t]], [], {}, job.dialect))
            state["floor"][t].add(part)
            state["top"][t].add(part)

    def settle(self, state: Any) -> bool:
        """See `Method`."""
        state["pass"] += 1
        names = ("low", "high") if state["pass"] <= 2 else ("floor", "top")
        for name in names:
            for histogram in state[name]:
                d = histogram.total
                at = {  # 0-based, ascending
                    "low": int(d * 1e-4), "high": int(d * (1 - 1e-4) - 1),
                    "floor": int(d * (1 - state["ratio"])), "top": d - 1,
                }[name]  # fmt: skip
                histogram.settle(d - min(max(at, 0), d - 1))
        return bool(state["pass"] < 4)

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        assert job.base is not None
        clamped, scores = self._parts(job)
        merged, shares = torch.zeros_like(clamped[0]), torch.zeros_like(clamped[0])
        for t, (c, b) in enumerate(zip(clamped, scores, strict=True)):
            floor, top = job.state["floor"][t].value, job.state["top"][t].value
            share = (
                (b.clamp(min=floor) - floor) / (top - floor) if top > floor else torch.zeros_like(b)
            )
            merged += job.values("weight")[t] * c * share
            shares += share
        return (job.base.float() + merged / shares.clamp_min(1e-12)).to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """See `Method`."""
        return 4 * numel * (3 * models + 6)

    def survey_memory(self, numel: int, models: int, dialect: str) -> int:
        """The scores, and what the kernel counts with."""
        return self.memory(numel, models, dialect) + Histogram.counting(numel)

    def state_memory(self, models: int, tensors: int) -> int:
        """Four histograms for each model."""
        return Histogram.memory(4 * models)


@register("arcee_fusion")
class ArceeFusion(Method):
    """Arcee Fusion (mergekit): takes the other model where a change is important.

    Importance is the magnitude of the difference times the divergence of the row's softmax; the threshold is
    the median plus 1.5 times the distance of the quartiles. Quartiles are exact here; mergekit draws a
    sample, with replacement, above a million elements.
    """

    models = (1, 1)
    dialects = ("mergekit",)

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        assert job.base is not None
        base, other = job.base.float(), job.tensors[0].float()
        if base.numel() == 0 or base.dim() == 0:
            return base.to(job.out_dtype)
        p, q = other.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
        divergence = (p * (p / q).log()).sum(-1, keepdim=True)
        importance = (other - base).abs() * divergence
        flat, n = importance.reshape(-1), importance.numel()
        low, middle, high = (
            float(flat.kthvalue(int(s * (n - 1)) + 1).values) for s in (0.25, 0.5, 0.75)
        )
        threshold = middle + 1.5 * (high - low)
        return torch.where(importance >= threshold, other, base).to(job.out_dtype)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """See `Method`."""
        return 40 * numel
