"""SGD whose step is one pass of a Rust kernel."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retouch.errors import HyperparameterError
from retouch.optim import steps
from retouch.optim.base import At, Decay, Fused, at_least_zero
from retouch.optim.rounding import Rounding


class SGD(Fused):
    """SGD with momentum, Nesterov's form and L2 decay as in `torch.optim.SGD`, in one Rust pass.

    Args:
        params: As in `torch.optim.SGD`; float32 (or float64) tensors.
        lr: Learning rate, a number or a one-element tensor.
        momentum: Of the moving sum of gradients.
        dampening: Of the gradient's share in it.
        weight_decay: L2: the gradient gets `weight_decay * weight` added.
        nesterov: Look ahead; needs momentum and no dampening.
        maximize: Ascend instead.
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

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decay: Decay = "weight",
        pull: float = 0.0,
        rounding: Rounding = "master",
        rounding_seed: int = 0,
    ) -> None:
        at_least_zero(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise HyperparameterError("nesterov needs momentum > 0 and dampening = 0")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, decay, rounding, rounding_seed, pull=pull)

    def _update(self, at: At, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        weight_decay = at.weight_decay
        if group["decay"] == "base" and weight_decay != 0:
            sign = -1 if group["maximize"] else 1
            pull = param.detach() - at.base(param)
            grad, weight_decay = grad.add(pull, alpha=sign * weight_decay), 0.0
        buffer, first = None, False
        if group["momentum"] != 0:
            state = self.state[param]
            first = state.get("momentum_buffer") is None
            if first:
                state["momentum_buffer"] = torch.empty_like(
                    param, memory_format=torch.contiguous_format
                )
            buffer = state["momentum_buffer"]
        steps.sgd_(
            param, grad, buffer, at.target, at.index, at.name,
            first=first, lr=at.lr, momentum=group["momentum"], dampening=group["dampening"],
            weight_decay=weight_decay, nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip
