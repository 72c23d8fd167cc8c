"""`merge_state_dicts`: models that are in memory become the tensors of one model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from retouch.delta import Delta
from retouch.deltasource import named
from retouch.errors import EngineError, HyperparameterError
from retouch.merge.base import method_named
from retouch.merge.build import Missing, matched
from retouch.merge.engine import collect
from retouch.merge.plan import Plan, Source
from retouch.merge.sources import NAMES, DeltaReader, Memory, Meta, Reader

__all__ = ["merge_state_dicts"]

Weights: TypeAlias = nn.Module | Mapping[str, Tensor]


class TensorReader:
    """The tensors of a model or state dict, as a `Reader`."""

    folder: Path | None = None

    def __init__(self, name: str, weights: Weights) -> None:
        self.paths: list[Path] = []
        self.tensors = named(weights)
        if not self.tensors:
            raise EngineError(f"{name} has no tensors")
        for own, tensor in self.tensors.items():
            if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in NAMES:
                kind = "without values (meta)" if tensor.is_meta else f"{tensor.dtype}"
                raise EngineError(
                    f"{own} of {name} is {kind}, {tensor.layout}: only dense tensors with values "
                    "are merged (load or dequantize the model first)"
                )

    def names(self) -> list[str]:
        """See `Reader`."""
        return sorted(self.tensors)

    def meta(self, name: str) -> Meta:
        """See `Reader`."""
        tensor = self.tensors[name]
        return Meta(tuple(tensor.shape), tensor.dtype)

    def read(self, name: str) -> Tensor:
        """See `Reader`."""
        return self.tensors[name].detach().cpu().contiguous()

    def memory(self, name: str) -> Memory:
        """See `Reader`."""
        return Memory(0, 0)  # no budget is kept in memory


def merge_state_dicts(
    models: Mapping[str, Weights | Delta] | Sequence[Weights | Delta],
    method: str,
    *,
    base: Weights | None = None,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    shared: Mapping[str, Any] | None = None,
    dialect: str | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    missing: Missing = "error",
) -> dict[str, Tensor]:
    """Merges models in memory; `retouch.merge` merges files, tensor by tensor.

    Arithmetic and random masks are those of `retouch.merge`: models of the same ids and tensors get the
    same bits. Inputs stay as they are; nothing is recorded for autograd. For models on a GPU tensors are
    moved to the CPU one by one.

    Args:
        models: Models, state dicts, or deltas of `base`. The keys of a mapping are their ids (a random mask
            depends on its model's); those of a sequence are ``"0"``, ``"1"``, ...
        method: Name of the merge method (`method_names`), but for those of LoRA factors.
        base: What differences are taken from; for a method that takes no base only what deltas lie over.
        parameters: Per-model parameters: one set for all models, or one for each.
        shared: Shared parameters.
        dialect: None for the method's default, as for a list of models in `retouch.merge`.
        dtype: "float32", "float16" or "bfloat16": inputs are rounded to it before any arithmetic.
        out_dtype: Of merged tensors; None for `dtype`, and without one for that of the base (else of the
            first model).
        seed: Of random masks.
        missing: What becomes of a tensor that some models lack: an error, the "base"'s tensor in its
            place, or none ("drop").

    Returns:
        The merged tensors by name, new ones on the CPU: for ``model.load_state_dict``. What is no float is
        copied; it must be the same in all models.

    Raises:
        HyperparameterError: The method or a parameter is unknown or out of range, or there are no models.
        EngineError: What was given is no model, or has tensors without values.
        FormatError: A tensor is missing, or tensors that are no floats differ.
        ShapeError: The inputs of a tensor have different shapes.
        ScoreError: A weight is NaN; tensor and model are named.
        BaseMismatchError: A delta met a base that is not its own.

    Example:
        >>> merged = merge_state_dicts([tuned_a, tuned_b], "ties", base=base, parameters={"density": 0.2})
        >>> model.load_state_dict(merged)
    """
    if isinstance(models, nn.Module | Delta) or not isinstance(models, Mapping | Sequence):
        raise HyperparameterError(f"models: give several models, not one {type(models).__name__}")
    pairs: list[tuple[str, Any]]
    if isinstance(models, Mapping):
        if any(isinstance(value, Tensor) for value in models.values()):
            raise HyperparameterError("models: this is one state dict; give a list of them")
        pairs = [(str(key), value) for key, value in models.items()]
    else:
        pairs = [(str(i), value) for i, value in enumerate(models)]
    if not pairs or "base" in dict(pairs):
        why = "a model may not be named 'base'" if pairs else "give at least one"
        raise HyperparameterError(f"models: {why}")
    if method_named(method).needs_factors:
        raise HyperparameterError(
            f"{method} merges the factors of LoRA adapters: save them and use retouch.merge"
        )
    readers: dict[str, Reader] = {}
    if base is not None:
        readers["base"] = TensorReader("the base", base)
    for name, value in pairs:
        if isinstance(value, str | os.PathLike):
            raise HyperparameterError(f"model {name} is a path: retouch.merge merges files")
        if not isinstance(value, Delta):
            readers[name] = TensorReader(f"model {name}", value)
        elif base is None:
            raise HyperparameterError(f"model {name} is a delta: give the base that it lies over")
        else:
            readers[name] = DeltaReader(f"model {name}", readers["base"], value, value.aliases)
    ids = [name for name, _ in pairs]
    tensors, notes = matched(
        method, readers, ids, None if base is None else "base", parameters=parameters, shared=shared,
        dialect=dialect, missing=missing,
    )  # fmt: skip
    sources = tuple(Source(name, "") for name in readers)
    plan = Plan(sources, tensors, None, dtype, out_dtype, seed, notes=notes)
    return collect(plan, readers)
