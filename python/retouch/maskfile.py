"""The file of a mask: one safetensors file with index tensors, or bitmaps where they are smaller.

Metadata of the file: ``format`` ("retouch-mask"), ``format_version``, ``retouch_version``, and
``header``, a JSON object with

* ``selections``: per selected parameter its ``kind``, ``coding`` ("index", "bitmap" or "none") and
  the fingerprint of its tensor,
* ``layout``: shape and dtype of every parameter of the model,
* ``metadata``: config, seed, score, model;

``header_hash`` is the fingerprint of ``header``. A tensor has the name of its parameter: "index" is
int32 or int64; "bitmap" is uint8, bit ``i % 8`` of byte ``i // 8`` (least significant first) for flat
position ``i``. Reading executes no code.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from retouch import ops
from retouch.errors import FormatError, MaskError
from retouch.selection import Selection

FORMAT = "retouch-mask"
FILE = "mask.safetensors"  # its usual name
FORMAT_VERSION = "1"


class Layout(NamedTuple):
    """What is known of a parameter beside its selection.

    Attributes:
        shape: Its shape.
        dtype: Such as "float32"; None if not known.
    """

    shape: tuple[int, ...]
    dtype: str | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype; float32 if it is not known."""
        dtype = getattr(torch, self.dtype or "float32", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32


def write(
    path: str | os.PathLike[str],
    selections: Mapping[str, Selection],
    layout: Mapping[str, Layout],
    metadata: Mapping[str, Any],
) -> None:
    """Writes a mask; the file appears under its name only when it is complete."""
    from retouch._core import __version__

    tensors: dict[str, Tensor] = {}
    rows: dict[str, Any] = {}
    for name, selection in selections.items():
        coding, tensor = _encode(selection)
        rows[name] = {"kind": selection.kind, "coding": coding}
        if tensor is not None:
            tensors[name] = tensor
            rows[name]["hash"] = ops.fingerprint(tensor)
    try:
        header = json.dumps(
            {
                "selections": rows,
                "layout": {name: [list(one.shape), one.dtype] for name, one in layout.items()},
                "metadata": dict(metadata),
            }
        )
    except TypeError as error:
        raise MaskError(f"the metadata of a mask must be JSON-able: {error}") from error
    data = save(
        tensors,
        metadata={
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "retouch_version": __version__,
            "header": header,
            "header_hash": _hash(header),
        },
    )
    target = _file(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Selection], dict[str, Layout], dict[str, Any]]:
    """Selections, layout and metadata of a file.

    Raises:
        FormatError: The file is damaged, no mask, or of an unknown version.
    """
    where = _file(path)
    if not where.is_file():
        raise FileNotFoundError(f"there is no mask at {where}")
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            strings = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise FormatError(f"{where} is damaged or no safetensors file: {error}") from error
    header = _header(where, strings)
    try:
        layout = {
            name: Layout(tuple(int(n) for n in shape), dtype)
            for name, (shape, dtype) in header["layout"].items()
        }
        selections = {
            name: _decode(name, row, layout[name], tensors.pop(name, None))
            for name, row in header["selections"].items()
        }
        metadata = dict(header["metadata"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{where} is damaged: {error}") from error
    if tensors:
        raise FormatError(f"{where} is damaged: it holds the unknown tensors {sorted(tensors)}")
    return selections, layout, metadata


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / FILE if path.is_dir() else path


def _header(where: Path, strings: Mapping[str, str]) -> dict[str, Any]:
    if strings.get("format") != FORMAT:
        raise FormatError(
            f"{where} is no mask: its format is {strings.get('format')!r}, wanted {FORMAT!r}"
        )
    if strings.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{where} is a mask of format version {strings.get('format_version')!r} (written by "
            f"retouch {strings.get('retouch_version')}); this package reads {FORMAT_VERSION!r}"
        )
    text = strings.get("header", "")
    if strings.get("header_hash") != _hash(text):
        raise FormatError(f"{where} is damaged: its header does not match its hash")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{where} is damaged: its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError(f"{where} is damaged: its header is a {type(header).__name__}")
    return header


def _hash(text: str) -> str:
    return ops.fingerprint(torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8))


def _encode(selection: Selection) -> tuple[str, Tensor | None]:
    index = selection.index
    if index is None:
        return "none", None
    if selection.kind == "elements" and selection.numel // 8 < index.numel() * index.itemsize:
        chosen = np.zeros(selection.numel, dtype=bool)
        chosen[index.numpy()] = True
        return "bitmap", torch.from_numpy(np.packbits(chosen, bitorder="little"))
    return "index", index


def _decode(name: str, row: Mapping[str, Any], layout: Layout, tensor: Tensor | None) -> Selection:
    kind, coding = row["kind"], row["coding"]
    if coding == "none":
        if tensor is not None:
            raise FormatError(f"{name} has a tensor and needs none")
        return Selection(kind, layout.shape)
    if tensor is None:
        raise FormatError(f"the tensor of {name} is missing")
    if ops.fingerprint(tensor) != row["hash"]:
        raise FormatError(f"the tensor of {name} does not match its hash")
    if coding == "index":
        return Selection(kind, layout.shape, tensor)
    if coding != "bitmap" or tensor.dtype != torch.uint8 or kind != "elements":
        raise FormatError(f"{name} is coded as {coding!r} of {kind!r} in {tensor.dtype}")
    if tuple(tensor.shape) != (-(-layout.numel // 8),):
        raise FormatError(f"the bitmap of {name} has shape {tuple(tensor.shape)}")
    chosen = np.unpackbits(tensor.numpy(), count=layout.numel, bitorder="little")
    index = torch.from_numpy(np.flatnonzero(chosen)).to(ops.index_dtype(layout.numel))
    return Selection("elements", layout.shape, index)
