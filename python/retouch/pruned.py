"""LoRA on pruned weights, merged so that zeros stay zeros: the variants of PERP (arXiv 2312.15230).

* ``lora_prune``: train ordinary LoRA, merge ``W + update * (W != 0)``; the outputs change.
* ``mask_lora``: the model computes with that sum in training already, so that merging changes nothing.
* ``scale_lora``: it computes with ``W * BA``, where BA starts from ones; no scaling by alpha / r.

    >>> peft_model = peft.get_peft_model(model, LoraConfig(lora_dropout=0.0, ...))
    >>> lora = PrunedLora(peft_model, "mask_lora")
    >>> train(peft_model)
    >>> model = lora.merge()

A weight that is exactly 0 counts as pruned, also where pruning did not make it so.
"""

import functools
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from retouch.errors import EngineError, HyperparameterError, ShapeError

__all__ = ["PrunedLora", "Variant", "add_unpruned", "scale_unpruned"]

Variant = Literal["lora_prune", "mask_lora", "scale_lora"]


def add_unpruned(weight: Tensor, update: Tensor) -> Tensor:
    """``weight + update`` where the weight is not 0; zeros keep their bits.

    Args:
        weight: Any floating-point tensor.
        update: Of its shape; for LoRA alpha / r * BA, in the order in which the weight is stored.

    Returns:
        A tensor of the weight's dtype, summed in the wider dtype of the two and rounded once.

    Raises:
        ShapeError: Another shape.
    """
    return _unpruned(weight, update, weight + update if weight.shape == update.shape else None)


def scale_unpruned(weight: Tensor, factor: Tensor) -> Tensor:
    """``weight * factor`` where the weight is not 0; zeros keep their bits. See `add_unpruned`."""
    return _unpruned(weight, factor, weight * factor if weight.shape == factor.shape else None)


def _unpruned(weight: Tensor, other: Tensor, result: Tensor | None) -> Tensor:
    if result is None:
        raise ShapeError(
            f"a weight of shape {tuple(weight.shape)} and a product of shape {tuple(other.shape)}"
        )
    return torch.where(weight != 0, result.to(weight.dtype), weight)


class PrunedLora:
    """Makes the LoRA layers of a PEFT model respect what is pruned.

    Args:
        model: A PEFT model, or any model with PEFT's LoRA layers, over linear layers or Conv1D.
        variant: See the module. For ``scale_lora`` A and B are set to 1 / sqrt(r) here, so that their
            product is 1, up to rounding where r is no power of 4.
        adapter: Name of the adapter.

    Raises:
        HyperparameterError: Another variant, or dropout in a layer, which merging could not keep.
        EngineError: No LoRA layer with this adapter, one of another kind (DoRA, embeddings,
            convolutions), one that is merged, or one with several active adapters.
    """

    def __init__(self, model: nn.Module, variant: Variant, adapter: str = "default") -> None:
        if variant not in get_args(Variant):
            raise HyperparameterError(f"variant={variant!r}; wanted {', '.join(get_args(Variant))}")
        self.model = model
        self.variant = variant
        self.adapter = adapter
        self._layers: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight") and adapter in getattr(module, "lora_A", {})
        }
        if not self._layers:
            raise EngineError(
                f"{type(model).__name__} has no LoRA layer with an adapter {adapter!r}"
            )
        for name, layer in self._layers.items():
            self._check(name, layer)
        for layer in self._layers.values():
            if variant == "scale_lora":
                with torch.no_grad():
                    for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
                        part.weight.fill_(layer.r[adapter] ** -0.5)
            if variant != "lora_prune":
                layer.forward = functools.partial(self._forward, layer)

    def _check(self, name: str, layer: Any) -> None:
        base = layer.get_base_layer()
        linear = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
        special = type(layer).__name__ != "Linear" or layer.lora_variant.get(self.adapter)
        if not linear or special or not base.weight.is_floating_point():
            raise EngineError(
                f"{name} is a {type(layer).__name__} over {type(base).__name__}; wanted plain LoRA "
                "over a linear layer"
            )
        if layer.merged or list(layer.active_adapters) != [self.adapter]:
            raise EngineError(
                f"{name} is merged, or has active adapters {list(layer.active_adapters)}; wanted "
                f"{self.adapter!r} alone, unmerged"
            )
        if not isinstance(layer.lora_dropout[self.adapter], nn.Identity):
            raise HyperparameterError(
                f"{name} has LoRA dropout, which a merged weight cannot have: lora_dropout=0.0"
            )

    def _weight(self, layer: Any, wide: bool = False) -> Tensor:
        """The weight that a layer computes with, or will when merged."""
        weight = layer.get_base_layer().weight
        a, b = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
        if wide:
            a, b = a.to(torch.float32), b.to(torch.float32)
        product = b @ a
        product = product.t() if layer.fan_in_fan_out else product
        if self.variant == "scale_lora":
            return scale_unpruned(weight, product)
        return add_unpruned(weight, product * layer.scaling[self.adapter])

    def _forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = layer.get_base_layer()
        if layer.disable_adapters:
            return base(x, *args, **kwargs)
        params = {"weight": self._weight(layer)}
        return torch.func.functional_call(base, params, (x, *args), kwargs)

    def merge(self) -> nn.Module:
        """Merges into the pruned weights and takes the adapters off.

        Returns:
            The model without PEFT's layers; zeros of the weights are where they were, bit for bit. A
            sum that happens to be 0 is a new zero.
        """
        for layer in self._layers.values():
            with torch.no_grad():
                layer.get_base_layer().weight.copy_(self._weight(layer, wide=True))
            layer.__dict__.pop("forward", None)
        self._layers = {}
        unload = getattr(self.model, "unload", None)
        plain: nn.Module = unload() if callable(unload) else self.model
        return plain
