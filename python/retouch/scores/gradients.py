"""Scores from gradients."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.batches import Batches, to_device
from retouch.collected import Collected
from retouch.eligible import own_parameters
from retouch.errors import HyperparameterError, ScoreError
from retouch.made import Made
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn, gradients, loss_of
from retouch.persample import SampleGradients
from retouch.scores.base import Score


@register("gradstat")
@dataclass(frozen=True)
class GradStat(Score):
    """A statistic of gradients: ``post(outer over units(map(gradient of the unit's loss)))``.

    It covers most published gradient scores. What is accumulated in which order matters: per-sample
    gradients +1 and -1 give 2 by ``Fisher()`` and 0 by the square of their sum.

    While it is computed, each gradient is added to its score and freed before the next exists, so
    the peak is the scores and one gradient. Sums of more than one backward pass are in float32.

    A sample's loss is what the model gives for it alone: the mean over its own labels. Samples in
    batches of several go through the model together where that gives the same up to rounding, which
    `retouch.persample` decides: the losses of Hugging Face models whose eligible parameters are of
    linear layers, embeddings and normalisations. Other models, tied eligible weights, a `loss_fn`,
    autocast, ``training=True`` and ``outer="cumulative"`` take one pass for each sample.

    Attributes:
        level: A unit is a "sample" (each has its own loss, so the batch size does not matter) or a
            "batch".
        map: Of each gradient: "id", "abs" or "square".
        outer: "sum" or "mean" over the units, or "cumulative": the sum of all running sums, which
            code computes that never zeroes `.grad`; the first of T units counts T times.
        post: Of the result: "id", "abs" or "sqrt".
        training: Score in training mode (dropout, batch statistics) instead of evaluation mode.
            Buffers are put back.

    Raises:
        HyperparameterError: A value that is none of these.
    """

    needs_data: ClassVar[bool] = True
    level: Literal["sample", "batch"] = "batch"
    map: Literal["id", "abs", "square"] = "id"
    outer: Literal["sum", "mean", "cumulative"] = "sum"
    post: Literal["id", "abs", "sqrt"] = "id"
    training: bool = False

    def __post_init__(self) -> None:
        for name, words in (
            ("level", ("sample", "batch")), ("map", ("id", "abs", "square")),
            ("outer", ("sum", "mean", "cumulative")), ("post", ("id", "abs", "sqrt")),
        ):  # fmt: skip
            if getattr(self, name) not in words:
                raise HyperparameterError(
                    f"{type(self).__name__}: {name}={getattr(self, name)!r}; wanted one of "
                    f"{', '.join(words)}"
                )

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`.

        Raises:
            ScoreError: No data, or a loss that is missing, no scalar, NaN or infinite.
            EngineError: The model is wrapped: its gradients go elsewhere.
        """
        if data is None:
            raise ScoreError(f"the score {self!r} needs data: pass data= (batches with labels)")
        if isinstance(data, Collected):
            return self._finished(self._of_training(data, eligible), data.steps)
        sums = {
            name: torch.zeros_like(
                c.param, dtype=torch.float32, memory_format=torch.contiguous_format
            )
            for name, c in eligible.items()
        }
        running = {n: torch.zeros_like(t) for n, t in sums.items()} if self._cumulative else sums

        def unit_done() -> None:
            if self._cumulative:
                for name, total in sums.items():
                    ops.accumulate_(total, running[name], name)

        taken = SampleGradients(
            model, eligible, running, map=self.map, loss_fn=loss_fn,
            after=unit_done, batched=not (self.training or self._cumulative),
            seed=self._seed, draws=self._draws,
        )  # fmt: skip
        units = 0
        with gradients(model, eligible, taken.take, self.training):
            device = next((p.device for _, p in own_parameters(model)), torch.device("cpu"))
            for number, batch in enumerate(data if isinstance(data, Batches) else Batches(data)):
                batch = to_device(batch, device)
                if self.level == "sample":
                    units += taken.add(batch, number)
                    continue
                loss_of(model, batch, loss_fn, number).backward()
                units += 1
                unit_done()
        if units == 0:
            raise ScoreError(
                "the data hold no batch (an iterator can be read only once: pass a list or a "
                "DataLoader)"
            )
        _report_unreached(sums.keys() - taken.reached)
        return self._finished(sums, units)

    def _finished(self, sums: dict[str, Tensor], units: int) -> dict[str, Tensor]:
        for total in sums.values():
            if self.outer == "mean" or self._draws > 1:
                total.div_(units if self.outer == "mean" else self._draws)
            if self.post == "abs":
                total.abs_()
            elif self.post == "sqrt":
                total.sqrt_()
        return sums

    def _of_training(self, data: Collected, eligible: Eligible) -> dict[str, Tensor]:
        if self.level == "sample" or self._cumulative:
            raise ScoreError(
                f"{self!r} needs the gradients of single samples, or running sums; of the training "
                "there are those of whole steps: use level='batch' and outer='sum' or 'mean'"
            )
        return data.sum(self.map, {name: c.param for name, c in eligible.items()})

    @property
    def _cumulative(self) -> bool:
        return self.outer == "cumulative"

    @property
    def _seed(self) -> int | None:
        """For labels drawn from the model; None for those of the data."""
        return None

    @property
    def _draws(self) -> int:
        return 1


@register("gradient")
@dataclass(frozen=True)
class Gradient(GradStat):
    """|sum of the gradients of the batches|, as in GPS (arXiv 2312.10136)."""

    post: Literal["id", "abs", "sqrt"] = "abs"

    def made(self, eligible: Eligible, data: Any) -> Made | None:
        """Of the gradients of the training, which are collected already."""
        return self._sums(eligible, data) if type(self) is Gradient else None

    def _sums(self, eligible: Eligible, data: Any) -> Made | None:
        plain = (self.level, self.map, self.outer, self.post) == ("batch", "id", "sum", "abs")
        if not (plain and isinstance(data, Collected) and data.steps):
            return None
        have = data.sums["id"]
        if not all(n in have and have[n].dtype == torch.float32 for n in eligible):
            return None
        return Made({name: have[name] for name in eligible})


@register("fisher")
@dataclass(frozen=True)
class Fisher(GradStat):
    """Diagonal of the empirical Fisher information: the sum of squared per-sample gradients.

    FISH Mask (arXiv 2111.09839). ``Fisher(level="batch")`` squares the gradients of batches, which is
    cheaper and another quantity.
    """

    level: Literal["sample", "batch"] = "sample"
    map: Literal["id", "abs", "square"] = "square"


@register("true_fisher")
@dataclass(frozen=True)
class TrueFisher(Fisher):
    """Diagonal of the Fisher information: as `Fisher`, with labels drawn from the model itself.

    FISH Mask (arXiv 2111.09839) calls it expect-square and sums over all classes, with one backward
    pass for each; this takes the same expectation over labels by `draws` samples of it, unbiased for
    "square" and "abs" alike. Labels of the data only say where there are labels (-100: none). The loss
    must be a cross entropy over class numbers, that is `torch.nn.functional.cross_entropy`.

    Attributes:
        draws: How many times labels are drawn for each sample; the score is the mean over them.
        seed: Of the draws, which depend on it, the number of the sample and the position alone.

    Raises:
        HyperparameterError: ``level="batch"``, ``outer="cumulative"`` or no positive number of draws.
        ScoreError: The loss is another.
    """

    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level != "sample" or self.outer == "cumulative":
            raise HyperparameterError(
                f"TrueFisher: level={self.level!r}, outer={self.outer!r}; wanted level='sample' and "
                "a sum or mean, as labels are drawn for each sample"
            )
        if self.draws < 1:
            raise HyperparameterError(f"TrueFisher: draws={self.draws}; wanted 1 or more")

    @property
    def _seed(self) -> int:
        return self.seed

    @property
    def _draws(self) -> int:
        return self.draws


@register("sensitivity")
@dataclass(frozen=True)
class Sensitivity(GradStat):
    """|gradient * weight|: the change of the loss if a weight were removed, to first order.

    SNIP (arXiv 1810.02340). The statistic of the gradient is that of `Gradient`.
    """

    post: Literal["id", "abs", "sqrt"] = "abs"

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `GradStat`."""
        sums = super().__call__(model, eligible, data, loss_fn)
        for name, total in sums.items():
            total.mul_(eligible[name].param.detach().abs().to(total.dtype))
        return sums


@register("d3")
@dataclass(frozen=True)
class D3(Gradient):
    """|gradient| / (|weight| + eps) ** exponent, of ID3 (arXiv 2408.14470).

    Exponent 1 ranks by relative change, 0 as `Gradient`, below 0 towards large weights.

    Attributes:
        eps: Keeps small weights from winning always.
        exponent: Of the weight.
    """

    eps: float = 1e-3
    exponent: float = 1.0

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `GradStat`."""
        sums = super().__call__(model, eligible, data, loss_fn)
        for name, total in sums.items():
            size = eligible[name].param.detach().abs().to(total.dtype)
            total.div_(size.add_(self.eps).pow_(self.exponent))
        return sums

    def made(self, eligible: Eligible, data: Any) -> Made | None:
        """Of the gradients of the training, with the exponents 0 and 1."""
        made = self._sums(eligible, data) if type(self) is D3 else None
        weights = {name: c.param.detach() for name, c in eligible.items()}
        if made is None or self.exponent == 0:
            return made
        if self.exponent != 1 or any(w.dtype != torch.float32 for w in weights.values()):
            return None
        return replace(made, divisors=weights, offset=self.eps)


def _report_unreached(names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        warnings.warn(
            f"no gradient reached {len(names)} of the eligible parameters, whose score is 0: {shown}",
            stacklevel=3,
        )
