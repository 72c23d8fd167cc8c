"""Merges on the sphere and by angles: one pass for all dot products, then a weighted sum.

Whatever these methods compute lies in the span of their inputs, so float64 dot products of the inputs are
all that is needed to find the coefficients.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from retouch.errors import HyperparameterError
from retouch.merge.averages import WEIGHT
from retouch.merge.base import Job, Method, Param, register
from retouch.merge.streams import Streams

_ROWS = 1 << 22  # elements of the rows that are handled together


def _norms(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()


def _arc(gram: Tensor, t: float, smallest: float, flat: float) -> Tensor:
    """Coefficients [..., 2] of two vectors for a place on the arc between them.

    Norms up to `smallest` count as 1; where the squared sine is at most `flat` the line is taken.
    """
    norms = _norms(gram)
    norms = torch.where(norms <= smallest, torch.ones_like(norms), norms)
    cos = (gram[..., 0, 1] / (norms[..., 0] * norms[..., 1])).clamp(-1, 1)
    angle = torch.acos(cos)
    sine = angle.sin()
    straight = 1 - cos * cos <= flat
    safe = torch.where(straight, torch.ones_like(sine), sine)
    first = torch.where(straight, torch.full_like(sine, 1 - t), ((1 - t) * angle).sin() / safe)
    second = torch.where(straight, torch.full_like(sine, t), (t * angle).sin() / safe)
    return torch.stack([first, second], -1)


class _Span(Method):
    """A weighted sum whose coefficients follow from the dot products of the whole tensor."""

    pieces = True
    dialects: ClassVar[tuple[str, ...]] = ("mergekit",)

    @abstractmethod
    def coefficients(self, job: Job, gram: Tensor) -> Tensor:
        """For dot products [..., models, models] the coefficients [..., models]; float64."""

    def by_rows(self, job: Job) -> bool:
        """Whether each row (last dimension) has coefficients of its own."""
        return False

    def prepare(self, job: Job) -> list[float] | None:
        """The coefficients of the tensor."""
        if self.by_rows(job):
            return None
        found: list[float] = self.coefficients(job, Streams.of(job).gram()).tolist()
        job.note("coefficients", found)
        return found

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        if job.local is not None:
            return Streams.of(job, job.local).blend("sum", job.out_dtype)
        shape = job.tensors[0].shape
        rows = job.tensors[0].numel() // max(shape[-1], 1)
        out = torch.empty(rows, shape[-1], dtype=job.out_dtype)
        step = max(1, _ROWS // max(shape[-1], 1))
        for at in range(0, rows, step):
            part = slice(at, at + step)
            x = torch.stack([t.view(rows, -1)[part].double() for t in job.tensors])
            base = None if job.base is None else job.base.view(rows, -1)[part].double()
            if base is not None:
                x -= base
            gram = torch.einsum("arn,brn->rab", x, x)
            merged = torch.einsum("ra,arn->rn", self.coefficients(job, gram), x)
            out[part] = (
                (merged if base is None else merged + base).to(torch.float32).to(job.out_dtype)
            )
        return out.view(shape)

    def memory(self, numel: int, models: int, dialect: str) -> int:
        """See `Method`."""
        return 8 * min(numel, _ROWS) * (models + 2)


@register("slerp")
class SLERP(_Span):
    """Spherical interpolation (mergekit): the base at t = 0, the model at t = 1.

    The angle is that of the flattened tensors; above a cosine of .9995 the line is taken.
    """

    shared = {"t": Param(float, help="where between the base (0) and the model (1)")}
    models = (1, 1)

    def prepare(self, job: Job) -> list[float] | None:
        """See `_Span`."""
        return super().prepare(self._pair(job))

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        return super().merge(self._pair(job))

    def _pair(self, job: Job) -> Job:
        """Both tensors as they are: nothing is subtracted."""
        assert job.base is not None
        return replace(
            job, base=None, tensors=[job.base, *job.tensors], models=["the base", *job.models]
        )

    def coefficients(self, job: Job, gram: Tensor) -> Tensor:
        """See `_Span`."""
        return _arc(gram, job.shared["t"], 1e-8, 1 - 0.9995**2)


@register("nuslerp")
class NuSLERP(_Span):
    """Spherical interpolation by weights, of two models or of their differences to a base (mergekit).

    ``nuslerp_flatten=False`` takes the angle of each row, with ``nuslerp_row_wise`` of each column (of
    the first dimension).
    """

    per_model = {"weight": WEIGHT}
    shared = {
        "nuslerp_flatten": Param(bool, True, help="one angle for the whole tensor"),
        "nuslerp_row_wise": Param(
            bool, False, help="else: along the first dimension, not the last"
        ),
    }
    base = "optional"
    models = (2, 2)

    def coefficients(self, job: Job, gram: Tensor) -> Tensor:
        """See `_Span`."""
        first, second = job.values("weight")
        total = first + second
        t = 0.5 if abs(total) < 1e-6 else second / total
        return _arc(gram, t, 1e-7, 1e-16)

    def by_rows(self, job: Job) -> bool:
        """See `_Span`."""
        return not job.shared["nuslerp_flatten"] and job.tensors[0].dim() > 1

    def merge(self, job: Job) -> Tensor:
        """See `Method`."""
        if not self.by_rows(job) or not job.shared["nuslerp_row_wise"]:
            return super().merge(job)
        if job.start or job.tensors[0].dim() != 2:
            raise HyperparameterError(f"{job.name}: nuslerp_row_wise takes whole matrices")
        turned = Job(
            job.name, None if job.base is None else job.base.t().contiguous(),
            [t.t().contiguous() for t in job.tensors], job.models, job.parameters, job.shared,
            job.dialect, job.seed, job.out_dtype,
        )  # fmt: skip
        return super().merge(turned).t().contiguous()


@register("multislerp")
class MultiSLERP(_Span):
    """Several models, or differences to a base, by a tangent step at their mean direction (mergekit)."""

    per_model = {"weight": Param(float, 1.0, help=WEIGHT.help)}
    shared = {
        "normalize_weights": Param(bool, True, help="make the weights sum to 1"),
        "eps": Param(float, 1e-8, low=0.0, help="added to norms"),
    }
    base = "optional"
    models = (2, None)

    def coefficients(self, job: Job, gram: Tensor) -> Tensor:
        """See `_Span`."""
        eps = job.shared["eps"]
        w = torch.tensor(job.values("weight"), dtype=torch.float64)
        if job.shared["normalize_weights"]:
            w = w / w.sum()
        norms = _norms(gram)
        unit = 1 / (norms + eps)
        units = gram * unit[:, None] * unit  # dot products of the directions
        mean = w.clone()  # coefficients of the directions
        length = (mean @ units @ mean).clamp_min(0).sqrt()
        if length < eps:
            if len(w) == 2:
                return w
            raise HyperparameterError(
                f"{job.name}: the models cancel; multislerp has no mean direction"
            )
        mean = mean / length
        along = units @ mean
        tangent = w - (w * along).sum() * mean
        size = (tangent @ units @ tangent).clamp_min(0).sqrt() + eps
        direction = mean * size.cos() + tangent * (size.sin() / size)
        merged: Tensor = direction * (w * norms).sum() * unit
        return merged


@register("karcher")
class Karcher(_Span):
    """The Karcher mean of models on the sphere, at their mean norm (mergekit; arXiv 2603.04972)."""

    paper = "2603.04972"
    shared = {
        "max_iter": Param(int, 10, low=1, help="most iterations"),
        "tol": Param(float, 1e-5, low=0.0, help="ends when a step is shorter"),
    }
    base = "none"
    models = (2, None)

    def coefficients(self, job: Job, gram: Tensor) -> Tensor:
        """See `_Span`."""
        norms = _norms(gram)
        there = (norms > job.shared["tol"]).double()
        if not bool(there.any()):
            return torch.zeros_like(norms)
        unit = there / norms.clamp_min(1e-30)
        units = gram * unit[:, None] * unit
        share = there / there.sum()

        def length(c: Tensor) -> Tensor:
            size: Tensor = (c @ units @ c).clamp_min(0).sqrt()
            return size

        mean = share.clone()
        if length(mean) < job.shared["tol"]:  # they cancel: start at the first
            mean = torch.zeros_like(mean)
            mean[int(there.argmax())] = 1.0
        mean = mean / length(mean)
        for _ in range(job.shared["max_iter"]):
            cos = (units @ mean).clamp(-1, 1)
            angle = torch.acos(cos)
            stretch = torch.where(angle.sin() < 1e-12, torch.ones_like(angle), angle / angle.sin())
            part = share * stretch
            step = part - (part * cos).sum() * mean
            size = length(step)
            if size < job.shared["tol"]:
                break
            mean = mean * size.cos() + step * (size.sin() / size)
            mean = mean / length(mean)
        merged: Tensor = mean * unit * norms.mean()
        return merged


@register("model_stock")
class ModelStock(_Span):
    """Model Stock (arXiv 2403.19522): between base and mean of models, by the angle between them.

    t = N cos / (1 + (N - 1) cos) with the mean of pairwise cosines of the differences; base + t times
    their mean. ``filter_wise`` has an angle for each row.
    """

    paper = "2403.19522"
    shared = {"filter_wise": Param(bool, False, help="an angle for each row")}
    models = (2, None)
    dialects = ("paper", "mergekit")

    def by_rows(self, job: Job) -> bool:
        """See `_Span`."""
        return bool(job.shared["filter_wise"]) and job.tensors[0].dim() > 1

    def coefficients(self, job: Job, gram: Tensor) -> Tensor:
        """See `_Span`."""
        n = gram.shape[-1]
        norms = _norms(gram)
        cos = (gram / (norms[..., :, None] * norms[..., None, :]).clamp_min(1e-6)).clamp(-1, 1)
        off = 1 - torch.eye(n, dtype=torch.float64)
        mean = (cos * off).sum((-2, -1)) / (n * (n - 1))
        below = 1 + (n - 1) * mean
        flat = below.abs() < 1e-6
        t = torch.where(flat, torch.zeros_like(mean), n * mean / torch.where(flat, 1.0, below))
        return (t / n)[..., None].expand(*t.shape, n)
