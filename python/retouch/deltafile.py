"""The files of a delta: `delta.safetensors` and `delta_config.json`, format version 1.

Per changed tensor: `<name>.val` (new values, the tensor's dtype), `<name>.idx` (flat positions: U16
gaps, the first position and then each distance minus one, or I32/I64 positions where a gap does not
fit), `<name>.old` (old values) if reversible; whole tensors under `<name>`. The config says for each
tensor kind, dtype, shape, count, coding and both fingerprints. `retouch diff` writes the same.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retouch import ops
from retouch._core import __version__
from retouch.errors import FormatError

if TYPE_CHECKING:
    from retouch.delta import Delta, Entry

FORMAT, VERSION = "retouch-delta", 1
CONFIG, TENSORS = "delta_config.json", "delta.safetensors"
_KINDS = ("sparse-replace", "dense", "added", "removed")


def encode(index: Tensor) -> tuple[str, Tensor]:
    """Positions as they are stored: the name of the coding, and the tensor."""
    at = index.cpu().numpy()
    gaps = np.diff(at, prepend=-1) - 1
    if at.size == 0 or int(gaps.max()) < 2**16:
        return "gap16", torch.from_numpy(gaps.astype(np.uint16))
    return ("i32" if index.dtype == torch.int32 else "i64"), index.cpu()


def decode(coding: str, stored: Tensor, numel: int) -> Tensor:
    """The positions; raises ValueError if they are not ascending, unique and below `numel`."""
    if coding == "gap16":
        if stored.dtype != torch.uint16:
            raise ValueError(f"gaps are {stored.dtype}, expected uint16")
        at = np.cumsum(stored.numpy().astype(np.int64) + 1) - 1
    elif coding in ("i32", "i64") and stored.dtype in (torch.int32, torch.int64):
        at = stored.numpy().astype(np.int64)
    else:
        raise ValueError(f"unknown index coding {coding!r} of {stored.dtype}")
    if at.size and (at[0] < 0 or at[-1] >= numel or bool((np.diff(at) <= 0).any())):
        raise ValueError("positions are not ascending, unique and inside of the tensor")
    return torch.from_numpy(at).to(ops.index_dtype(numel))


def save(folder: Path, delta: "Delta", *, reversible: bool) -> None:
    """See `Delta.save_pretrained`."""
    tensors: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, e in delta.items():
        row: dict[str, Any] = {
            "kind": e.kind, "dtype": ops.dtype_name(e.dtype), "shape": list(e.shape),
            "count": e.count, "base_hash": e.base_hash, "result_hash": e.result_hash,
        }  # fmt: skip
        if e.index is not None:
            assert e.value is not None
            row["index_encoding"], tensors[f"{name}.idx"] = encode(e.index)
            tensors[f"{name}.val"] = e.value.detach().cpu().contiguous()
        elif e.value is not None:
            tensors[name] = e.value.detach().cpu().contiguous()
        if reversible and e.kind != "added":
            if e.old is None:
                raise FormatError(f"the old values of {name} are not known: reversible=False")
            tensors[f"{name}.old"] = e.old.detach().cpu().contiguous()
        rows[name] = row
    config = {
        "format": FORMAT, "format_version": VERSION, "retouch_version": __version__,
        "base_model": delta.base_model, "metadata": delta.metadata, "reversible": reversible,
        "tensors": rows, "aliases": delta.aliases,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    _atomic(folder / TENSORS, lambda p: save_file(tensors, p, {"format": "pt"}))
    text = json.dumps(config, indent=1, sort_keys=True)
    _atomic(folder / CONFIG, lambda p: p.write_text(text, encoding="utf-8"))


def _atomic(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes through a temporary file of the same folder."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, target)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"{target}: {e}") from e
        raise


def load(folder: Path) -> tuple[dict[str, "Entry"], dict[str, Any]]:
    """The entries and the config of a delta folder."""
    config = read_config(folder)
    path = folder / TENSORS
    entries: dict[str, Entry] = {}
    try:
        with safe_open(path, "pt") as f:
            stored = set(f.keys())
            for name, row in config["tensors"].items():
                entries[name] = _entry(name, row, f, stored)
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise FormatError(f"{path}: damaged or truncated delta ({e})") from e
    return entries, config


def read_config(folder: Path) -> dict[str, Any]:
    """`delta_config.json`, checked for format and version."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no delta at {folder}: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FormatError(f"{path}: not a JSON file ({e})") from e
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{path}: this is not a retouch delta")
    if config.get("format_version") != VERSION:
        raise FormatError(
            f"{path}: delta format version {config.get('format_version')!r}; this retouch "
            f"({__version__}) reads version {VERSION}: update retouch"
        )
    if not isinstance(config.get("tensors"), dict):
        raise FormatError(f"{path}: it lists no tensors")
    return config


def _entry(name: str, row: Mapping[str, Any], file: Any, stored: set[str]) -> "Entry":
    from retouch.delta import Entry

    kind, shape = row["kind"], tuple(int(n) for n in row["shape"])
    if kind not in _KINDS:
        raise ValueError(f"{name} has the unknown kind {kind!r}")
    dtype = {v: k for k, v in ops._DTYPE_NAMES.items()}[row["dtype"]]
    numel = torch.Size(shape).numel()
    index = value = None
    if kind == "sparse-replace":
        index = decode(row["index_encoding"], file.get_tensor(f"{name}.idx"), numel)
        value = file.get_tensor(f"{name}.val")
        if value.shape != index.shape or value.numel() != int(row["count"]):
            raise ValueError(f"{name} has {index.numel()} positions and {value.numel()} values")
    elif kind != "removed":
        value = file.get_tensor(name)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    old = file.get_tensor(f"{name}.old") if f"{name}.old" in stored else None
    for part in (value, old):
        if part is not None and part.dtype != dtype:
            raise ValueError(f"{name} holds {part.dtype}, expected {dtype}")
    if old is not None and value is not None and old.numel() != value.numel():
        raise ValueError(f"{name} has {old.numel()} old and {value.numel()} new values")
    return Entry(
        kind, shape, dtype, index, value, old, row.get("base_hash"), row.get("result_hash")
    )
