"""A merge, written down: which tensors of which sources become which output, by which method."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from retouch.errors import FormatError

__all__ = ["Input", "Plan", "Source", "TensorPlan"]

Kind = Literal["checkpoint", "delta", "adapter"]


@dataclass(frozen=True)
class Source:
    """Where tensors come from.

    Attributes:
        id: Its name in the plan; also the key of the random numbers of its model.
        path: A checkpoint (folder or file of safetensors), a folder of a retouch delta, or a folder of
            a PEFT LoRA adapter.
        kind: Which of the three.
        base: For a delta or an adapter, the id of the source that it changes.
    """

    id: str
    path: str
    kind: Kind = "checkpoint"
    base: str | None = None


@dataclass(frozen=True)
class Input:
    """One tensor of a source, and the parameters of its model for it.

    Attributes:
        source: Id of the source.
        tensor: Its name there.
        parameters: Values of `Method.per_model`, resolved for this tensor.
    """

    source: str
    tensor: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: Of the output tensor.
        method: Name of the merge method; None copies the only input byte for byte, whatever its dtype.
        inputs: One per model.
        base: What differences are taken from.
        shared: Values of `Method.shared`, resolved for this tensor.
        dialect: Of the method; None for the plan's.
    """

    name: str
    method: str | None
    inputs: tuple[Input, ...]
    base: Input | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    dialect: str | None = None


@dataclass(frozen=True)
class Plan:
    """A whole merge.

    Attributes:
        sources: All that is read.
        tensors: All that is written; the order does not matter.
        dialect: Of methods that have it; others and None take their default.
        dtype: Inputs are rounded to it before any arithmetic; None takes them as they are.
        out_dtype: Of merged tensors; None for `dtype`, and without one for that of the base (else of
            the first input).
        seed: Of random masks.
        side_files: Id of the source whose config, tokenizer and such are copied; None for no copies.
        max_shard_size: Bytes of tensors in one file of the output.
        notes: What the report should say of how the plan was made (substitutions, missing tensors).
    """

    sources: tuple[Source, ...]
    tensors: tuple[TensorPlan, ...]
    dialect: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    side_files: str | None = None
    max_shard_size: int = 5_000_000_000
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The plan as text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Reads what `to_json` wrote.

        Raises:
            FormatError: It is no such text.
        """
        try:
            raw = json.loads(text)
            sources = tuple(Source(**s) for s in raw.pop("sources"))
            if bad := [s.kind for s in sources if s.kind not in get_args(Kind)]:
                raise ValueError(f"unknown kind of source {bad[0]!r}")
            tensors = tuple(_tensor(t) for t in raw.pop("tensors"))
            return cls(sources, tensors, **raw | {"notes": tuple(raw.get("notes", ()))})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise FormatError(f"not a merge plan: {e}") from e

    def source(self, name: str) -> Source:
        """The source of this id.

        Raises:
            FormatError: There is none.
        """
        for one in self.sources:
            if one.id == name:
                return one
        raise FormatError(f"the plan has no source {name!r}")


def _tensor(raw: dict[str, Any]) -> TensorPlan:
    inputs = tuple(Input(**i) for i in raw.pop("inputs"))
    base = raw.pop("base")
    return TensorPlan(inputs=inputs, base=None if base is None else Input(**base), **raw)


def kind_of(path: str | Path) -> Kind:
    """What a path holds, by its files."""
    folder = Path(path)
    if (folder / "delta_config.json").is_file():
        return "delta"
    return "adapter" if (folder / "adapter_config.json").is_file() else "checkpoint"


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return tuple((p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts)
