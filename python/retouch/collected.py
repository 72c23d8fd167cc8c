"""Gradients of the training itself, collected for a score."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from retouch import ops
from retouch.errors import ScoreError

__all__ = ["Collected"]


class Collected:
    """Sums over optimizer steps of the accumulated gradients, or of maps of them.

    A score of gradients takes it in the place of data. A unit is a step: its gradient is what the
    optimizer would get of the weight, summed over micro-batches and averaged over processes, before
    clipping.

    Args:
        params: The parameters by name.
        maps: Of "id", "abs" and "square", which sums will be asked for.

    Attributes:
        steps: How many have been collected.
        sums: Float32 sums by map and parameter.
    """

    def __init__(self, params: Mapping[str, Tensor], maps: Iterable[str] = ("id",)) -> None:
        self.steps = 0
        self._params = dict(params)
        self.sums: dict[str, dict[str, Tensor]] = {m: {} for m in sorted(set(maps))}
        self._step: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        """Adds the gradient of one backward pass.

        Args:
            name: Of the parameter.
            grad: Of its shape.
        """
        if name not in self._step:
            self._step[name] = _zeros(grad)
        ops.accumulate_(self._step[name], grad.detach(), name)

    def borrow(self, grads: Mapping[str, Tensor]) -> None:
        """Makes one step all that is collected; its gradients stay where they are.

        Nobody may write into them before `restore`. A step with a gradient that is not finite leaves
        nothing collected.

        Args:
            grads: By parameter, of its shape.
        """
        self.restore(0, {})
        grads = {n: g.detach().to_dense() if g.is_sparse else g.detach() for n, g in grads.items()}
        if not ops.finite(list(grads.values()), list(grads)):
            return
        for map_, sums in self.sums.items():
            for name, grad in grads.items():
                if map_ == "id" and grad.dtype == torch.float32 and grad.is_contiguous():
                    sums[name] = grad
                else:
                    sums[name] = _zeros(grad)
                    ops.accumulate_(sums[name], grad, name, map=map_)
        self.steps = 1

    def step_done(self, processes: int) -> None:
        """Closes a step: the gradients that were added become one unit.

        A step with a gradient that is not finite, as `GradScaler` skips them, is left out.
        """
        step, self._step = self._step, {}
        if processes > 1:
            for name, param in self._params.items():  # of layers that this process did not use too
                grad = step.setdefault(name, _zeros(param))
                dist.all_reduce(grad.div_(processes))
        if not ops.finite(list(step.values()), list(step)):
            return
        for name, grad in step.items():
            for map_, sums in self.sums.items():
                if name not in sums:
                    sums[name] = _zeros(grad)
                ops.accumulate_(sums[name], grad, name, map=map_)
        self.steps += 1

    def sum(self, map_: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the sums; zeros for parameters that had no gradient.

        Raises:
            ScoreError: Nothing has been collected.
        """
        if not self.steps:
            raise ScoreError(
                "no training step with finite gradients has been collected for the score: are the "
                "gradients NaN or infinite, or did the optimizer step without a backward pass?"
            )
        have = self.sums[map_]
        # A sum has no -0; a gradient that stands for one may.
        return {n: have[n] + 0.0 if n in have else _zeros(p) for n, p in like.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by key."""
        found = {f"{m} {n}": t for m, sums in self.sums.items() for n, t in sums.items()}
        return found | {f"step {n}": t for n, t in self._step.items()}

    def restore(self, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to a checkpoint."""
        self.steps, self._step = steps, {}
        for sums in self.sums.values():
            sums.clear()
        for both, tensor in tensors.items():
            key, _, name = both.partition(" ")
            if key == "step":
                self._step[name] = tensor.clone()
            elif key in self.sums:
                self.sums[key][name] = tensor.clone()


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
