"""Changes of what a model reads, made while its losses are taken: other statistics, attacks."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch import ops
from retouch.errors import HyperparameterError, ScoreError
from retouch.names import close_to

__all__ = ["Attack", "changed_features", "shifted"]


@contextlib.contextmanager
def changed_features(
    model: nn.Module, at: str | None, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Puts `change` of the features of a model in their place.

    Args:
        model: The model.
        at: The module whose output (of a tuple, the first) is meant. None: the input embedding of a
            model with `get_input_embeddings`, else the first floating-point input of the model with
            a dimension beside that of the samples.
        change: From the features to others of the same shape; called as often as the module is.

    Raises:
        HyperparameterError: There is no such module.
        ScoreError: No such features went through the model.
    """
    modules = dict(model.named_modules())
    if at is not None and at not in modules:
        raise HyperparameterError(
            f"at={at!r}: {type(model).__name__} has no module of this name{close_to(at, modules)}"
        )
    module = _embedding(model) if at is None else modules[at]
    calls = 0

    def changed(features: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return change(features)

    def after(place: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return changed(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (changed(output[0]), *output[1:])
        raise ScoreError(
            f"{type(place).__name__} gives a {type(output).__name__}; wanted a module whose output is a "
            "tensor, or a tuple with one first: name another with at="
        )

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for key, item in (*enumerate(args), *kwargs.items()):
            if isinstance(item, Tensor) and item.is_floating_point() and item.dim() > 1:
                new = changed(item)
                if isinstance(key, int):
                    return (*args[:key], new, *args[key + 1 :]), kwargs
                return args, kwargs | {key: new}
        return None

    if module is None:
        handle = model.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
        if not calls:
            raise ScoreError(
                f"no features of {type(model).__name__} to change: name the module that makes them "
                "with at="
            )
    finally:
        handle.remove()


def _embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if get is not None else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def shifted(features: Tensor, mean: float, std: float, seed: int) -> Tensor:
    """Features whose channels have another mean and another standard deviation in each sample.

    The mean of a channel moves by `mean` of its standard deviations, which itself is multiplied by
    1 + `std` or 1 - `std`; which way is drawn for each channel, by the seed. A sample is changed in
    the same way in any batch.

    Args:
        features: [samples, channels, positions, positions...], or with the channels last: of two and
            three dimensions. Those of two have no positions, so they are one channel.
        mean: Of the shift.
        std: Of the scale.
        seed: Of the directions.
    """
    last = features.dim() - 1
    channel = 1 if features.dim() > 3 else last
    over = [d for d in range(1, features.dim()) if d != channel] or [last]
    shape = [1] * features.dim()
    if channel not in over:
        shape[channel] = features.shape[channel]

    def ways(name: str) -> Tensor:
        drawn = ops.uniform((max(shape),), seed, name, features.device).view(shape)
        return torch.where(drawn < 0.5, -1.0, 1.0)

    wide = features.to(ops.value_dtype(features.dtype))
    centre = wide.mean(over, keepdim=True)
    spread = (wide - centre).square().mean(over, keepdim=True).sqrt()
    moved = centre + ways("mean") * mean * spread
    return (moved + (wide - centre) * (1 + ways("std") * std)).to(features.dtype)


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent within a box around the features: the adversary of one batch.

    Attributes:
        radius: Half the side of the box.
        step: By which each coordinate moves in a step, up or down with the sign of its gradient.
        steps: How many.
        noise: Standard deviation of the normal noise that it starts from.
        aim: What it raises: "kl", the divergence of the outputs from those of the clean features
            (TRADES), or "loss", that of the batch.
        bounds: Least and largest value that features can have, as (0, 1) for images; None: any.

    Raises:
        HyperparameterError: An unknown aim, or a number out of its range.
    """

    radius: float = 0.031
    step: float = 0.007
    steps: int = 10
    noise: float = 1e-3
    aim: Literal["kl", "loss"] = "kl"
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.aim not in ("kl", "loss"):
            raise HyperparameterError(f"Attack: aim={self.aim!r}; wanted kl or loss")
        for name in ("radius", "step", "steps", "noise"):
            if not getattr(self, name) >= 0:
                raise HyperparameterError(
                    f"Attack: {name}={getattr(self, name)!r}; wanted a number >= 0"
                )
        if self.bounds is not None:
            low, high = self.bounds
            object.__setattr__(self, "bounds", (float(low), float(high)))

    def losses(
        self, model: nn.Module, at: str | None, loss: Callable[[], Tensor], kind: str
    ) -> Tensor:
        """The loss at the features that the attack finds.

        Args:
            model: The model.
            at: See `changed_features`.
            loss: Runs the model on the batch.
            kind: "task": the loss itself; "kl": the divergence of the outputs from the clean ones, by
                sample.

        Raises:
            ScoreError: The outputs hold no logits, where a divergence is wanted.
        """
        clean: list[Tensor] = []

        def note(features: Tensor) -> Tensor:
            clean.append(features.detach())
            return features

        with changed_features(model, at, note), _outputs(model) as passes:
            loss()
        natural = passes[-1] if passes else None
        if kind == "task" and natural is not None:
            natural = natural.detach()
        deltas = [self.noise * torch.randn_like(features) for features in clean]
        deltas = [self._inside(*pair) for pair in zip(clean, deltas, strict=True)]

        def taken(kind: str, target: Tensor | None) -> Tensor:
            with changed_features(model, at, _adder(deltas)), _outputs(model) as passes:
                found = loss()
            return _divergence(target, passes[-1] if passes else None) if kind == "kl" else found

        for _ in range(self.steps):
            for delta in deltas:
                delta.requires_grad_(True)
            aim = taken(self.aim, natural if natural is None else natural.detach())
            slopes = torch.autograd.grad(aim, deltas)
            deltas = [
                self._inside(features, (delta + self.step * slope.sign()).detach())
                for features, delta, slope in zip(clean, deltas, slopes, strict=True)
            ]
        return taken(kind, natural)

    def _inside(self, features: Tensor, delta: Tensor) -> Tensor:
        delta = delta.clamp(-self.radius, self.radius)
        if self.bounds is None:
            return delta
        return (features + delta).clamp(*self.bounds) - features


def _adder(deltas: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Adds one after the other, as the module is called."""
    left = iter(deltas)
    return lambda features: features + next(left)


@contextlib.contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Any]]:
    """The logits of the passes of a model."""
    found: list[Any] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.dim():
            found.append(logits)

    handle = model.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _divergence(natural: Tensor | None, other: Tensor | None) -> Tensor:
    """KL(natural || other), the sum over positions and the mean over samples, in float32."""
    if natural is None or other is None:
        raise ScoreError(
            "the model gives no logits to compare, neither as a tensor nor as .logits: take "
            "aim='loss' and the task's loss"
        )
    p = F.log_softmax(natural.to(torch.float32), -1)
    q = F.log_softmax(other.to(torch.float32), -1)
    return F.kl_div(q, p, reduction="sum", log_target=True) / natural.shape[0]
