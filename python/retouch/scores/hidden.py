"""Scores of layers from the hidden states that they give."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.batches import Batches, samples_in, to_device
from retouch.collected import Collected
from retouch.eligible import own_parameters
from retouch.errors import HyperparameterError, ScoreError
from retouch.names import CUSTOM
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn, kept, outputs_of
from retouch.scores.base import Score


@register("cosine_gap")
@dataclass(frozen=True, repr=False)
class CosineGap(Score):
    """How much each layer widens the angle between two kinds of text, the same for all of a layer.

    Safety Layers (arXiv 2408.17003): of the hidden vectors of the last token, the angle of the mean
    cosine between normal and harmful prompts, less that between two normal ones; the score of a layer
    is by how much, in radians, this gap is larger after it than before. The paper takes
    random pairs; here are all of them, as means of sums of unit vectors. The data are the normal
    prompts. In evaluation mode; one forward pass of both. Layers are called as ``layer(hidden, ...)``
    or ``layer(hidden_states=...)``.

    Attributes:
        harmful: Batches of the other kind; a config with them cannot be written to a file.
    """

    needs_data: ClassVar[bool] = True
    harmful: Any = field(default=None)

    def __repr__(self) -> str:
        """Says whether there are harmful prompts."""
        return f"CosineGap({'no prompts' if self.harmful is None else 'harmful prompts'})"

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`; a `loss_fn` is called for the forward pass that it makes.

        Raises:
            HyperparameterError: A parameter is in no layer.
            ScoreError: No data or harmful prompts, fewer than two normal ones, or hidden states that
                are NaN or not of the form [samples, tokens, features].
        """
        if data is None or isinstance(data, Collected):
            raise ScoreError(
                f"the score {self!r} needs data: pass data= (batches of normal prompts)"
            )
        if self.harmful is None:
            raise ScoreError(
                "the score needs two kinds of prompts: score=retouch.scores.CosineGap(harmful), and "
                "normal ones as data="
            )
        outside = [n for n, c in eligible.items() if c.layer is None]
        if outside:
            raise HyperparameterError(
                f"{outside[0]} is in no layer, and the score is for layers: leave it out of "
                "target_modules, or train it whole (modules_to_save)"
            )
        layers = list(dict.fromkeys(c.layer for c in eligible.values() if c.layer is not None))
        normal, harmful = (_sums(model, layers, d, loss_fn) for d in (data, self.harmful))
        growth = {
            layer: _gap(normal[layer, 1], harmful[layer, 1])
            - _gap(normal[layer, 0], harmful[layer, 0])
            for layer in layers
        }
        return {
            n: torch.tensor(growth[c.layer or ""], device=c.param.device).expand(c.shape)
            for n, c in eligible.items()
        }

    def to_dict(self) -> Any:
        """JSON-able; see `Score.to_dict`."""
        return super().to_dict() if self.harmful is None else CUSTOM


def _sums(
    model: nn.Module, layers: list[str], data: Any, loss_fn: LossFn | None
) -> dict[tuple[str, int], tuple[Tensor, int]]:
    """The sums of the unit vectors of the last tokens before (0) and after (1) each layer, float64."""
    sums: dict[tuple[str, int], Tensor] = {}
    last: list[Tensor | None] = [None]
    count = 0
    handles = []

    def add(key: tuple[str, int], hidden: Any) -> None:
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3):
            raise ScoreError(
                f"{key[0]} has no hidden states of the form [samples, tokens, features]"
            )
        if hidden.dim() == 3:
            at = last[0]
            if at is None:
                at = torch.full((hidden.shape[0],), hidden.shape[1] - 1, device=hidden.device)
            hidden = hidden[torch.arange(hidden.shape[0], device=hidden.device), at]
        units = F.normalize(hidden.detach().to(torch.float64), dim=-1)
        total = sums.get(key, torch.zeros_like(units[0]))
        for unit in units:  # one after the other, so that cutting batches does not matter
            total = total + unit
        sums[key] = total

    def watch(layer: str, module: nn.Module) -> None:
        def take(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            add((layer, 0), args[0] if args else kwargs.get("hidden_states"))
            add((layer, 1), output)

        handles.append(module.register_forward_hook(take, with_kwargs=True))

    def find(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        last[0] = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            last[0] = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)

    with kept(model), torch.no_grad():
        try:
            handles.append(model.register_forward_pre_hook(find, with_kwargs=True))
            for layer in layers:
                watch(layer, model.get_submodule(layer))
            model.eval()
            device = next((p.device for _, p in own_parameters(model)), torch.device("cpu"))
            for batch in data if isinstance(data, Batches) else Batches(data):
                batch = to_device(batch, device)
                count += samples_in(batch)
                _ = outputs_of(model, batch) if loss_fn is None else loss_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    if not count or len(sums) < 2 * len(layers):
        raise ScoreError("the data hold no prompt, or a layer was not called")
    return {key: (total, count) for key, total in sums.items()}


def _gap(normal: tuple[Tensor, int], harmful: tuple[Tensor, int]) -> float:
    """The angle of the mean cosine of all mixed pairs less that of all normal ones, in radians."""
    (ours, n), (others, m) = normal, harmful
    if n < 2:
        raise ScoreError(f"the data hold {n} normal prompt; pairs of them need two or more")
    alike = (float((ours * ours).sum()) - n) / (n * (n - 1))
    mixed = float((ours * others).sum()) / (n * m)
    if alike != alike or mixed != mixed:
        raise ScoreError("a hidden state is NaN or infinite")
    return math.acos(min(max(mixed, -1.0), 1.0)) - math.acos(min(max(alike, -1.0), 1.0))
