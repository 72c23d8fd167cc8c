"""AdaMerging: the weights of task vectors, learned from data without labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retouch.batches import Batches, to_device
from retouch.config import SelectConfig
from retouch.delta import Delta
from retouch.eligible import Candidate, candidates
from retouch.errors import HyperparameterError, LayoutError, ScoreError
from retouch.passes import LossFn, gradients, outputs_of

__all__ = ["FittedWeights", "entropy", "fit_weights"]

# all parameters are looked at, those of a lone head too
_ALL = SelectConfig(direction="random", density=1.0, heads="masked")
_SPARSE = 4  # a task vector with fewer than one in so many elements is held by its positions


@dataclass(frozen=True)
class FittedWeights:
    """What `fit_weights` found.

    Attributes:
        weights: By delta, then by the name of the tensor: what multiplies its difference. Tied tensors
            have each of their names.
        losses: Of each step, before it: the sum over the data of what was minimised.
    """

    weights: dict[str, dict[str, float]]
    losses: list[float]

    def parameters(self) -> list[dict[str, Any]]:
        """For ``retouch.merge(models, method="task_arithmetic", parameters=...)``, models in this order.

        Tensors that no delta changes do not depend on a weight; they get the mean of the others.
        """
        out = []
        for found in self.weights.values():
            # a rule holds for every name that contains its filter, and the first one decides
            rules: list[dict[str, Any]] = [
                {"filter": name, "value": found[name]}
                for name in sorted(found, key=lambda name: (-len(name), name))
            ]
            out.append({"weight": [*rules, {"value": sum(found.values()) / len(found)}]})
        return out


def entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean entropy (nats) of the predictions in ``model(**batch).logits`` [..., classes].

    Positions that ``attention_mask`` [batch, positions] leaves out do not count.
    """
    logits = getattr(outputs_of(model, batch), "logits", None)
    if not isinstance(logits, Tensor):
        raise ScoreError(f"{type(model).__name__} returns no logits: give a loss_fn")
    log = logits.float().log_softmax(-1)
    each = -(log.exp() * log).sum(-1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == each.shape:
        return each[mask.bool()].mean()
    return each.mean()


def fit_weights(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    data: Mapping[str, Any],
    *,
    level: Literal["tensor", "task"] = "tensor",
    init: float = 0.3,
    lr: float = 1e-3,
    steps: int = 500,
    clamp: bool = True,
    loss_fn: LossFn | None = None,
) -> FittedWeights:
    """Learns how much of each task vector a merged model gets (AdaMerging, arXiv 2310.02575).

    The merged weights are ``base + sum_t weight_t * difference_t``. Each step takes one batch of each
    task; the sum of the mean entropies of the model's predictions is minimised over the weights alone, by
    Adam. Weights are set in the model and put back bit for bit; a gradient is multiplied with the
    differences and freed, so memory is that of the differences (sparse ones by their positions), one copy
    of what they change, and one gradient. In a 16-bit model the merged weights are rounded to its dtype,
    and the gradient passes that rounding by.

    Defaults are the released code's. AdaMerging++ trims task vectors and elects signs among them first: for
    the former give compressed deltas (``delta.compress(compress.Magnitude(0.2))``); the latter is not made.

    Args:
        model: The base, with float parameters; in evaluation mode while this runs, then left as it was.
        deltas: By name, differences to `model`.
        data: By name, batches without labels, see `retouch.batches.Batches`. Any number of tasks; they
            need not be those of the deltas.
        level: "tensor": a weight for each tensor of each delta (the paper's layer-wise), "task": one for
            each delta.
        init: Where the weights begin.
        lr: Of Adam.
        steps: How many.
        clamp: Keep weights in [0, 1].
        loss_fn: ``loss_fn(model, batch)``, minimised in place of `entropy`.

    Returns:
        The weights, and the loss of each step.

    Raises:
        HyperparameterError: An argument is out of range, or there are no deltas or data.
        LayoutError: A delta changes a tensor that is no float parameter of the model.
        BaseMismatchError: A delta is of another base.
        ScoreError: No batch, or a loss that is NaN or infinite.
    """
    if level not in ("tensor", "task"):
        raise HyperparameterError(f"level={level!r}; wanted 'tensor' or 'task'")
    if not (isinstance(deltas, Mapping) and isinstance(data, Mapping) and deltas and data):
        raise HyperparameterError(
            "wanted a dict with at least one delta by name, and one with the data of at least one task"
        )
    if strange := [name for name, delta in deltas.items() if not isinstance(delta, Delta)]:
        raise HyperparameterError(
            f"{strange[0]} is no Delta: see Delta.load and Delta.between(model, tuned)"
        )
    if steps < 1 or not lr > 0:
        raise HyperparameterError(f"steps={steps}, lr={lr}; wanted a step and a rate above 0")
    merge = _Merge(model, deltas, level, init)
    if not merge.touched:
        raise HyperparameterError("the deltas change nothing: there is nothing to weigh")
    device = next(iter(merge.touched.values())).param.device
    streams = {task: _forever(task, batches) for task, batches in data.items()}
    adam = torch.optim.Adam([merge.weights], lr=lr)
    losses: list[float] = []
    measure = entropy if loss_fn is None else loss_fn
    try:
        for step in range(steps):
            adam.zero_grad()
            merge.put()
            total = 0.0
            for task, stream in streams.items():
                with gradients(model, merge.touched, merge.take, False):
                    loss = measure(model, to_device(next(stream), device))
                    if not bool(torch.isfinite(loss)):
                        raise ScoreError(f"the loss of {task} is {loss.item()} at step {step}")
                    loss.backward()
                total += loss.item()
            losses.append(total)
            adam.step()
            if clamp:
                merge.weights.detach().clamp_(0, 1)
    finally:
        merge.put_back()
    return FittedWeights(merge.found(), losses)


def _forever(task: str, data: Any) -> Iterator[Any]:
    batches = Batches(data)
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ScoreError(f"the data of {task} have no batch")


class _Merge:
    """The model with weighted differences, and the gradient of the weights."""

    def __init__(
        self, model: nn.Module, deltas: Mapping[str, Delta], level: str, init: float
    ) -> None:
        every = candidates(model, _ALL)
        by_alias = {alias: name for name, c in every.items() for alias in (name, *c.aliases)}
        self._names = list(deltas)
        self.touched: dict[str, Candidate] = {}
        self._base: dict[str, Tensor] = {}
        for delta in deltas.values():
            for name in delta:
                own = by_alias.get(name)
                if own is None or not every[own].param.dtype.is_floating_point:
                    raise LayoutError(f"{name} is no float parameter of {type(model).__name__}")
                self.touched[own] = every[own]
                if own not in self._base:
                    self._base[own] = every[own].param.detach().clone()
        # for each delta, by tensor: positions (None: all of them) and differences
        self._differences: list[dict[str, tuple[Tensor | None, Tensor]]] = []
        for delta in deltas.values():
            with delta.applied(model):
                found = {own: self._difference(own) for own in {by_alias[name] for name in delta}}
            self._differences.append(found)
        rows = len(self.touched) if level == "tensor" else 1
        self.row = {name: i if level == "tensor" else 0 for i, name in enumerate(self.touched)}
        self.weights = torch.full((rows, len(deltas)), float(init), requires_grad=True)

    def _difference(self, name: str) -> tuple[Tensor | None, Tensor]:
        tuned, base = self.touched[name].param.detach(), self._base[name]
        difference = (tuned.float() - base.float()).reshape(-1)
        index = difference.nonzero().reshape(-1)
        if index.numel() * _SPARSE < difference.numel():
            return index, difference[index]
        return None, difference

    def put(self) -> None:
        """Sets the merged weights."""
        weights = self.weights.tolist()
        with torch.no_grad():
            for name, candidate in self.touched.items():
                flat = self._base[name].float().reshape(-1).clone()
                for t, differences in enumerate(self._differences):
                    if name not in differences:
                        continue
                    index, values = differences[name]
                    scale = weights[self.row[name]][t]
                    if index is None:
                        flat.add_(values, alpha=scale)
                    else:
                        flat.index_add_(0, index, values, alpha=scale)
                candidate.param.copy_(flat.view(candidate.param.shape))

    def take(self, name: str, gradient: Tensor) -> None:
        """Adds what a gradient of a tensor says of its weights: <gradient, difference>."""
        if self.weights.grad is None:
            self.weights.grad = torch.zeros_like(self.weights)
        flat = gradient.reshape(-1)
        for t, differences in enumerate(self._differences):
            if name in differences:
                index, values = differences[name]
                along = flat if index is None else flat[index]
                self.weights.grad[self.row[name], t] += torch.dot(along.float(), values).cpu()

    def put_back(self) -> None:
        with torch.no_grad():
            for name, candidate in self.touched.items():
                candidate.param.copy_(self._base[name])

    def found(self) -> dict[str, dict[str, float]]:
        weights = self.weights.tolist()
        out: dict[str, dict[str, float]] = {}
        for t, (delta, differences) in enumerate(zip(self._names, self._differences, strict=True)):
            out[delta] = {
                alias: weights[self.row[name]][t]
                for name in self.touched
                if name in differences
                for alias in dict.fromkeys((name, *self.touched[name].aliases))
            }
        return out
