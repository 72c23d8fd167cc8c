"""The losses of single samples in a forward pass over a batch, and labels drawn from the model."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retouch import ops

__all__ = ["SampleLosses"]

_MEANS: dict[Any, inspect.Signature] = {
    f: inspect.signature(f)
    for f in (
        F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss,
        F.smooth_l1_loss, F.huber_loss,
    )
}  # fmt: skip


class SampleLosses(TorchFunctionMode):
    """Turns means over the labels of a batch into sums over its samples of the mean over theirs.

    That is what a sample's loss is alone: one with few labels does not count less than others.

    Args:
        batch: The batch, a mapping with its labels.
        size: How many samples it holds.
        at: The number of the first of them in the data.
        seed: If given, labels are drawn from the softmax of the logits of a cross entropy.
        draw: Which of several draws this is.

    Attributes:
        drawn: Whether any labels were drawn.
    """

    def __init__(self, batch: Any, size: int, at: int, seed: int | None, draw: int) -> None:
        super().__init__()
        self._labels = [
            item.detach()
            for item in (batch.values() if hasattr(batch, "items") else ())
            if isinstance(item, Tensor) and item.dim()
        ]
        self._size = size
        self._at = at
        self._seed = seed
        self._draw = draw
        self._sums: list[Tensor] = []
        self._strange = False
        self.drawn = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _MEANS:
            return func(*args, **kwargs)
        bound = _MEANS[func].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if self._seed is not None and func is F.cross_entropy:
            self._check(given["target"])
            given["target"] = self._sampled(given["input"], given["target"], given["ignore_index"])
        elif given["reduction"] == "mean":
            self._check(given["target"])
        legacy = [given.get(k) for k in ("size_average", "reduce", "weight", "pos_weight")]
        if given["reduction"] != "mean" or any(x is not None for x in legacy) or self._strange:
            self._strange = self._strange or given["reduction"] == "mean"
            return func(*bound.args, **bound.kwargs)
        given["reduction"] = "none"
        each = func(*bound.args, **bound.kwargs).reshape(self._size, -1)
        target = given["target"]
        if "ignore_index" in given and not target.is_floating_point():
            counts = (target != given["ignore_index"]).reshape(self._size, -1).sum(1)
        else:
            counts = torch.full((self._size,), each.shape[1], device=each.device)
        self._sums.append((each.sum(1) / counts).sum())
        return self._sums[-1]

    def explain(self, loss: Tensor) -> bool:
        """Whether the loss is the mean of what was turned, so that it is a sum over samples."""
        if self._strange or not self._sums:
            return False
        total = sum(float(s.detach()) for s in self._sums)
        got = float(loss.detach()) * len(self._sums)
        return bool(abs(total - got) <= 1e-6 * abs(total)) or total != total

    def _check(self, target: Tensor) -> None:
        """Labels must be those of the batch in its order, or they could belong to any sample."""
        if self._size == 1:
            return
        if target.numel() % self._size:
            self._strange = True
            return
        rows = target.detach().reshape(self._size, -1)
        for labels in self._labels:
            own = labels.reshape(self._size, -1)
            # as they are; shifted by one, cut at either end or filled up
            for a, b in ((rows, own), (rows, own[:, 1:]), (rows[:, :-1], own[:, 1:])):
                if a.shape == b.shape and a.numel() and torch.equal(a, b.to(a.dtype)):
                    return
        self._strange = True

    def _sampled(self, logits: Tensor, target: Tensor, ignored: int) -> Tensor:
        """Labels from the model's own distribution, where there are labels."""
        if target.is_floating_point() or target.dim() != 1 or target.numel() % self._size:
            self._strange = True
            return target
        self.drawn = True
        per_sample = target.numel() // self._size
        chance = torch.cat(
            [
                ops.uniform(
                    (per_sample,), self._seed or 0, f"sample {self._at + i}, draw {self._draw}",
                    target.device,
                )
                for i in range(self._size)
            ]
        )  # fmt: skip
        ladder = logits.detach().to(torch.float64).softmax(-1).cumsum(-1)
        # the last step is 1 up to rounding; without it no class beyond the last can be drawn
        drawn = torch.searchsorted(ladder[:, :-1].contiguous(), chance[:, None].to(torch.float64))
        return torch.where(target == ignored, target, drawn[:, 0].to(target.dtype))
