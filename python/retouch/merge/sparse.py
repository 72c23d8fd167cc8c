"""Merges of differences that were made sparse first: TIES, DARE, DELLA, Breadcrumbs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from retouch import _core
from retouch.errors import HyperparameterError
from retouch.merge.averages import LAMBDA, WEIGHT, divisor, normalize
from retouch.merge.base import Job, Method, Param, register
from retouch.merge.streams import EVERY, Cut, Histogram, Streams

DENSITY = Param(float, 1.0, 0.0, 1.0, help="the share of differences that is kept")
RESCALE = Param(bool, True, help="enlarge what is kept for what was dropped")


def numel(job: Job) -> int:
    """Elements of the tensor."""
    return job.tensors[0].numel()


def chance(job: Job, t: int, share: float) -> tuple[int, str, float]:
    """The random choice of one model: its numbers depend on seed, model, tensor and position alone."""
    return job.seed, f"{job.models[t]}\n{job.name}", share


def elected(job: Job, streams: Streams, dtype: torch.dtype) -> Tensor:
    """Mergekit's consensus: weighted votes, + where they are even, by the weights that agree."""
    take = "weighted_mean" if job.shared["normalize"] else "sum"
    return streams.blend(
        "elect", dtype, vote="weighted", zero=1.0, take=take, lam=job.shared["lambda"]
    )


@register("ties")
class TIES(Method):
    """TIES-Merging (arXiv 2306.01708): trim small differences, elect a sign, average those that agree.

    Dialects, which differ in more than rounding:

    * ``paper``: the authors' code. One threshold a model over the whole model (the k-th largest
      magnitude and all that equal it; k = int(density n) + 1), votes unweighted, no vote is decided by the
      sign of all votes, mean over those that agree. Three passes before the merge.
    * ``mergekit``: of each tensor exactly k = max(1, int(density n)), weighted votes, even votes are +,
      divided by the weights that agree.
    * ``peft``: of each tensor exactly int(density n), votes unweighted, weights after, divided by the
      number that agree.

    ``take`` ("mean", "sum", "largest") is the authors' merge function, for ``paper`` alone.
    """

    paper = "2306.01708"
    per_model = {"weight": Param(float, 1.0, help=WEIGHT.help), "density": DENSITY}
    shared = {
        "normalize": normalize(True),
        "lambda": LAMBDA,
        "take": Param(
            str, "mean", choices=("mean", "sum", "largest"), help="what agreeing values become"
        ),
    }
    pieces = True
    observes_pieces = True
    dialects = ("paper", "mergekit", "peft")
    defaults = {"paper": {"density": 0.2}}

    def global_scope(self, dialect: str) -> bool:
        """See `Method`."""
        return dialect == "paper"

    def begin(self, job: Job) -> dict[str, Any]:
        """See `Method`."""
        n = len(job.tensors)
        return {
            "histograms": [Histogram() for _ in range(n)], "density": job.values("density"),
            "bounds": None, "signs": 0, "majority": 0.0, "pass": 0,
        }  # fmt: skip

    def observe(self, job: Job) -> None:
        """See `Method`: two passes for the thresholds, one for the vote of all votes."""
        state, streams = job.state, Streams.of(job)
        if state["pass"] < 2:
            for t, histogram in enumerate(state["histograms"]):
                histogram.add(streams.one(t))
            return
        self._trim(job, streams)
        part = streams.blend(
            "elect", torch.float32, vote="mass", zero=0.0, take="sum", onto_base=False
        )
        state["signs"] += int(torch.sign(part).to(torch.int64).sum())

    def settle(self, state: Any) -> bool:
        """See `Method`."""
        state["pass"] += 1
        if state["pass"] < 3:
            for histogram, density in zip(state["histograms"], state["density"], strict=True):
                # as the authors count: the k-th smallest is the threshold, and it is kept
                histogram.settle(min(int(histogram.total * density) + 1, histogram.total))
            state["bounds"] = [h.value for h in state["histograms"]]
            return True
        state["majority"] = float((state["signs"] > 0) - (state["signs"] < 0))
        return False

    def survey_memory(self, numel: int, models: int, dialect: str) -> int:
        """The vote of the third pass: its sum, and the signs as whole numbers."""
        return max(16 * numel, Histogram.counting(numel))

    def state_memory(self, models: int, tensors: int) -> int:
        """One histogram for each model."""
        return Histogram.memory(models)

    def _trim(self, job: Job, streams: Streams) -> None:
        streams.low = [(bound, EVERY) for bound in job.state["bounds"]]

    def prepare(self, job: Job) -> list[Cut | None] | None:
        """The cut of each model in this tensor."""
        if job.dialect == "paper" or job.masks is not None:
            return None
        n = numel(job)
        least = 1 if job.dialect == "mergekit" else 0
        counts = [min(max(least, int(d * n)), n) if d > 0 else 0 for d in job.values("density")]
        job.note("kept", counts)
        found = Streams.of(job).cuts(counts)
        return [None if k == n else cut for k, cut in zip(counts, found, strict=True)]

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        streams = Streams.of(job, job.values("weight"))
        if job.local is not None:
            streams.low = job.local
        lam = job.shared["lambda"]
        if job.dialect == "mergekit":
            return elected(job, streams, job.out_dtype)
        if job.dialect == "peft":
            return streams.blend(
                "elect", job.out_dtype, vote="mass", zero=1.0, take="mean", lam=lam
            )
        self._trim(job, streams)
        zero = job.state["majority"]
        take = job.shared["take"]
        return streams.blend("elect", job.out_dtype, vote="mass", zero=zero, take=take, lam=lam)


class _Drawn(NamedTuple):
    """What DARE must know of a whole tensor."""

    scales: list[float]
    choices: Streams | None = None


class _Dare(Method):
    """What both forms of DARE share: the random choice and its scale."""

    paper = "2311.03099"
    per_model = {
        "weight": Param(float, 1.0, help=WEIGHT.help),
        "density": DENSITY,
        "q": Param(
            float, None, low=0.0, help="DAREx: what is kept is divided by this, not by the density"
        ),
    }
    shared = {"normalize": normalize(False), "lambda": LAMBDA, "rescale": RESCALE}
    pieces = True
    dialects = ("paper", "mergekit")
    defaults = {"paper": {"density": 0.1}}

    def choose(self, job: Job) -> Streams:
        """The streams with their random choices, not scaled yet."""
        streams = Streams.of(job, job.values("weight"))
        if job.masks is None:
            shares = job.values("density")
            streams.chances = [None if d >= 1 else chance(job, t, d) for t, d in enumerate(shares)]
        return streams

    def prepare(self, job: Job) -> "_Drawn":
        """What multiplies the kept differences of each model, and the choices where that took them."""
        density, q = job.values("density"), job.values("q")
        if not job.shared["rescale"]:
            return _Drawn([1.0] * len(density))
        if job.dialect == "mergekit" and not any(q):
            if all(d >= 1 for d in density) and job.masks is None:
                return _Drawn([1.0] * len(density))
            streams = self.choose(job)
            if job.room is None:
                streams.draw()  # 1/8 byte an element: drawing costs as much as all the rest
            scales = [a / kept if min(a, kept) >= 1e-7 else 1.0 for a, kept in streams.sums()]
            return _Drawn(scales, streams)
        scales = [1.0 / (b or d) if (b or d) > 0 else 1.0 for d, b in zip(density, q, strict=True)]
        return _Drawn(scales)

    def scaled(self, job: Job) -> Streams:
        """The streams as they are combined."""
        streams, drawn = self.choose(job), job.local.choices
        streams.scales = job.local.scales
        if drawn is not None:
            streams.chances, streams.drawn = drawn.chances, drawn.drawn
        return streams


@register("dare_linear")
class DareLinear(_Dare):
    """DARE (arXiv 2311.03099): drop differences at random, enlarge the rest, add them up.

    ``paper`` divides by the density (or by DAREx's q, arXiv 2410.09344); ``mergekit`` matches the sum of
    magnitudes of the whole tensor. Random numbers depend on seed, model, tensor and position alone.
    """

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        lam = job.shared["lambda"]
        return self.scaled(job).blend("sum", job.out_dtype, divide=divisor(job), lam=lam)


@register("dare_ties")
class DareTies(_Dare):
    """DARE's random choice, then the sign election of TIES (no trim); dialects as in `dare_linear`."""

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        streams = self.scaled(job)
        if job.dialect == "mergekit":
            return elected(job, streams, job.out_dtype)
        lam = job.shared["lambda"]
        return streams.blend("elect", job.out_dtype, vote="mass", zero=0.0, take="mean", lam=lam)


class _Della(Method):
    """What both forms of DELLA share: a choice that favours large differences of a row."""

    paper = "2406.11617"
    per_model = {
        "weight": Param(float, 1.0, help=WEIGHT.help),
        "density": DENSITY,
        "epsilon": Param(
            float, 0.15, low=0.0, help="half the spread of the probabilities in a row"
        ),
    }
    pieces = True
    dialects = ("paper", "mergekit")

    def _factors(self, job: Job) -> list[Tensor | None]:
        own = job.dialect == "paper" and job.shared["rescale"]  # each by its own probability
        streams = Streams.of(job)
        row = job.tensors[0].shape[-1] if job.tensors[0].dim() else 1
        out: list[Tensor | None] = []
        pairs = zip(job.values("density"), job.values("epsilon"), strict=True)
        for t, (density, epsilon) in enumerate(pairs):
            if density >= 1 or job.masks is not None or numel(job) == 0:
                out.append(streams.factors[t])
                continue
            if density - epsilon <= 0 or density + epsilon >= 1:
                raise HyperparameterError(
                    f"{job.name}: density - epsilon and density + epsilon must be between 0 and 1, got "
                    f"{density} and {epsilon} for {job.models[t]}"
                )
            factors = torch.empty(job.tensors[0].shape, dtype=torch.float32)
            key = chance(job, t, 0.0)[:2]
            _core.ramp_(factors, streams.one(t), row, density, epsilon, key, own)
            out.append(factors)
        return out

    def prepare(self, job: Job) -> list[float]:
        """Mergekit's scale: the sum of magnitudes of the tensor is matched."""
        n = len(job.tensors)
        if job.dialect == "paper" or not job.shared["rescale"]:
            return [1.0] * n
        scales = []
        totals = [[0.0, 0.0] for _ in range(n)]
        for part in _parts(job):
            streams = Streams.of(part)
            streams.factors = self._factors(part)
            for total, (all_, kept) in zip(totals, streams.sums(), strict=True):
                total[0] += all_
                total[1] += kept
        for all_, kept in totals:
            scales.append(all_ / kept if min(all_, kept) >= 1e-7 else 1.0)
        return scales

    def streams(self, job: Job) -> Streams:
        """The streams as they are combined."""
        streams = Streams.of(job, job.values("weight"))
        streams.factors, streams.scales = self._factors(job), job.local
        return streams

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """See `Method`."""
        return 4 * models * (max(numel, _PART) if dialect == "mergekit" else numel)


_PART = 1 << 24


def _parts(job: Job) -> list[Job]:
    """Stretches of a job, always the same ones, whatever memory there is."""
    first = job.tensors[0].shape[0] if job.tensors[0].dim() else 1
    row = max(1, numel(job) // max(first, 1))
    step = max(1, _PART // row)
    if first <= step:
        return [job]
    return [job.piece(at, min(at + step, first)) for at in range(0, first, step)]


@register("della")
class Della(_Della):
    """DELLA (arXiv 2406.11617): a random choice by rank in the row, then election and weighted mean.

    The probability to stay rises from density - epsilon for the smallest difference of a row to density
    + epsilon for the largest. ``paper`` divides each kept difference by its own probability;
    ``mergekit`` matches the sum of magnitudes of the tensor.
    """

    shared = {"normalize": normalize(True), "lambda": LAMBDA, "rescale": RESCALE}

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return elected(job, self.streams(job), job.out_dtype)


@register("della_linear")
class DellaLinear(_Della):
    """DELLA's choice, then the weighted sum."""

    shared = {"normalize": normalize(False), "lambda": LAMBDA, "rescale": RESCALE}

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        lam = job.shared["lambda"]
        return self.streams(job).blend("sum", job.out_dtype, divide=divisor(job), lam=lam)


class _Breadcrumbs(Method):
    """What both forms of Breadcrumbs share: the middle band of magnitudes."""

    paper = "2312.06795"
    per_model = {
        "weight": Param(float, 1.0, help=WEIGHT.help),
        "density": DENSITY,
        "gamma": Param(
            float, 0.01, 0.0, 1.0, help="the share of largest differences that is dropped"
        ),
    }
    shared = {"normalize": normalize(False), "lambda": LAMBDA}
    pieces = True

    def prepare(self, job: Job) -> tuple[list[Cut | None], list[Cut | None]] | None:
        """The lower and the upper cut of each model in the tensor."""
        if job.dialect == "paper" or job.masks is not None:
            return None
        n = numel(job)
        tops, keeps = [], []
        for density, gamma in zip(job.values("density"), job.values("gamma"), strict=True):
            target = int(density * n)
            tops.append(min(int(gamma * n), n - target))  # density goes before outliers
            keeps.append(target)
        job.note("kept", keeps)
        streams = Streams.of(job)
        low, high = streams.bands(tops, keeps)
        return (
            [None if t + k == n else cut for cut, t, k in zip(low, tops, keeps, strict=True)],
            [cut if t else None for cut, t in zip(high, tops, strict=True)],
        )

    def streams(self, job: Job) -> Streams:
        """The streams as they are combined."""
        streams = Streams.of(job, job.values("weight"))
        if job.local is not None:
            streams.low, above = job.local
            streams.high = above
        elif job.masks is None and numel(job):
            row = job.tensors[0].shape[-1] if job.tensors[0].dim() else 1
            pairs = zip(job.values("density"), job.values("gamma"), strict=True)
            for t, (density, gamma) in enumerate(pairs):
                factors = torch.empty(job.tensors[0].shape, dtype=torch.float32)
                _core.band_(factors, streams.one(t), row, int(row * gamma), int(row * density))
                streams.factors[t] = factors
        return streams

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """See `Method`."""
        return 4 * models * numel if dialect == "paper" else 0


@register("breadcrumbs")
class Breadcrumbs(_Breadcrumbs):
    """Model Breadcrumbs (arXiv 2312.06795): drop the largest and the smallest differences, add the rest.

    ``paper``: along the last dimension, int(row gamma) largest dropped, then int(row density) kept.
    ``mergekit``: over the tensor, int(gamma n) dropped (fewer where density + gamma exceeds 1), exactly
    int(density n) kept. Of equal magnitudes ``paper`` drops the first as outliers (torch.topk's order in
    the authors' code), ``mergekit`` keeps the first.
    """

    dialects = ("paper", "mergekit")
    defaults = {"paper": {"density": 0.2, "gamma": 0.1, "lambda": 0.4}}

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        lam = job.shared["lambda"]
        return self.streams(job).blend("sum", job.out_dtype, divide=divisor(job), lam=lam)


@register("breadcrumbs_ties")
class BreadcrumbsTies(_Breadcrumbs):
    """Breadcrumbs' band of each tensor, then the sign election of TIES (mergekit's combination)."""

    dialects = ("mergekit",)

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return elected(job, self.streams(job), job.out_dtype)
