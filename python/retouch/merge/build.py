"""Plans for models of one architecture: tensors are matched by name."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from retouch import hub, ops
from retouch.errors import FormatError, HyperparameterError
from retouch.merge.base import method_named
from retouch.merge.plan import Input, Plan, Source, TensorPlan, kind_of, natural
from retouch.merge.sources import Reader, open_sources

__all__ = ["build"]

Missing = Literal["error", "base", "drop"]
PathLike = str | os.PathLike[str]

# An output head that is tied to the embedding is left out of a checkpoint.
_TIED = {
    "lm_head.weight": (
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "embed_tokens.weight",
    ),
}


def build(
    method: str,
    models: Sequence[PathLike],
    *,
    base: PathLike | None = None,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    shared: Mapping[str, Any] | None = None,
    dialect: str | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    missing: Missing = "error",
    max_shard_size: int = 5_000_000_000,
) -> Plan:
    """A plan that merges every tensor of the models by one method.

    Args:
        method: Its name.
        models: Checkpoints, retouch deltas and PEFT adapters (folders, files, or ids of the Hub). Deltas
            and adapters lie over `base`.
        base: What differences are taken from; for a method that takes no base only what deltas and
            adapters lie over.
        parameters: Per-model parameters: one set for all models, or one for each.
        shared: Shared parameters.
        dialect: None for the method's default.
        dtype: Inputs are rounded to it before any arithmetic.
        out_dtype: Of merged tensors.
        seed: Of random masks.
        missing: What becomes of a tensor that some models lack: an error, the base's tensor in its
            place, or no output tensor. A head that is tied to the embedding (absent from a file) is
            taken from the embedding.
        max_shard_size: Bytes of tensors in one output file.

    Returns:
        The plan; its notes say which tensors were substituted, left out or copied.

    Raises:
        HyperparameterError: The method or a parameter is unknown or out of range.
        FormatError: A tensor is missing, or tensors that are no floats differ between models.
    """
    if not models:
        raise HyperparameterError("models is empty: name at least one")
    sources: list[Source] = []
    if base is not None:
        path = hub.local(base)
        sources.append(Source("base", path, kind_of(path)))
    ids = _ids([os.fspath(m) for m in models])
    for name, model in zip(ids, models, strict=True):
        path = hub.local(model)
        kind = kind_of(path)
        if kind != "checkpoint" and base is None:
            raise HyperparameterError(f"{path} is a {kind}: name the base that it lies over")
        sources.append(Source(name, path, kind, None if kind == "checkpoint" else "base"))
    draft = Plan(tuple(sources), ())
    readers = open_sources(draft)
    tensors, notes = matched(
        method, readers, ids, None if base is None else "base", parameters=parameters, shared=shared,
        dialect=dialect, missing=missing,
    )  # fmt: skip
    return Plan(
        tuple(sources), tensors, None, dtype, out_dtype, seed,
        "base" if base is not None else ids[0], max_shard_size, notes,
    )  # fmt: skip


def matched(
    method: str,
    readers: Mapping[str, Reader],
    ids: Sequence[str],
    base: str | None,
    *,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    shared: Mapping[str, Any] | None,
    dialect: str | None,
    missing: Missing,
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...]]:
    """The tensors of a plan, and notes on how they came about; see `build`.

    Args:
        method: Its name.
        readers: All sources by id.
        ids: The models among them, in order.
        base: The id of the base.
        parameters: As of `build`.
        shared: As of `build`.
        dialect: As of `build`.
        missing: As of `build`.

    Returns:
        Tensors and notes.
    """
    chosen = method_named(method)
    sets = parameters if isinstance(parameters, Sequence) else [parameters or {}] * len(ids)
    if len(sets) != len(ids):
        raise HyperparameterError(f"{len(sets)} sets of parameters for {len(ids)} models")
    chosen.resolve(dialect, sets, shared or {})
    differences = chosen.base != "none" and base is not None
    rule = _Matching(readers, list(ids), base, differences, missing)
    rule.method, rule.dialect = method, dialect
    return tuple(rule.tensors(sets, dict(shared or {}))), tuple(rule.notes)


def _ids(paths: list[str]) -> list[str]:
    """A short name for each model: its folder's, with a number where two are the same."""
    names = [Path(p).name or p for p in paths]
    return [n if names.count(n) == 1 and n != "base" else f"{n}#{i}" for i, n in enumerate(names)]


class _Matching:
    method: str
    dialect: str | None

    def __init__(
        self,
        readers: Mapping[str, Reader],
        ids: list[str],
        base: str | None,
        differences: bool,
        missing: Missing,
    ) -> None:
        self.readers, self.ids, self.base, self.missing = readers, ids, base, missing
        self.differences = differences
        self.names = {name: set(reader.names()) for name, reader in readers.items()}
        self.notes: list[str] = []

    def tensors(
        self, sets: Sequence[Mapping[str, Any]], shared: dict[str, Any]
    ) -> list[TensorPlan]:
        used = self.ids + ([self.base] if self.differences and self.base else [])
        every = sorted({n for one in used for n in self.names[one]}, key=natural)
        lacking: list[str] = []
        out = []
        for name in every:
            found = {one: self._where(one, name) for one in used}
            absent = [one for one, where in found.items() if where is None]
            if absent and not self._fill(name, found, absent, lacking):
                continue
            one = used[-1]
            place = found[one]
            assert place is not None
            if not self.readers[place.source].meta(place.tensor).dtype.is_floating_point:
                out.append(self._copied(name, found))
                continue
            inputs = tuple(
                Input(place.source, place.tensor, dict(p))
                for place, p in zip((found[i] for i in self.ids), sets, strict=True)
                if place is not None
            )
            base = found[self.base] if self.differences and self.base else None
            out.append(TensorPlan(name, self.method, inputs, base, shared, self.dialect))
        if lacking:
            raise FormatError(
                f"{len(lacking)} tensors are not in all models, first {'; '.join(lacking[:3])}: choose "
                "missing='base' (keep the base's) or missing='drop' (leave them out)"
            )
        return out

    def _where(self, one: str, name: str) -> Input | None:
        if name in self.names[one]:
            return Input(one, name)
        for other in _TIED.get(name, ()):
            if other in self.names[one]:
                self.notes.append(f"{name} of {one} is tied: taken from {other}")
                return Input(one, other)
        return None

    def _fill(
        self, name: str, found: dict[str, Input | None], absent: list[str], lacking: list[str]
    ) -> bool:
        """Deals with a tensor that some models lack; whether there will be an output."""
        if self.missing == "drop":
            self.notes.append(f"{name} is left out: {', '.join(absent)} lacks it")
            return False
        own = Input(self.base, name) if self.base and name in self.names[self.base] else None
        if self.missing == "base" and own is not None:
            self.notes.append(f"{name} of {', '.join(absent)} is missing: the base's is taken")
            found.update(dict.fromkeys(absent, own))
            return True
        lacking.append(f"{name} (not in {', '.join(absent)})")
        return False

    def _copied(self, name: str, found: dict[str, Input | None]) -> TensorPlan:
        """Tensors that are no floats are not merged: they must be the same everywhere."""
        places = [p for p in found.values() if p is not None]
        first = self.readers[places[-1].source].read(places[-1].tensor)
        for place in places[:-1]:
            tensor = self.readers[place.source].read(place.tensor)
            same = tensor.shape == first.shape and tensor.dtype == first.dtype
            if not same or ops.diff(first, tensor, name).numel():
                raise FormatError(
                    f"{name} is {first.dtype} and differs between {places[-1].source} and "
                    f"{place.source}: only floats are merged"
                )
        self.notes.append(f"{name} is {ops.dtype_name(first.dtype)}: copied")
        return TensorPlan(name, None, (places[-1],))
