"""Lion whose step is one pass of a Rust kernel."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from retouch.optim import steps
from retouch.optim.base import At, Decay, Fused, at_least_zero, check_betas, like
from retouch.optim.rounding import Rounding


class Lion(Fused):
    """Lion (Chen et al., arXiv 2302.06675) in one Rust pass over the selected.

    Decays, steps by `lr` against the sign of `beta1 * m + (1 - beta1) * grad`, and only then moves
    the momentum `m` by `beta2`: one state tensor, half of AdamW's. Its steps are larger than those
    of AdamW at the same rate; the paper takes a 3 to 10 times smaller `lr` and as much more decay.

    Args:
        params: float32 (or float64) tensors. Pass the class to `retouch.wrap` to train 16-bit
            weights through float32 values.
        lr: Learning rate, a number or a one-element tensor.
        betas: Share of the momentum in the direction; its decay.
        weight_decay: Decoupled: weights are multiplied by `1 - lr * weight_decay`.
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
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decay: Decay = "weight",
        pull: float = 0.0,
        rounding: Rounding = "master",
        rounding_seed: int = 0,
    ) -> None:
        at_least_zero(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, decay, rounding, rounding_seed, pull=pull)

    def _update(self, at: At, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = like(param)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        weight_decay = at.pull_(param.detach(), group)
        steps.lion_(
            param, grad, state["exp_avg"], at.target, at.index, at.name, lr=at.lr, beta1=beta1,
            beta2=beta2, weight_decay=weight_decay, maximize=group["maximize"],
        )  # fmt: skip
