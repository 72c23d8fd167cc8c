"""Adafactor whose factored second moments are those of the selected entries.

As in `retouch.ops`, float32 values of single elements on the CPU go to Rust kernels, which give what the
operations in torch give, bit for bit.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retouch import _core
from retouch.errors import HyperparameterError
from retouch.ops import _native
from retouch.optim.base import At, Decay, Fused, at_least_zero
from retouch.optim.rounding import Rounding
from retouch.selection import Selection

State = dict[str, Any]
_TINY = torch.finfo(torch.float64).tiny


class Adafactor(Fused):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) over the selected entries.

    The variant is that of `torch.optim.Adafactor`, bit for bit on whole tensors, rows and columns. All
    means are over selected entries: the two factors, the root mean square that clips the update, and
    that of the values, which scales the step. Factors of a gradient with zeros in it would
    underestimate the second moment by the density, and the steps would grow by its inverse root. For
    elements the factors are also scaled to each other's gaps (one round of proportional fitting,
    which changes nothing where all are selected); that is ours, the paper has no masks.

    A weight of two or more dimensions has factors over its last two: `state[p]["row_var"]` [..., m, 1]
    and `"col_var"` [..., 1, n]. A selection of elements has those of the weight's shape, and none
    (`"variance"`, of the value's shape) where it has no more elements than the factors have: there
    these would be no smaller, and rows of one element have no mean to speak of.

    When a mask moves, each coordinate takes its second moment along (the product of its factors), and
    new factors are the means of these. Rows and columns without history have clocks of their own,
    `"row_step"` and `"col_step"`; without factors `"step"` is an int32 tensor as in `retouch.AdamW`.

    Args:
        params: As in `torch.optim.Adafactor`; float32 (or float64) tensors. Pass the class to
            `retouch.wrap` to train 16-bit weights through float32 values.
        lr: Learning rate: the largest relative step, which falls as `1 / sqrt(step)`.
        beta2_decay: The decay rate of the second moments at step t is `1 - t**beta2_decay`.
        eps: Floor of the root of the second moment (None: the dtype's eps), and of the root mean
            square of the values.
        d: Updates are clipped to this root mean square.
        weight_decay: Decoupled: weights are multiplied by `1 - lr * weight_decay`.
        maximize: Ascend instead.
        scale_parameter: Multiply the step by the root mean square of the values.
        relative_step: Let the step fall as `1 / sqrt(step)`. With both False it is `lr` itself, as
            `TrainingArguments(optim="adafactor")` has it.
        decay: "weight" decays towards 0, "base" towards what the weight held when the mask was set.
        pull: After each step a value goes this share of the way to what the weight held when the mask
            was set, whatever the learning rate.
        rounding: How a step of a 16-bit value is rounded: "master" trains it through a float32 value,
            "stochastic" and "kahan" without one, see `retouch.optim.rounding`.
        rounding_seed: Of stochastic rounding; each draw depends on seed, name, number of the step and
            position in the weight alone.

    Raises:
        HyperparameterError: An option out of its range.
    """

    own_clocks = True
    _scatters = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        scale_parameter: bool = True,
        relative_step: bool = True,
        decay: Decay = "weight",
        pull: float = 0.0,
        rounding: Rounding = "master",
        rounding_seed: int = 0,
    ) -> None:
        at_least_zero(lr=lr, weight_decay=weight_decay, minus_beta2_decay=-beta2_decay)
        if len(eps) != 2:
            raise HyperparameterError(f"eps must be two numbers (the first may be None), got {eps}")
        at_least_zero(eps1=0.0 if eps[0] is None else eps[0], eps2=eps[1])
        if not d >= 1:
            raise HyperparameterError(f"d must be at least 1, got {d}")
        defaults = {
            "lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay,
            "maximize": maximize, "scale_parameter": scale_parameter,
            "relative_step": relative_step,
        }  # fmt: skip
        super().__init__(params, defaults, decay, rounding, rounding_seed, pull=pull)

    def _update(self, at: At, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, x = self.state[param], param.detach()
        factors = factors_of(x, at.slot.selection if at.slot is not None else None)
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            if factors is None:
                state["variance"] = torch.zeros_like(x, memory_format=torch.contiguous_format)
            else:
                state.update(factors.start(x))
        grad = (-grad if group["maximize"] else grad).to(x.dtype)
        eps1 = torch.finfo(x.dtype).eps if group["eps"][0] is None else group["eps"][0]
        if factors is None:
            update = _by_root(_take_in(grad, state, group["beta2_decay"]).clone(), grad, eps1)
        elif factors.has_new_lines(state):
            # They have no second moment but this square, and both factors must hear of it at once.
            wide = factors.spread(state, x)
            variance = _take_in(grad.view(wide["variance"].shape), wide, group["beta2_decay"])
            state.update(factors.fit(variance, wide["step"]))
            update = factors.update(grad, state, eps1)
        else:
            state["step"] += 1
            factors.take_in(grad, state, group["beta2_decay"])
            update = factors.update(grad, state, eps1)
        step = float(state["step"].max()) if state["step"].numel() else 1.0
        alpha = min(at.lr, 1 / step**0.5) if group["relative_step"] else at.lr
        if group["scale_parameter"]:
            alpha *= max(group["eps"][1], x.norm(2).item() / max(x.numel(), 1) ** 0.5)
        weight_decay = at.pull_(x, group)
        if weight_decay != 0:
            x.mul_(1 - at.lr * weight_decay)
        denominator = max(1.0, update.norm(2).item() / (max(update.numel(), 1) ** 0.5 * group["d"]))
        x.add_(update, alpha=-alpha / denominator)

    def unpack_state(self, value: Tensor, selection: Selection, state: State) -> State:
        """The second moment and the age of each coordinate."""
        factors = factors_of(value, selection)
        if factors is None or "row_var" not in state:
            return state
        return factors.spread(state, value)

    def pack_state(self, value: Tensor, selection: Selection, state: State) -> State:
        """What `unpack_state` gave, of other coordinates, as factors."""
        factors = factors_of(value, selection)
        if factors is None or "variance" not in state:
            return state
        return factors.fit(state["variance"], state["step"])


def factors_of(value: Tensor, selection: Selection | None) -> "_Grid | _Scattered | None":
    """How the second moment of a value is factored; None where it is not."""
    if selection is None or selection.kind != "elements":
        return _Grid() if value.dim() > 1 else None
    shape = selection.shape
    if len(shape) < 2 or not value.numel():
        return None
    if selection.count == selection.numel:
        return _Grid(shape)
    lines = selection.numel // max(shape[-1], 1) + selection.numel // max(shape[-2], 1)
    return _Scattered(selection, value.device) if selection.count > lines else None


class _Factors(ABC):
    """Factors of a second moment: means of squares over rows and columns."""

    @abstractmethod
    def estimate(self, state: State, eps: float) -> Tensor:
        """The second moment of each coordinate."""

    @abstractmethod
    def each(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What rows and columns have, for each coordinate."""

    def update(self, grad: Tensor, state: State, eps: float) -> Tensor:
        """A gradient, in its shape, by the root of its second moment."""
        return _by_root(self.estimate(state, eps), grad, eps)

    def spread(self, state: State, like: Tensor) -> State:
        """Second moment and age of each coordinate, in the shape of `like`."""
        step = state["step"]
        if "row_step" in state:
            step = torch.minimum(*self.each(state["row_step"], state["col_step"]))
            step = step.view(like.shape).to(torch.int32)
        estimate = self.estimate(state, torch.finfo(like.dtype).tiny)
        return {"step": step, "variance": estimate.view(like.shape)}

    @staticmethod
    def has_new_lines(state: State) -> bool:
        """Whether a row or a column has no history, beside others that have some."""
        clocks = (state.get("row_step"), state.get("col_step"))
        return any(clock is not None and not bool(clock.all()) for clock in clocks)


@dataclass
class _Grid(_Factors):
    """Factors of a tensor that is there as a whole, in the operations of torch and their order.

    Attributes:
        shape: Of the tensor, where its values have another.
    """

    shape: tuple[int, ...] | None = None

    def _whole(self, x: Tensor) -> Tensor:
        return x if self.shape is None else x.view(self.shape)

    def start(self, x: Tensor) -> State:
        """Factors without history."""
        x = self._whole(x)
        return {
            "row_var": x.new_zeros(*x.shape[:-1], 1),
            "col_var": x.new_zeros(*x.shape[:-2], 1, x.shape[-1]),
        }

    def take_in(self, grad: Tensor, state: State, decay: float) -> None:
        """Moves the factors towards the means of squares of a gradient."""
        grad = self._whole(grad)
        for key, dim in (("row", -1), ("col", -2)):
            # As torch has it: the squares themselves are never in memory.
            mean = torch.norm(grad, dim=dim, keepdim=True).square_().div_(grad.size(dim))
            _follow(state, key, mean, decay)

    def estimate(self, state: State, eps: float) -> Tensor:
        """The second moment of each coordinate."""
        product: Tensor = state["row_var"] @ state["col_var"]
        return product.div_(state["row_var"].mean(dim=-2, keepdim=True).clamp_(min=eps))

    def each(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What rows and columns have, for each coordinate."""
        rows, columns = torch.broadcast_tensors(rows, columns)
        return rows, columns

    def fit(self, variance: Tensor, step: Tensor) -> State:
        """Factors with these second moments, where they have some."""
        whole = self._whole(variance)
        if _shared(step):
            return {
                "step": step, "row_var": whole.mean(-1, keepdim=True),
                "col_var": whole.mean(-2, keepdim=True),
            }  # fmt: skip
        ages = self._whole(step.to(whole.device))
        known = ages > 0
        fitted: State = {"step": ages.max().to(torch.float32)}
        for key, dim in (("row", -1), ("col", -2)):
            count = known.sum(dim, keepdim=True).clamp_(min=1)
            fitted[f"{key}_var"] = (whole * known).sum(dim, keepdim=True).div_(count)
            fitted[f"{key}_step"] = ages.amax(dim, keepdim=True).to(torch.float32)
            _fill(fitted, key, -1 if dim == -2 else -2, True)
        return fitted


class _Scattered(_Factors):
    """Factors of single elements of a tensor; rows and columns without any stay at 0.

    Args:
        selection: Of elements.
        device: Of their values.
    """

    def __init__(self, selection: Selection, device: torch.device) -> None:
        self._selection = selection
        self._device = device
        *self._batch, self._height, self._width = selection.shape

    @cached_property
    def row(self) -> Tensor:
        """Where the row of each element stands in `row_var`, int64 [k]."""
        flat = self._selection.positions(self._device, torch.int64)
        return flat.div(self._width, rounding_mode="floor")

    @cached_property
    def column(self) -> Tensor:
        """Where its column stands in `col_var`."""
        column = self._selection.positions(self._device, torch.int64) - self.row * self._width
        if self._batch:
            column += self.row.div(self._height, rounding_mode="floor") * self._width
        return column

    @cached_property
    def rows(self) -> Tensor:
        """Of shape [..., m, 1], how many elements each row has."""
        return self._counts(self.row, *self._shape("row"))

    @cached_property
    def columns(self) -> Tensor:
        """Of shape [..., 1, n]."""
        return self._counts(self.column, *self._shape("col"))

    def _shape(self, key: str) -> tuple[int, ...]:
        last = (self._height, 1) if key == "row" else (1, self._width)
        return (*self._batch, *last)

    @staticmethod
    def _counts(where: Tensor, *shape: int) -> Tensor:
        return torch.bincount(where, minlength=math.prod(shape)).view(shape)

    def _where(self) -> tuple[Tensor, int, int]:
        """What the kernels need to know of the positions."""
        assert self._selection.index is not None
        return self._selection.index.cpu(), self._height, self._width

    def start(self, x: Tensor) -> State:
        """Factors without history."""
        return {f"{key}_var": x.new_zeros(self._shape(key)) for key in ("row", "col")}

    def _lines(self) -> tuple[tuple[str, Tensor, Tensor], ...]:
        return ("row", self.row, self.rows), ("col", self.column, self.columns)

    def take_in(self, grad: Tensor, state: State, decay: float) -> None:
        """Moves the factors towards the means of squares of a gradient."""
        if grad.dtype == torch.float32 and _native(grad):
            down, across = (grad.new_empty(self._shape(key)) for key in ("row", "col"))
            index, m, n = self._where()
            _core.line_means_(down, across, grad.detach(), index, m, n, "the gradient")
            means = [down, across]
        else:
            squares = grad.double().square()
            means = [_mean(squares, *line).to(grad.dtype) for _, *line in self._lines()]
        for key, mean in zip(("row", "col"), means, strict=True):
            _follow(state, key, mean, decay)

    def estimate(self, state: State, eps: float) -> Tensor:
        """The second moment of each coordinate.

        Where all are selected the product of means is the table that has these sums in rows and
        columns. Where a column lacks the row of the large gradients its mean alone says too little, so
        columns are scaled to their sums given the rows, and rows to theirs given the columns.
        """
        if self._by_kernel(state):
            return self._estimated(None, state, eps)
        row, column = self.row, self.column
        down, across = state["row_var"].double(), state["col_var"].double()
        other = torch.bincount(column, weights=down.view(-1)[row], minlength=self.columns.numel())
        across = across.mul(self.columns).div_(other.view(self.columns.shape).clamp_(min=_TINY))
        other = torch.bincount(row, weights=across.view(-1)[column], minlength=self.rows.numel())
        down = down.mul(self.rows).div_(other.view(self.rows.shape).clamp_(min=_TINY))
        total = self.rows.sum(-2, keepdim=True)
        mean = (
            (state["row_var"].double() * self.rows).sum(-2, keepdim=True).div_(total.clamp(min=1))
        )
        down.mul_(mean / mean.clamp(min=eps))  # the floor that torch puts under the mean
        rows, columns = self.each(down, across)
        return (rows * columns).to(state["row_var"].dtype)

    def update(self, grad: Tensor, state: State, eps: float) -> Tensor:
        """A gradient, in its shape, by the root of its second moment."""
        if grad.dtype == torch.float32 and _native(grad) and self._by_kernel(state):
            return self._estimated(grad.detach(), state, eps)
        return super().update(grad, state, eps)

    @staticmethod
    def _by_kernel(state: State) -> bool:
        factors = (state["row_var"], state["col_var"])
        return all(f.dtype == torch.float32 for f in factors) and _native(*factors)

    def _estimated(self, grad: Tensor | None, state: State, eps: float) -> Tensor:
        rows, columns = state["row_var"], state["col_var"]
        out: Tensor = rows.new_empty(self._selection.count)
        index, m, n = self._where()
        _core.line_estimate_(out, rows, columns, grad, index, m, n, eps, "the factors")
        return out

    def each(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What rows and columns have, for each coordinate."""
        return rows.reshape(-1)[self.row], columns.reshape(-1)[self.column]

    def fit(self, variance: Tensor, step: Tensor) -> State:
        """Factors with these second moments, where they have some."""
        if _shared(step):
            means = {f"{key}_var": _mean(variance, *line) for key, *line in self._lines()}
            return {"step": step, **means}
        ages = step.to(variance.device)
        known = ages > 0
        fitted: State = {"step": ages.max().to(torch.float32)}
        for key, where, count in self._lines():
            mean = _mean(variance[known], where[known], count)
            share = _mean(known.to(variance.dtype), where, count)
            fitted[f"{key}_var"] = mean / share.clamp(min=torch.finfo(mean.dtype).tiny)
            oldest = ages.new_zeros(count.numel()).scatter_reduce_(0, where, ages, "amax")
            oldest = torch.where(count.view(-1) == 0, ages.max(), oldest)  # of nothing: not new
            fitted[f"{key}_step"] = oldest.view(count.shape).to(torch.float32)
            _fill(fitted, key, -2 if key == "row" else -1, count > 0)
        return fitted


def _by_root(estimate: Tensor, grad: Tensor, eps: float) -> Tensor:
    """A gradient by the root of its second moment, which is overwritten."""
    return estimate.view(grad.shape).clamp_(min=eps * eps).rsqrt_().mul_(grad)


def _mean(x: Tensor, where: Tensor, count: Tensor) -> Tensor:
    """Means of what stands on each line, by their number; summed in float64."""
    sums = torch.bincount(where, weights=x.double(), minlength=count.numel())
    return (sums.view(count.shape) / count.clamp(min=1)).to(x.dtype)


def _follow(state: State, key: str, mean: Tensor, decay: float) -> None:
    """One step of a factor, on the clock of all or on those of its lines."""
    factor, clock = state[f"{key}_var"], state.get(f"{key}_step")
    if clock is not None:
        clock += 1
    factor.lerp_(mean, _weight(state["step"] if clock is None else clock, decay, factor))


def _fill(state: State, key: str, dim: int, used: Tensor | bool) -> None:
    """Gives lines without history the mean of the others, so that the mean of all is theirs."""
    factor, old = state[f"{key}_var"], state[f"{key}_step"] > 0
    known = old & used
    mean = (factor * known).sum(dim, keepdim=True) / known.sum(dim, keepdim=True).clamp(min=1)
    state[f"{key}_var"] = torch.where(old, factor, mean)


def _take_in(grad: Tensor, state: State, decay: float) -> Tensor:
    """One step of second moments without factors; gives them."""
    state["step"] += 1
    variance: Tensor = state["variance"]
    return variance.lerp_(grad * grad, _weight(state["step"], decay, variance))


def _weight(step: Tensor, decay: float, like: Tensor) -> float | Tensor:
    """What the newest square weighs at a step, or at that of each coordinate."""
    if _shared(step):
        return float(float(step) ** decay)
    return step.to(like.device, torch.float64).pow(decay).to(like.dtype)


def _shared(step: Tensor) -> bool:
    """Whether a clock is one number, as torch keeps it."""
    return step.dim() == 0 and step.dtype != torch.int32
