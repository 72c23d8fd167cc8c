"""Trainable vectors that are added to the hidden states of special tokens (PASTA)."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch.errors import EngineError, HyperparameterError, ShapeError

__all__ = ["SpecialTokenVectors"]


class SpecialTokenVectors(nn.Module):
    """Adds a trainable vector to what goes into each layer, at the positions of special tokens.

    PASTA (arXiv 2210.04382): the k-th special token of a sequence, counted over all `token_ids`, has a
    vector of its own in every layer. They start from 0, so that step 0 is the identity; the released
    code starts from random ones. No weight of the model is touched.

    It registers itself in the model as ``special_token_vectors``, where optimizers, `Trainer` and
    `save_pretrained` find it; `remove` takes it off. Call the model itself, with `input_ids`.

    Args:
        model: A Hugging Face model with one list of layers.
        token_ids: Ids of the special tokens, such as those of [CLS] and [SEP].
        count: How many special tokens a sequence may have, from its start.
        dropout: Of the vectors, in training; the released code takes that of the hidden states.

    Attributes:
        vectors: Float32 [layers, count, hidden].

    Raises:
        HyperparameterError: No ids, a count < 1, a dropout outside of [0, 1).
        EngineError: The layers cannot be told, or the model has such vectors already.

    Example:
        >>> vectors = SpecialTokenVectors(model, [101, 102], count=3)
        >>> model.requires_grad_(False)
        >>> vectors.requires_grad_(True), model.classifier.requires_grad_(True)
    """

    PLACE = "special_token_vectors"
    token_ids: Tensor

    def __init__(
        self, model: Any, token_ids: Iterable[int], *, count: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        ids = sorted(set(token_ids))
        if not ids or count < 1 or not 0 <= dropout < 1:
            raise HyperparameterError(
                f"token_ids={ids}, count={count}, dropout={dropout}; wanted ids, a count >= 1 and a "
                "dropout in [0, 1)"
            )
        if self.PLACE in model._modules:
            raise EngineError(f"{type(model).__name__} has vectors already: remove() them first")
        layers, hidden = _layers(model)
        device = next(model.parameters()).device
        self.vectors = nn.Parameter(torch.zeros(len(layers), count, hidden, device=device))
        self.register_buffer("token_ids", torch.tensor(ids, device=device), persistent=False)
        self.dropout = dropout
        self._occurrence: Tensor | None = None
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._find, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        ]
        for i, layer in enumerate(layers):
            hook = functools.partial(self._add, i)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self._take_off = functools.partial(model._modules.pop, self.PLACE, None)
        model.add_module(self.PLACE, self)

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._take_off()

    def _find(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
            raise ShapeError(
                f"{type(model).__name__} was called without input_ids of [samples, tokens], in "
                "which special tokens could be found"
            )
        if model.training and any(
            getattr(m, "gradient_checkpointing", False) for m in model.modules()
        ):
            raise EngineError(
                "special token vectors do not work with gradient checkpointing, whose second "
                "forward pass does not see the input_ids; switch it off"
            )
        special = torch.isin(ids, self.token_ids)
        occurrence = special.long().cumsum(1).where(special, 0) - 1
        most = int(occurrence.max()) + 1 if occurrence.numel() else 0
        if most > self.vectors.shape[1]:
            sample = int(occurrence.max(1).values.argmax())
            raise ShapeError(
                f"sample {sample} of a batch has {most} special tokens; there are vectors for "
                f"{self.vectors.shape[1]} (count=)"
            )
        self._occurrence = occurrence  # -1 where there is none

    def _forget(self, *_: Any) -> None:
        self._occurrence = None

    def _add(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._occurrence is None:
            raise EngineError(
                "a layer was called without its model, whose input_ids say where special tokens are"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        vectors = F.dropout(self.vectors[layer], self.dropout, self.training)
        moved = hidden + vectors.to(hidden.dtype)[self._occurrence.clamp(min=0)]
        hidden = torch.where((self._occurrence >= 0)[..., None], moved, hidden)
        return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def _layers(model: Any) -> tuple[nn.ModuleList, int]:
    """The layers of a Hugging Face model, and their width."""
    config = getattr(model, "config", None)
    number = getattr(config, "num_hidden_layers", None)
    hidden = getattr(config, "hidden_size", None)
    lists = [
        m for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == number and len({type(x) for x in m}) == 1
    ]  # fmt: skip
    if not isinstance(hidden, int) or len(lists) != 1:
        raise EngineError(
            f"{type(model).__name__} has {len(lists)} lists of config.num_hidden_layers={number} "
            f"layers, and config.hidden_size={hidden}; wanted exactly one list, and a size"
        )
    return lists[0], hidden
