"""Gates: masks that act inside of a step, chosen anew in each, over the selected coordinates.

A selection says which coordinates may ever move and have state; a gate says which of these move now.
What becomes of the moments of a closed coordinate is its *policy*:

========  =======================================================================================
``P0``    its gradient is taken for 0 and the optimizer runs as usual. Momentum and decay still move
          it, so this must be asked for with ``leaky=True``; it is what most published code does.
``P1``    its moments and clock go on with the true gradient; the value stays.
``P2``    its moments stand still, and so does a clock of its own.
``P2s``   its moments stand still; one clock for all goes on.
``P3``    its moments and its own clock start again from nothing.
========  =======================================================================================

A closed coordinate keeps its bits and does not decay, unless the source of the gate says that it does.
A gate is plain data (`plain` gives a dict, `parse` reads it), so that it travels in a state dict.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from retouch import ops
from retouch.errors import HyperparameterError, ScoreError
from retouch.optim.steps import corrections

__all__ = [
    "AlphaAdam",
    "Bernoulli",
    "Cautious",
    "Gate",
    "Magma",
    "Percentile",
    "SkipUpdate",
    "TopK",
    "parse",
    "plain",
]

Policy = Literal["P0", "P1", "P2", "P2s", "P3"]
_CLOSES = {"P0": "leaky", "P1": "updated", "P2": "frozen", "P2s": "frozen", "P3": "reset"}


class Opening(NamedTuple):
    """What a gate has chosen.

    Attributes:
        open: bool of the value's shape, True moves; None opens all.
        scale: The step (under P0 the gradient) is multiplied by it.
    """

    open: Tensor | None = None
    scale: float = 1.0


@dataclass
class Moment:
    """What a gate may look at: one parameter before its moments take the gradient in.

    Attributes:
        name: Of the weight.
        grad: The gradient along which the value descends, of any shape.
        state: The optimizer's, with `exp_avg` and `exp_avg_sq` of that shape.
        step: The number of this step, from 1; an int32 tensor with that of each coordinate.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squares.
        eps: Added to the denominator.
    """

    name: str
    grad: Tensor
    state: dict[str, Any]
    step: int | Tensor
    beta1: float
    beta2: float
    eps: float

    def mean(self) -> Tensor:
        """The first moment once the gradient is in."""
        exp_avg: Tensor = self.state["exp_avg"]
        return torch.lerp(exp_avg, self.grad.to(exp_avg.dtype), 1 - self.beta1)

    def direction(self) -> Tensor:
        """AdamW's direction u, with its bias corrections: the step is `-lr * u`."""
        g, old = self.grad, self.state["exp_avg_sq"]
        square: Tensor = (old * self.beta2).addcmul_(g, g, value=1 - self.beta2)
        root, minus = corrections(self.step, square.dtype, 1.0, self.beta1, self.beta2)
        return self.mean().mul_(-minus).div_((square.sqrt() / root).add_(self.eps))

    def uniform(self, seed: int, *shape: int) -> Tensor:
        """Numbers in [0, 1) that depend on seed, name and number of the step alone."""
        step = self.step
        if isinstance(step, Tensor):
            step = int(step.max()) if step.numel() else 0
        return ops.uniform(shape, seed, f"{self.name} at step {step}", self.grad.device)


@dataclass(frozen=True)
class Gate:
    """One of the gates below."""

    kind: ClassVar[str]

    @property
    def closes(self) -> str:
        """What closing does to the moments: "updated", "frozen", "reset", or "leaky"."""
        return "updated"

    @property
    def shared_clock(self) -> bool:
        """Whether one clock is for all coordinates."""
        return True

    @property
    def decays(self) -> bool:
        """Whether closed coordinates decay."""
        return False

    @property
    def each_backward(self) -> bool:
        """Whether it also closes on what has come of a gradient, after each backward pass."""
        return False

    def close_(self, grad: Tensor, name: str) -> None:
        """With `each_backward`: sets what is closed of the gradient of a weight to 0."""
        raise AssertionError("a subclass that closes after backward passes says how")

    def choose(self, at: Moment) -> Opening:
        """Which coordinates move in this step."""
        raise AssertionError("a subclass chooses")


@dataclass(frozen=True)
class _Policed(Gate):
    """A gate under any policy."""

    policy: Policy = dataclasses.field(default="P1", kw_only=True)
    leaky: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.policy not in _CLOSES:
            raise HyperparameterError(
                f"policy must be one of {', '.join(_CLOSES)}, got {self.policy!r}"
            )
        if self.leaky != (self.policy == "P0"):
            raise HyperparameterError(
                f"{type(self).__name__} with policy {self.policy}: P0 moves closed coordinates by "
                "momentum and decay and must be asked for with leaky=True; no other policy leaks"
            )

    @property
    def closes(self) -> str:
        """As the policy says."""
        return _CLOSES[self.policy]

    @property
    def shared_clock(self) -> bool:
        """As the policy says."""
        return self.policy not in ("P2", "P3")


def _fraction(gate: Gate, field: str, *, zero: bool = False, one: bool = True) -> None:
    value = getattr(gate, field)
    if not ((0 <= value if zero else 0 < value) and (value <= 1 if one else value < 1)):
        wanted = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise HyperparameterError(
            f"{field} of {type(gate).__name__} must be in {wanted}, got {value}"
        )


def _one_of(gate: Gate, field: str, *values: str) -> None:
    value = getattr(gate, field)
    if value not in values:
        raise HyperparameterError(
            f"{field} of {type(gate).__name__} must be one of {', '.join(values)}, got {value!r}"
        )


@dataclass(frozen=True)
class Cautious(Gate):
    """Moves where the step goes against the gradient (Liang et al., arXiv 2411.16085); P1.

    Attributes:
        scale: What makes up for closed coordinates: "released" `1 / max(mean(open), 1e-3)`, as the
            authors' code does now; "paper" `n / (sum(open) + 1)`; "none".
        decay_closed: Closed coordinates decay, as in the source.
    """

    kind: ClassVar[str] = "cautious"
    scale: str = "released"
    decay_closed: bool = True

    def __post_init__(self) -> None:
        _one_of(self, "scale", "released", "paper", "none")

    @property
    def decays(self) -> bool:
        """As `decay_closed` says."""
        return self.decay_closed

    def choose(self, at: Moment) -> Opening:
        """Opens where the step goes against the gradient."""
        opened = at.mean().mul_(at.grad) > 0
        count, total = int(torch.count_nonzero(opened)), opened.numel()
        scale = 1.0
        if self.scale == "released":
            scale = 1 / max(count / max(total, 1), 1e-3)
        elif self.scale == "paper":
            scale = total / (count + 1)
        return Opening(opened, scale)


@dataclass(frozen=True)
class AlphaAdam(Gate):
    """Moves where momentum and gradient agree, scaled up (Chang et al., arXiv 2501.18094); P1.

    The text of the paper could not be read in full; what it leaves open is an option here.

    Attributes:
        history: Compare with the momentum before this gradient was mixed in, else after (then the
            mask is that of `Cautious`). A coordinate without history is open.
        alpha: The factor of the step: "l2" `clip(|u| / (|open * u| + 1e-8), 1, alpha_max)` with
            AdamW's direction u; "count" `1 / max(mean(open), 1e-3)`; "none".
        alpha_max: Bound of the "l2" factor.
        decay_closed: Closed coordinates decay.
    """

    kind: ClassVar[str] = "alphaadam"
    history: bool = True
    alpha: str = "l2"
    alpha_max: float = math.inf
    decay_closed: bool = True

    def __post_init__(self) -> None:
        _one_of(self, "alpha", "l2", "count", "none")
        if not self.alpha_max >= 1:
            raise HyperparameterError(f"alpha_max must be at least 1, got {self.alpha_max}")

    @property
    def decays(self) -> bool:
        """As `decay_closed` says."""
        return self.decay_closed

    def choose(self, at: Moment) -> Opening:
        """Opens where momentum and gradient have one sign."""
        if self.history:
            opened = at.state["exp_avg"] * at.grad > 0
            if isinstance(at.step, Tensor):
                opened |= at.step == 1
            elif at.step == 1:
                opened = torch.ones_like(opened)
        else:
            opened = at.mean().mul_(at.grad) > 0
        scale = 1.0
        if self.alpha == "l2":
            u = at.direction()
            kept = float(torch.where(opened, u, 0.0).norm())
            scale = min(max(float(u.norm()) / (kept + 1e-8), 1.0), self.alpha_max)
        elif self.alpha == "count":
            scale = 1 / max(int(torch.count_nonzero(opened)) / max(opened.numel(), 1), 1e-3)
        return Opening(opened, scale)


@dataclass(frozen=True)
class TopK(_Policed):
    """Moves the largest gradients of each tensor: Gradient-Mask Tuning (arXiv 2406.15330).

    Exactly `max(1, floor(density * n))` of the n selected, ties to the lowest position. The gradient
    is that of the whole optimizer step, as in the paper. With `per="backward"` what is closed is set
    to 0 after every micro-batch, in the sum that has come until then, so that an early one decides
    what later ones can add to; for compact values of a wrapped model, and before clipping.

    Attributes:
        density: Fraction that moves, in (0, 1].
        per: "step", or "backward".
        policy: What becomes of closed coordinates, see the module.
        leaky: Needed for P0.
    """

    kind: ClassVar[str] = "topk"
    density: float = 0.2
    per: str = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction(self, "density")
        _one_of(self, "per", "step", "backward")
        if self.each_backward and self.policy != "P0":
            raise HyperparameterError(
                "TopK with per='backward' takes gradients for 0 while they add up, which is policy "
                "P0: set policy='P0', leaky=True"
            )

    @property
    def each_backward(self) -> bool:
        """As `per` says."""
        return self.per == "backward"

    def _open(self, grad: Tensor, name: str) -> Tensor:
        total = grad.numel()
        k = min(total, max(1, math.floor(Fraction(str(self.density)) * total)))
        return ops.topk_mask(grad, f"the gradient of {name}", k, absolute=True)

    def close_(self, grad: Tensor, name: str) -> None:
        """Keeps the k largest of a running gradient."""
        # `GradScaler` looks for infinities and skips the step
        if ops.finite([grad], [name]):
            grad.masked_fill_(~self._open(grad, name), 0.0)

    def choose(self, at: Moment) -> Opening:
        """Opens the k largest gradients."""
        return Opening(self._open(at.grad, at.name))


@dataclass(frozen=True)
class Percentile(_Policed):
    """Moves where |gradient| is at least its percentile in the tensor: CURE's (arXiv 2401.14948).

    The percentile lies between two magnitudes as numpy puts it, and all that equal it are open, so
    unlike `TopK` this gives no exact number.

    Attributes:
        p: Fraction that stays, in [0, 1): 0.3 moves about the largest 70 %.
        policy: What becomes of closed coordinates, see the module.
        leaky: Needed for P0, which the authors' code has (SGD with momentum and decay).
    """

    kind: ClassVar[str] = "percentile"
    p: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction(self, "p", zero=True, one=False)

    def choose(self, at: Moment) -> Opening:
        """Opens the gradients from the percentile on."""
        size = at.grad.abs()
        if not size.numel():
            return Opening()
        if bool(torch.isnan(size).any()):
            raise ScoreError(f"the gradient of {at.name} is NaN; a percentile needs numbers")
        ordered = size.flatten().sort().values  # torch.quantile refuses more than 2**24
        place = self.p * (ordered.numel() - 1)
        low, part = ordered[int(place)], place - int(place)
        bound = low.lerp(ordered[math.ceil(place)], part) if part else low
        return Opening(size >= bound)


@dataclass(frozen=True)
class Bernoulli(_Policed):
    """Moves each coordinate with probability p, drawn in every step, by 1/p times its step.

    With P0 this is Child-Tuning_F (arXiv 2109.05687): the gradient becomes `grad * open / p`. With P1
    it is the step that is masked and scaled, and its expectation is the plain step.

    Attributes:
        p: In (0, 1].
        policy: "P1" or "P0".
        leaky: Needed for P0.
        seed: Of the draws; each depends on seed, name and number of the step alone.
    """

    kind: ClassVar[str] = "bernoulli"
    p: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction(self, "p")
        if self.policy not in ("P0", "P1"):
            raise HyperparameterError(
                f"Bernoulli draws by the number of the step, which stands still under "
                f"{self.policy}; wanted P0 or P1"
            )

    def choose(self, at: Moment) -> Opening:
        """Draws each coordinate."""
        return Opening(at.uniform(self.seed, *at.grad.shape) < self.p, 1 / self.p)


@dataclass(frozen=True)
class SkipUpdate(Gate):
    """Moves a whole tensor with probability p, by 1/p times its step (arXiv 2602.15322); P1.

    A tensor that is left out does not decay; one that moves decays as usual, not by 1/p.

    Attributes:
        p: In (0, 1].
        seed: Of the draws; each depends on seed, name and number of the step alone.
    """

    kind: ClassVar[str] = "skipupdate"
    p: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _fraction(self, "p")

    def choose(self, at: Moment) -> Opening:
        """Draws the tensor."""
        if float(at.uniform(self.seed, 1)) < self.p:
            return Opening(scale=1 / self.p)
        return Opening(torch.zeros(at.grad.shape, dtype=torch.bool, device=at.grad.device))


@dataclass(frozen=True)
class Magma(Gate):
    """Moves a whole tensor with probability p, as far as momentum and gradient agree; P1.

    arXiv 2602.15322: `s = 0.9 s + 0.1 sigmoid(cos(m, g) / tau)` in every step, and the step is s times
    AdamW's, without 1/p. Here m has this gradient in it, and decay is not scaled by s. A gradient of 0
    has no direction and leaves s as it is.

    Attributes:
        p: In (0, 1].
        tau: Temperature.
        start: s before the first step; the paper does not say.
        seed: Of the draws; each depends on seed, name and number of the step alone.
    """

    kind: ClassVar[str] = "magma"
    p: float = 0.5
    tau: float = 2.0
    start: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _fraction(self, "p")
        if not self.tau > 0:
            raise HyperparameterError(f"tau must be larger than 0, got {self.tau}")

    def choose(self, at: Moment) -> Opening:
        """Draws the tensor, and averages its agreement."""
        m, g = at.mean(), at.grad
        scale, length = float(at.state.get("gate_scale", self.start)), float(g.norm())
        if length > 0:
            cosine = float((m * g).sum()) / max(float(m.norm()) * length, 1e-30)
            scale = 0.9 * scale + 0.1 / (1 + math.exp(-cosine / self.tau))
        at.state["gate_scale"] = torch.tensor(scale, dtype=m.dtype)
        if float(at.uniform(self.seed, 1)) < self.p:
            return Opening(scale=scale)
        return Opening(torch.zeros(g.shape, dtype=torch.bool, device=g.device))


_KINDS: dict[str, type[Gate]] = {
    c.kind: c for c in (Cautious, AlphaAdam, TopK, Percentile, Bernoulli, SkipUpdate, Magma)
}


def plain(gate: Gate | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A gate as a dict of strings, numbers and booleans.

    Raises:
        HyperparameterError: It is none.
    """
    if gate is None:
        return None
    if not isinstance(gate, Gate):
        gate = parse(gate)
    return {"kind": gate.kind, **dataclasses.asdict(gate)}


def parse(data: Mapping[str, Any]) -> Gate:
    """The gate that `plain` made a dict of.

    Raises:
        HyperparameterError: It is none.
    """
    options = dict(data) if isinstance(data, Mapping) else {}
    cls = _KINDS.get(options.pop("kind", ""))
    if cls is None:
        raise HyperparameterError(
            f"{data!r} is no gate; wanted an object, or a dict whose 'kind' is one of {', '.join(_KINDS)}"
        )
    fields = [f.name for f in dataclasses.fields(cls)]
    if strange := sorted(options.keys() - set(fields)):
        raise HyperparameterError(
            f"the gate {cls.kind!r} has no {', '.join(map(repr, strange))}; it has "
            + (", ".join(fields) or "no options")
        )
    return cls(**options)
