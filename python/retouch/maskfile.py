"""The file of a mask: one safetensors file, index tensors or bitmaps, a JSON header.

Header entry `retouch`: {"format": "retouch-mask", "format_version": 1, "parameters": {name: {"kind",
"shape", "coding"}}, ...}. Positions are stored as they are (`coding` "index"), or as a bitmap of one
bit per unit, lowest bit first (`coding` "bitmap"), where that is smaller.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retouch._core import __version__
from retouch.errors import FormatError

FORMAT, VERSION = "retouch-mask", 1
FILE = "mask.safetensors"
Entry = tuple[Any, tuple[int, ...], Tensor | None]  # kind, shape, index


def damaged(path: Path, why: str) -> FormatError:
    """The error for a file that cannot be a mask."""
    return FormatError(f"{path}: {why}")


def _units(kind: str, shape: tuple[int, ...]) -> int:
    return shape[0] if kind == "rows" else shape[1] if kind == "columns" else math.prod(shape)


def save(path: Path, entries: Mapping[str, Entry], extra: dict[str, Any]) -> None:
    """Writes `path` (or `path`/mask.safetensors) through a temporary file."""
    target = path / FILE if path.is_dir() else path
    tensors, parameters = {}, {}
    for name, (kind, shape, index) in entries.items():
        coding = None
        if index is not None:
            units = _units(kind, shape)
            coding = "bitmap" if units < 8 * index.numel() * index.element_size() else "index"
            if coding == "bitmap":
                bits = np.zeros(units, dtype=np.uint8)
                bits[index.numpy()] = 1
                tensors[name] = torch.from_numpy(np.packbits(bits, bitorder="little"))
            else:
                tensors[name] = index
        parameters[name] = {"kind": kind, "shape": list(shape), "coding": coding}
    header = {
        "format": FORMAT, "format_version": VERSION, "retouch_version": __version__,
        "parameters": parameters, **extra,
    }  # fmt: skip
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, {"retouch": json.dumps(header, sort_keys=True)})
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(e, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"{target}: {e}") from e
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Reads what `save` wrote: entries, and the extra header fields."""
    target = path / FILE if path.is_dir() else path
    if not target.is_file():
        raise FileNotFoundError(f"no mask at {target}")
    try:
        with safe_open(target, "pt") as f:
            header = json.loads((f.metadata() or {}).get("retouch", "{}"))
            if header.get("format") != FORMAT:
                raise damaged(target, "this is not a retouch mask")
            if header.get("format_version") != VERSION:
                raise damaged(
                    target,
                    f"mask format version {header.get('format_version')!r}; this retouch "
                    f"({__version__}) reads version {VERSION}: update retouch",
                )
            entries: dict[str, Entry] = {}
            for name, row in header["parameters"].items():
                shape = tuple(int(n) for n in row["shape"])
                index = None
                if row["coding"] is not None:
                    index = f.get_tensor(name)
                    if row["coding"] == "bitmap":
                        units = _units(row["kind"], shape)
                        if index.dtype != torch.uint8 or index.numel() != (units + 7) // 8:
                            raise damaged(target, f"the bitmap of {name} does not fit its shape")
                        bits = np.unpackbits(index.numpy(), bitorder="little")
                        if bits[units:].any():
                            raise damaged(target, f"the bitmap of {name} has bits beyond its end")
                        index = torch.from_numpy(np.flatnonzero(bits[:units]))
                entries[name] = (row["kind"], shape, index)
            return entries, {"numel": int(header["numel"]), "metadata": dict(header["metadata"])}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        if isinstance(e, FormatError):
            raise
        raise damaged(target, f"damaged or truncated mask file ({e})") from e
