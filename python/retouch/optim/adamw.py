"""AdamW whose step is one pass of a Rust kernel, with gates and clocks for single coordinates."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retouch import ops
from retouch.errors import HyperparameterError
from retouch.optim import gates, lowbit, steps
from retouch.optim.base import At, Decay, Fused, at_least_zero, check_betas, like, tick
from retouch.optim.gates import Gate
from retouch.optim.rounding import Rounding
from retouch.selection import Selection


class AdamW(Fused):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one Rust pass over the selected.

    `state[p]["step"]` is the count of steps as torch keeps it, a float32 scalar; or an int32 tensor
    of `p`'s shape, a clock for each coordinate, for those that joined at different times. One that
    starts late with empty moments then takes steps of its own age; under the shared clock its first
    steps would be up to 6.6 times as long. `load_state_dict` leaves either kind as it is.

    Args:
        params: As in `torch.optim.AdamW`; float32 (or float64) tensors. Pass the class to
            `retouch.wrap` to train 16-bit weights through float32 values.
        lr: Learning rate, a number or a one-element tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled: weights are multiplied by `1 - lr * weight_decay`.
        maximize: Ascend instead.
        gate: Which of the selected coordinates move in a step, chosen anew in each: one of
            `retouch.optim.gates`. It is kept in the group as plain data, so a state dict has it.
        state_bits: 32, or 8 for moments in blocks of 256 with one scale each (`retouch.optim.lowbit`):
            2.03 bytes for each coordinate in place of 8. Values with fewer than 4096 coordinates
            keep 32. When a mask moves, moments are widened, carried and rounded again.
        decay: "weight" decays towards 0; "base" towards what the weight held when the mask was set:
            the value becomes `value + lr * weight_decay * (base - value)`.
        pull: After each step a value goes this share of the way to what the weight held when the mask
            was set, whatever the learning rate.
        rounding: How a step of a 16-bit value is rounded: "master" trains it through a float32 value,
            "stochastic" and "kahan" without one, see `retouch.optim.rounding`.
        rounding_seed: Of stochastic rounding; each draw depends on seed, name, number of the step and
            position in the weight alone.

    Raises:
        HyperparameterError: An option out of its range.
    """

    own_clocks = True  # state["step"] may be an int32 tensor of the value's shape

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        gate: Gate | Mapping[str, Any] | None = None,
        state_bits: int = 32,
        decay: Decay = "weight",
        pull: float = 0.0,
        rounding: Rounding = "master",
        rounding_seed: int = 0,
    ) -> None:
        at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "maximize": maximize, "gate": gates.plain(gate), "state_bits": state_bits,
        }  # fmt: skip
        super().__init__(params, defaults, decay, rounding, rounding_seed, pull=pull)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; its `gate` may be an object of `retouch.optim.gates`."""
        if param_group.get("gate") is not None:
            param_group = {**param_group, "gate": gates.plain(param_group["gate"])}
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["state_bits"] not in (8, 32):
            raise HyperparameterError(f"state_bits must be 8 or 32, got {group['state_bits']}")

    def unpack_state(
        self, value: Tensor, selection: Selection, state: dict[str, Any]
    ) -> dict[str, Any]:
        """Moments of 32 bits."""
        return lowbit.expand(state, ops.value_dtype(value.dtype))

    def pack_state(
        self, value: Tensor, selection: Selection, state: dict[str, Any]
    ) -> dict[str, Any]:
        """Moments of as many bits as the group of the value says."""
        groups = (g for g in self.param_groups if any(p is value for p in g["params"]))
        bits = next((group["state_bits"] for group in groups), 32)
        return lowbit.shrink(state) if bits == 8 else state

    def _update(self, at: At, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        gate = gates.parse(group["gate"]) if group["gate"] is not None else None
        state = self.state[param]
        if group["state_bits"] == 8 and gate is None and lowbit.begin(state, param):
            adamw_step_(at, param, grad, group, state)
            return
        wide = lowbit.expand(state, ops.value_dtype(param.dtype))
        adamw_step_(at, param, grad, group, wide, gate)
        kept = lowbit.shrink(wide) if group["state_bits"] == 8 else wide
        state.clear()
        state.update(kept)


def adamw_step_(
    at: At, param: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any],
    gate: Gate | None = None, since: int = 0,
) -> None:  # fmt: skip
    """One AdamW step of one parameter, with torch's state keys.

    Args:
        at: Where it stands.
        param: What is stepped.
        grad: Its gradient.
        group: With `betas`, `eps`, `maximize` and `decay`.
        state: Of the parameter; made at its first step. Moments of 8 bits stay so, without a gate.
        gate: Which coordinates move.
        since: Steps on a shared clock that do not count, because the moments began after them.
    """
    state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
    if "exp_avg" not in state and not lowbit.coded(state):
        state["exp_avg"], state["exp_avg_sq"] = like(param), like(param)
    if gate is not None and gate.closes in ("frozen", "reset") and not gate.shared_clock:
        step = state["step"]
        if step.dtype != torch.int32:
            state["step"] = torch.full(
                param.shape, int(step), dtype=torch.int32, device=param.device
            )
    clock = tick(state, at.name, param)
    if not isinstance(clock, Tensor):
        clock -= since
    beta1, beta2 = (float(beta) for beta in group["betas"])
    opening, closed, decay_closed = gates.Opening(), "updated", False
    if gate is not None:
        if gate.each_backward and at.slot is None and param.numel():
            raise HyperparameterError(
                f"the gate of {at.name} closes after each backward pass, which this optimizer does "
                "not see by itself: it needs retouch.wrap"
            )
        opening = gate.choose(
            gates.Moment(
                at.name, -grad if group["maximize"] else grad, state,
                clock + 1 if isinstance(clock, Tensor) else clock, beta1, beta2, group["eps"],
            )
        )  # fmt: skip
        closed, decay_closed = gate.closes, gate.decays
        if closed == "leaky":
            if opening.open is not None:
                grad = torch.where(opening.open, grad * opening.scale, 0.0)
            opening, closed = gates.Opening(), "updated"
    pulled = None if decay_closed else opening.open
    weight_decay = at.pull_(param.detach(), group, pulled)
    options: dict[str, Any] = {
        "step": clock, "lr": at.lr, "beta1": beta1, "beta2": beta2, "eps": group["eps"],
        "weight_decay": weight_decay, "maximize": group["maximize"],
    }  # fmt: skip
    if "exp_avg" not in state:
        steps.adamw_coded_(param, grad, state, at.target, at.index, at.name, **options)
        return
    steps.adamw_(
        param, grad, state["exp_avg"], state["exp_avg_sq"], at.target, at.index, at.name,
        **options, scale=opening.scale, gate=opening.open, closed=closed,
        decay_closed=decay_closed,
    )  # fmt: skip
