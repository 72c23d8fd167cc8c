"""Muon for matrices, for selected rows or columns of them, and after a start with AdamW."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from retouch.binding import is_dry_run
from retouch.errors import HyperparameterError
from retouch.optim.adamw import adamw_step_
from retouch.optim.base import At, Decay, Fused, at_least_zero, check_betas, like
from retouch.slots import Slot, slot_of

AdjustLr = Literal["original", "match_rms_adamw"]

_OF_ADAMW = ("step", "exp_avg", "exp_avg_sq")


class Muon(Fused):
    """Muon (Jordan 2024) as in `torch.optim.Muon`: momentum, made orthogonal, is the step.

    A selection of rows or columns of a matrix is a smaller matrix, which is made orthogonal by
    itself and whose own shape enters `adjust_lr_fn`; a whole matrix steps bit for bit as in torch.
    Single elements are refused: there is no matrix to make orthogonal, and the step of a masked one
    would be dense again.

    What is no matrix in the model (norms, biases, convolutions) is stepped by AdamW, with the rate and
    decay of its group; a group with ``use_muon=False`` is stepped so whole, which is the usual choice
    for embeddings and heads (`retouch.groups.muon` makes these groups). With `adjust_lr_fn`
    "match_rms_adamw" one rate fits both.

    With `adamw_steps` all of a group starts with AdamW and goes over to Muon after so many steps, as
    Xmodel-2.5 (arXiv 2511.19496) does when its learning rate starts to fall. Matrices then start with
    a momentum of 0 and drop the moments of AdamW; vectors keep theirs (there, they start afresh too,
    as the state is not loaded). The count is in the group (``group["taken"]``), so a state dict has
    it.

    Args:
        params: As in `torch.optim.Muon`, and tensors of other shapes; float32 (or float64). Pass the
            class to `retouch.wrap` to train 16-bit weights through float32 values.
        lr: Learning rate, a number or a one-element tensor.
        weight_decay: Decoupled: weights are multiplied by `1 - lr * weight_decay`.
        momentum: Decay of the moving mean of gradients.
        nesterov: Look ahead.
        ns_coefficients: Of the quintic Newton-Schulz iteration.
        eps: The least norm that the momentum is divided by.
        ns_steps: Iterations, fewer than 100.
        adjust_lr_fn: By the shape [m, n] of what is stepped: "original" (None) times
            `sqrt(max(1, m / n))`, "match_rms_adamw" times `0.2 * sqrt(max(m, n))`, with which a step is
            as long as one of AdamW (arXiv 2502.16982). m and n as stored, as in torch.
        adamw_steps: So many steps are AdamW's first.
        adamw_betas: Decay rates of AdamW's two moments.
        adamw_eps: Added to AdamW's denominator.
        decay: "weight" decays towards 0, "base" towards what the weight held when the mask was set.
        pull: After each step a value goes this share of the way to what the weight held when the mask
            was set, whatever the learning rate.

    Raises:
        HyperparameterError: An option out of its range, or single elements of a matrix.
    """

    own_clocks = True  # of what AdamW steps

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        adamw_steps: int = 0,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        decay: Decay = "weight",
        pull: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn, "adamw_steps": adamw_steps, "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps, "use_muon": True, "taken": 0,
        }  # fmt: skip
        super().__init__(params, defaults, decay, pull=pull)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        names = ("lr", "weight_decay", "eps", "adamw_eps", "adamw_steps")
        at_least_zero(**{name: group[name] for name in names})
        check_betas(group["adamw_betas"])
        if not 0 <= group["momentum"] <= 1:
            raise HyperparameterError(f"momentum must be in [0, 1], got {group['momentum']}")
        if not 0 <= group["ns_steps"] < 100 or len(group["ns_coefficients"]) != 3:
            raise HyperparameterError(
                "wanted three ns_coefficients and fewer than 100 ns_steps, got "
                f"{group['ns_coefficients']} and {group['ns_steps']}"
            )
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise HyperparameterError(
                f"adjust_lr_fn={group['adjust_lr_fn']!r}; wanted 'original' (None) or "
                "'match_rms_adamw'"
            )
        for slot in map(slot_of, group["params"]):
            if slot is not None and _is_matrix(slot) and slot.selection.kind == "elements":
                if group["use_muon"]:
                    raise HyperparameterError(
                        f"Muon cannot step single elements of a matrix, as are selected of {slot.name}:"
                        " select with granularity='row', 'column' or 'tensor', step it in a group with "
                        "use_muon=False (AdamW), or take retouch.AdamW for all"
                    )

    def _begin(self) -> None:
        for group in self.param_groups:  # before any of them has moved
            self._check(group)
        if not is_dry_run(self):
            for group in self.param_groups:
                group["taken"] += 1

    def _update(self, at: At, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        matrix = param.dim() == 2 if at.slot is None else _is_matrix(at.slot)
        if not (matrix and group["use_muon"]) or group["taken"] <= group["adamw_steps"]:
            options = {
                "betas": group["adamw_betas"], "eps": group["adamw_eps"], "maximize": False,
                "decay": group["decay"],
            }  # fmt: skip
            adamw_step_(at, param, grad, options, state)
            return
        for key in _OF_ADAMW:
            state.pop(key, None)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = like(param)
        buffer, momentum = state["momentum_buffer"], group["momentum"]
        buffer.lerp_(grad, 1 - momentum)
        step = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        step = orthogonal(step, group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight_decay = at.pull_(param, group)
        param.mul_(1 - at.lr * weight_decay)
        param.add_(step, alpha=-at.lr * _by_shape(group["adjust_lr_fn"], *param.shape))


def orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """A matrix with its singular values brought near 1 by a Newton-Schulz iteration in bfloat16.

    Args:
        matrix: [m, n]; not written to.
        coefficients: a, b and c of `X <- a X + (b A + c A A) X` with `A = X Xᵀ`.
        steps: Iterations.
        eps: The least norm that the matrix is divided by.

    Returns:
        [m, n], bfloat16.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(torch.bfloat16, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _by_shape(adjust: AdjustLr | None, rows: int, columns: int) -> float:
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _is_matrix(slot: Slot) -> bool:
    """Whether the weight is one, whatever of it is selected."""
    return len(slot.selection.shape) == 2
