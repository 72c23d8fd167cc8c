"""The files of a delta: `delta.safetensors` and `delta_config.json`, format version 1 or 2.

Per changed tensor: `<name>.val` (new values, the tensor's dtype), `<name>.idx` (flat positions: U16
gaps, the first position and then each distance minus one, or I32/I64 positions where a gap does not
fit), `<name>.old` (old values) if reversible; whole tensors under `<name>`. The config says for each
tensor kind, dtype, shape, count, coding and both fingerprints. `retouch diff` writes the same.

Version 2 is written only for compressed deltas, whose values are added to the base: kinds "sparse-add"
(with `<name>.idx`), "dense-add" and "low-rank". The config then also says `coding`, `block` and `error`;
the tensors `<name>.add`, `.bits`, `.codes`, `.scale`, `.A` and `.B` are those of `deltachange.Change`.
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retouch import ops
from retouch._core import __version__
from retouch.deltachange import PARTS, Change
from retouch.deltaentry import Entry
from retouch.errors import FormatError

if TYPE_CHECKING:
    from retouch.delta import Delta

FORMAT, VERSIONS = "retouch-delta", (1, 2)
CONFIG, TENSORS = "delta_config.json", "delta.safetensors"
_EXACT = ("sparse-replace", "dense", "added", "removed")
_ADDING = ("sparse-add", "dense-add", "low-rank")


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

    def store(key: str, tensor: Tensor) -> None:
        if key in tensors:
            raise FormatError(f"{folder / TENSORS}: two tensors would be named {key}")
        tensors[key] = tensor.detach().cpu().contiguous()

    for name, e in delta.items():
        row: dict[str, Any] = {
            "kind": e.kind, "dtype": ops.dtype_name(e.dtype), "shape": list(e.shape),
            "count": e.count, "base_hash": e.base_hash, "result_hash": e.result_hash,
        }  # fmt: skip
        if e.index is not None:
            row["index_encoding"], index = encode(e.index)
            store(f"{name}.idx", index)
        if e.change is not None:
            row |= {"coding": e.change.coding, "block": e.change.block, "error": e.error}
            for part, tensor in e.change.parts.items():
                store(f"{name}.{part}", tensor)
        elif e.index is not None:
            assert e.value is not None
            store(f"{name}.val", e.value)
        elif e.value is not None:
            store(name, e.value)
        if reversible and e.kind != "added":
            if e.old is None:
                raise FormatError(f"the old values of {name} are not known: reversible=False")
            store(f"{name}.old", e.old)
        rows[name] = row
    # older readers refuse what they do not know, and read the rest
    version = 2 if any(e.change is not None for e in delta.values()) else 1
    config = {
        "format": FORMAT, "format_version": version, "retouch_version": __version__,
        "base_model": delta.base_model, "metadata": delta.metadata, "reversible": reversible,
        "tensors": rows, "aliases": delta.aliases,
    }  # fmt: skip
    text = json.dumps(config, indent=1, sort_keys=True)
    made = _make(folder)
    try:
        _write_both(folder, tensors, text)
    except BaseException:
        for one in made:
            with contextlib.suppress(OSError):  # somebody else put something in it
                one.rmdir()
        raise


def _make(folder: Path) -> list[Path]:
    """Makes a folder and its parents; those that were not there, innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _write_both(folder: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Writes both files, or neither: a folder without config is no delta.

    The config goes first and comes last, so that it never stands beside the tensors of another delta.
    """
    parts: list[Path] = []
    try:
        parts += [_temporary(folder / TENSORS)]
        parts += [_temporary(folder / CONFIG)]
        save_file(tensors, parts[0], {"format": "pt"})
        parts[1].write_text(text, encoding="utf-8")
        for part in parts:
            with part.open("rb") as f:
                os.fsync(f.fileno())
        (folder / CONFIG).unlink(missing_ok=True)
        for part, name in zip(parts, (TENSORS, CONFIG), strict=True):
            os.replace(part, folder / name)
    except SafetensorError as e:  # how safetensors reports a full disk
        raise OSError(f"{folder / TENSORS}: {e}") from e
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    """A new empty file beside the target, with the permissions of an ordinary one."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    path.open("xb").close()
    return path


def load(folder: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The entries and the config of a delta folder."""
    config = read_config(folder)
    path = folder / TENSORS
    entries: dict[str, Entry] = {}
    try:
        with safe_open(path, "pt") as f:
            stored = set(f.keys())
            for name, row in config["tensors"].items():
                entries[name] = _entry(name, row, f, stored)
        if unknown := stored - {k for n, e in entries.items() for k in _keys(n, e)}:
            raise ValueError(f"{CONFIG} does not tell of {min(unknown)}")
    except OSError:
        raise
    except (
        SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError,
    ) as e:  # fmt: skip
        raise FormatError(f"{path}: damaged or truncated delta ({e})") from e
    return entries, config


def _keys(name: str, entry: Entry) -> list[str]:
    """The tensors of the file that belong to an entry."""
    keys = [f"{name}.old"] if entry.old is not None else []
    if entry.index is not None:
        keys.append(f"{name}.idx")
    if entry.change is not None:
        return [*keys, *(f"{name}.{part}" for part in entry.change.parts)]
    if entry.index is not None:
        return [*keys, f"{name}.val"]
    return [*keys, name] if entry.value is not None else keys


def read_config(folder: Path) -> dict[str, Any]:
    """`delta_config.json`, checked for format and version."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no delta at {folder}: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: not a JSON file ({e})") from e
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{path}: this is not a retouch delta")
    if config.get("format_version") not in VERSIONS:
        raise FormatError(
            f"{path}: delta format version {config.get('format_version')!r}; this retouch "
            f"({__version__}) reads versions 1 and 2: update retouch"
        )
    tensors, aliases = config.get("tensors"), config.get("aliases") or {}
    if not isinstance(tensors, dict):
        raise FormatError(f"{path}: it lists no tensors")
    if not isinstance(aliases, dict):
        raise FormatError(f"{path}: aliases must be names, got {aliases!r}")
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            raise FormatError(f"{path}: alias {alias} is not valid")
    base, metadata = config.get("base_model"), config.get("metadata") or {}
    if not isinstance(base, str | None) or not isinstance(metadata, dict):
        raise FormatError(f"{path}: base_model must be text and metadata a dictionary")
    return config


def _entry(name: str, row: Mapping[str, Any], file: Any, stored: set[str]) -> Entry:
    kind, shape = row["kind"], tuple(row["shape"])
    if kind not in _EXACT + _ADDING:
        raise ValueError(f"{name} has the unknown kind {kind!r}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has the shape {row['shape']!r}")
    hashes = row.get("base_hash"), row.get("result_hash")
    if not all(isinstance(h, str | None) for h in hashes):
        raise ValueError(f"{name} has a fingerprint that is no text")
    dtype = {v: k for k, v in ops._DTYPE_NAMES.items()}[row["dtype"]]
    numel = math.prod(shape)
    index = value = change = None
    if kind in ("sparse-replace", "sparse-add"):
        index = decode(row["index_encoding"], file.get_tensor(f"{name}.idx"), numel)
    if kind in _ADDING:
        count = numel if index is None else index.numel()
        if (kind == "low-rank") != (row["coding"] == "low-rank") or count != row["count"]:
            raise ValueError(f"{name} is {kind} of {row['count']} values as {row['coding']!r}")
        if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: nothing can be added to {dtype}")
        if hashes[0] is None:
            raise ValueError(f"{name} is added to the base, but has no fingerprint of it")
        parts = {part: file.get_tensor(f"{name}.{part}") for part in PARTS[row["coding"]]}
        change = Change(row["coding"], count, parts, row["block"])
        change.check(shape)
    elif index is not None:
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
    error = row.get("error")
    entry = Entry(kind, shape, dtype, index, value, old, *hashes, change, error)
    if old is not None and kind != "removed" and old.numel() != entry.count:
        raise ValueError(f"{name} has {old.numel()} old and {entry.count} new values")
    return entry
