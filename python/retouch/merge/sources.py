"""What a merge reads: checkpoints through a memory map, deltas and adapters over their base."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retouch import deltafile, ops
from retouch.deltaentry import Entry
from retouch.deltasource import _files
from retouch.errors import BaseMismatchError, FormatError, ShapeError
from retouch.merge.plan import Plan, Source

__all__ = ["Adapter", "Factors", "Memory", "Meta", "Reader", "open_sources"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""How safetensors spells a dtype."""


class Meta(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Memory(NamedTuple):
    """Bytes of anonymous memory: of a tensor that was read, and at most while it was read."""

    held: int
    peak: int


class Sparse(NamedTuple):
    """A tensor as its base and what differs: ascending flat positions and the values there."""

    base: Tensor
    positions: Tensor
    values: Tensor


class Reader(Protocol):
    """Tensors by name.

    Attributes:
        folder: Where config and tokenizer are; None if there is no such place.
        paths: What is read, so that it is not written over.
    """

    folder: Path | None
    paths: list[Path]

    def names(self) -> list[str]:
        """All names, sorted."""
        ...

    def meta(self, name: str) -> Meta:
        """Shape and dtype, without reading the tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor; not to be written, it may be a view of a mapped file."""
        ...

    def memory(self, name: str) -> "Memory":
        """What `read` takes beside maps of files."""
        ...


class Checkpoint:
    """A file or folder of safetensors."""

    def __init__(self, path: Path) -> None:
        self.paths = [path]
        self.folder = path if path.is_dir() else None
        self._files: dict[str, Any] = {}
        for file in _files(path):
            try:
                opened: Any = safe_open(file, "pt")
                names: list[str] = list(opened.keys())
            except SafetensorError as e:
                raise FormatError(f"{file}: damaged or truncated ({e})") from e
            for name in names:
                if name in self._files:
                    raise FormatError(f"{file}: {name} is in another file of this folder too")
                self._files[name] = opened

    def names(self) -> list[str]:
        """See `Reader`."""
        return sorted(self._files)

    def meta(self, name: str) -> Meta:
        """See `Reader`."""
        part = self._file(name).get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise FormatError(
                f"{self.paths[0]}: {name} has the dtype {part.get_dtype()}, unknown here"
            )
        return Meta(tuple(part.get_shape()), dtype)

    def read(self, name: str) -> Tensor:
        """See `Reader`."""
        tensor: Tensor = self._file(name).get_tensor(name)
        # a file may hold a tensor at an odd address; kernels need whole elements
        return tensor if tensor.data_ptr() % max(tensor.element_size(), 1) == 0 else tensor.clone()

    def memory(self, name: str) -> Memory:
        """See `Reader`."""
        return Memory(0, 0)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise FormatError(f"{self.paths[0]}: it has no tensor {name}")
        return self._files[name]


class DeltaReader:
    """A base with the changes of a retouch delta; its fingerprints of the base are checked.

    Args:
        name: Of the delta, for errors.
        base: What it changes.
        entries: Its entries.
        aliases: Its further names of tied weights.
        paths: Its files, if it has any.
    """

    def __init__(
        self,
        name: str,
        base: Reader,
        entries: Mapping[str, Entry],
        aliases: Mapping[str, str],
        paths: Sequence[Path] = (),
    ) -> None:
        self.paths = [*paths, *base.paths]
        self.folder, self.base = base.folder, base
        self._entries, self._name = dict(entries), name
        known = set(base.names())
        # tied weights: whichever name the base has gets the change
        for alias, first in aliases.items():
            if alias in known:
                self._entries.setdefault(alias, self._entries[first])
        for own in list(self._entries):
            if own not in known and self._entries[own].kind != "added":
                others = [alias for alias, first in aliases.items() if first == own]
                if not any(o in known for o in others):
                    raise BaseMismatchError(
                        f"{name}: the base has no tensor {own}, which it changes"
                    )
                del self._entries[own]

    @classmethod
    def load(cls, path: Path, base: Reader) -> Self:
        """The delta of a folder."""
        entries, config = deltafile.load(path)
        return cls(str(path), base, entries, config.get("aliases") or {}, [path])

    def names(self) -> list[str]:
        """See `Reader`."""
        kinds = {n: e.kind for n, e in self._entries.items()}
        added = {n for n, k in kinds.items() if k == "added"}
        return sorted({n for n in self.base.names() if kinds.get(n) != "removed"} | added)

    def meta(self, name: str) -> Meta:
        """See `Reader`."""
        entry = self._entries.get(name)
        return self.base.meta(name) if entry is None else Meta(tuple(entry.shape), entry.dtype)

    def sparse(self, name: str) -> Sparse | None:
        """The tensor as what differs from its base, if the delta holds it so; checked."""
        entry = self._entries.get(name)
        if entry is None:
            empty = torch.empty(0, dtype=torch.int32)
            base = self.base.read(name)
            return Sparse(base, empty, torch.empty(0, dtype=base.dtype))
        if entry.index is None or entry.value is None:
            return None
        base = self.base.read(name)
        self._check(name, entry, base)
        return Sparse(base, entry.index, entry.value)

    def read(self, name: str) -> Tensor:
        """See `Reader`."""
        entry = self._entries.get(name)
        if entry is None:
            return self.base.read(name)
        if entry.kind == "removed":
            raise FormatError(f"{self._name}: it removes {name}")
        if entry.change is not None:
            base = self.base.read(name)
            self._check(name, entry, base)
            out, values = base.clone(), entry.after(entry.read(base))
            assert values is not None
            entry.write(out, values, name)
            return out
        assert entry.value is not None
        if entry.index is None:
            return entry.value.view(entry.shape)
        base = self.base.read(name)
        self._check(name, entry, base)
        out = base.clone()
        ops.put_(out, entry.index, entry.value, name)
        return out

    def memory(self, name: str) -> Memory:
        """See `Reader`; what the delta itself holds is in memory whether it is merged or not."""
        entry = self._entries.get(name)
        if entry is None:
            return self.base.memory(name)
        own = math.prod(entry.shape) * entry.dtype.itemsize
        # a change is decoded and added in float32 at least
        wide = 0 if entry.change is None else 3 * entry.count * max(4, entry.dtype.itemsize)
        below = Memory(0, 0) if entry.kind == "added" else self.base.memory(name)
        return Memory(own, own + wide + below.peak)

    def _check(self, name: str, entry: Entry, base: Tensor) -> None:
        if tuple(base.shape) != tuple(entry.shape) or base.dtype != entry.dtype:
            raise BaseMismatchError(
                f"{self._name}: {name} is {entry.dtype} {tuple(entry.shape)}, but in the base it is "
                f"{base.dtype} {tuple(base.shape)}"
            )
        if entry.base_hash is not None and ops.fingerprint(base) != entry.base_hash:
            raise BaseMismatchError(
                f"{self._name}: {name} of the base is not the one that the delta was made from"
            )


class Factors(NamedTuple):
    """The LoRA of one linear layer: ``scale * B A`` is added to its weight [out, in].

    Attributes:
        a: [rank, in].
        b: [out, rank].
        scale: What B A is multiplied by.
        transposed: The weight is [in, out] (PEFT's `fan_in_fan_out`).
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool


class Adapter:
    """A PEFT LoRA adapter by itself.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        config: What ``adapter_config.json`` holds.
        keys: For the name of each weight that it changes, those of A and B in the file.

    Raises:
        FormatError: It is no plain LoRA (DoRA, biases, whole modules and such are refused by name).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config: dict[str, Any] = json.loads(
                (path / "adapter_config.json").read_text(encoding="utf-8")
            )
        except ValueError as e:
            raise FormatError(f"{path / 'adapter_config.json'}: not valid JSON ({e})") from e
        config = self.config
        if config.get("peft_type") != "LORA":
            raise FormatError(
                f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is merged"
            )
        for key in ("use_dora", "modules_to_save", "lora_bias", "alora_invocation_tokens"):
            if config.get(key):
                raise FormatError(f"{path}: {key} is set; only plain LoRA is merged")
        if config.get("bias", "none") != "none":
            raise FormatError(f"{path}: it trains biases; only plain LoRA is merged")
        self.file = Checkpoint(path / "adapter_model.safetensors")
        self.keys: dict[str, tuple[str, str]] = {}
        used = set()
        for key in self.file.names():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.lora_A\.weight", key)
            if match is None:
                continue
            other = key.replace(".lora_A.", ".lora_B.")
            self.keys[f"{match[1]}.weight"] = (key, other)
            used |= {key, other}
        if rest := set(self.file.names()) - used:
            raise FormatError(f"{path}: {min(rest)} is no factor of a plain LoRA on a linear layer")

    def factors(self, name: str) -> Factors | None:
        """The factors for a weight, as they are stored; None if the adapter does not change it.

        Raises:
            ShapeError: They do not fit each other.
        """
        if name not in self.keys:
            return None
        a, b = (self.file.read(key) for key in self.keys[name])
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ShapeError(
                f"{self.path}: B {tuple(b.shape)} and A {tuple(a.shape)} of {name} do not fit"
            )
        return Factors(a, b, self._scale(name), bool(self.config.get("fan_in_fan_out")))

    def _scale(self, name: str) -> float:
        config, module = self.config, name.removesuffix(".weight")

        def pattern(key: str, default: float) -> float:
            for rule, value in (config.get(key) or {}).items():
                if re.match(rf"(.*\.)?({rule})$", module):
                    return float(value)
            return default

        rank = self.file.meta(self.keys[name][0]).shape[0]
        alpha = pattern("alpha_pattern", float(config.get("lora_alpha", rank)))
        return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


class AdapterReader:
    """A base with a PEFT LoRA adapter: each weight is widened, B A times the scale added in float32.

    Args:
        path: See `Adapter`.
        base: The model that it was trained on.

    Raises:
        FormatError: See `Adapter`; or a module of it is not in the base.
    """

    def __init__(self, path: Path, base: Reader) -> None:
        self.paths = [path, *base.paths]
        self.folder, self._base, self._path = base.folder, base, path
        self._adapter = Adapter(path)
        for weight in sorted(self._adapter.keys.keys() - set(base.names())):
            key = self._adapter.keys[weight][0]
            raise FormatError(f"{path}: the base has no {weight}, which {key} changes")

    def names(self) -> list[str]:
        """See `Reader`."""
        return self._base.names()

    def meta(self, name: str) -> Meta:
        """See `Reader`; an adapted weight comes as float32."""
        meta = self._base.meta(name)
        return Meta(meta.shape, torch.float32) if name in self._adapter.keys else meta

    def factors(self, name: str) -> Factors | None:
        """The factors for a weight; None if the adapter does not change it.

        Raises:
            ShapeError: They do not fit it.
        """
        found = self._adapter.factors(name)
        if found is None:
            return None
        shape = self._base.meta(name).shape
        want = shape[::-1] if found.transposed else shape
        if (found.b.shape[0], found.a.shape[1]) != tuple(want):
            raise ShapeError(
                f"{self._path}: B {tuple(found.b.shape)} times A {tuple(found.a.shape)} does not fit "
                f"{name} {tuple(shape)}"
            )
        return found

    def memory(self, name: str) -> Memory:
        """See `Reader`; an adapted weight, what is added to it, and that before it is scaled."""
        below = self._base.memory(name)
        if name not in self._adapter.keys:
            return below
        own = 4 * math.prod(self.meta(name).shape)
        return Memory(own, 3 * own + below.peak)

    def read(self, name: str) -> Tensor:
        """See `Reader`."""
        weight, found = self._base.read(name), self.factors(name)
        if found is None:
            return weight
        change = (found.b.float() @ found.a.float()) * found.scale
        return weight.float() + (change.t() if found.transposed else change)


def open_sources(plan: Plan) -> dict[str, Reader]:
    """A reader for every source of a plan, by id.

    Raises:
        FormatError: A file is damaged, or a delta or adapter names no base.
        FileNotFoundError: There is no such path.
    """
    out: dict[str, Reader] = {}

    def opened(source: Source, above: tuple[str, ...] = ()) -> Reader:
        if source.id in out:
            return out[source.id]
        if source.id in above:
            raise FormatError(f"source {source.id!r} is its own base")
        path = Path(source.path)
        if not path.exists():
            raise FileNotFoundError(2, "no such checkpoint, delta or adapter", str(path))
        if source.kind == "checkpoint":
            out[source.id] = Checkpoint(path)
            return out[source.id]
        if source.base is None:
            raise FormatError(f"source {source.id!r} is a {source.kind}, but names no base")
        base = opened(plan.source(source.base), (*above, source.id))
        is_delta = source.kind == "delta"
        out[source.id] = DeltaReader.load(path, base) if is_delta else AdapterReader(path, base)
        return out[source.id]

    for source in plan.sources:
        opened(source)
    return out
