"""What a delta is made of: the tensors of checkpoints, models and state dicts, read one by one."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from retouch import ops
from retouch.errors import EngineError, FormatError, ShapeError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

Key = tuple[Any, ...]


def named(target: "nn.Module | Mapping[str, Tensor]") -> dict[str, Tensor]:
    """The tensors of a model or state dict, themselves; in a state dict, those that are tensors.

    Raises:
        EngineError: It is neither.
    """
    if isinstance(target, nn.Module):
        state: Mapping[str, Any] = target.state_dict(keep_vars=True)
    elif isinstance(target, Mapping):
        state = target
    else:
        raise EngineError(f"wanted a model or a state dict, got {type(target).__name__}")
    return {n: t for n, t in state.items() if isinstance(t, Tensor)}


def memory(tensor: Tensor) -> Key:
    """The same for two tensors that are the same memory seen the same way (tied weights)."""
    if tensor.numel() and tensor.layout == torch.strided and not tensor.is_meta:
        at = tensor.data_ptr()
        return (tensor.device, at, tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (id(tensor),)


class Source:
    """Tensors by name.

    Attributes:
        read: By name, a function that returns the tensor.
        names: Of every tensor the first name, to all its names (several if it is tied).
        id: Name or path of the model, None if it has none.
    """

    def __init__(self, source: Any) -> None:
        if isinstance(source, str | os.PathLike):
            self.read = _checkpoint(Path(source))
            self.names = {name: [name] for name in self.read}
            self.id: str | None = str(source)
            return
        if not isinstance(source, nn.Module | Mapping):
            raise EngineError(
                f"wanted a checkpoint path, a model or a state dict, got {type(source).__name__}"
            )
        tensors = named(source)
        self.read = {n: partial(_itself, t) for n, t in tensors.items()}
        first: dict[Key, str] = {}
        self.names = {}
        for name, tensor in tensors.items():
            self.names.setdefault(first.setdefault(memory(tensor), name), []).append(name)
        found = getattr(getattr(source, "config", None), "_name_or_path", None)
        self.id = str(found) if found else None

    def __contains__(self, name: str) -> bool:
        return name in self.read

    def tied(self, a: str, b: str) -> bool:
        """Whether two names are of one tensor here."""
        return any(a in names and b in names for names in self.names.values())

    def aliases(self) -> dict[str, str]:
        """The further names of tied tensors, to the first."""
        return {n: first for first, names in self.names.items() for n in names if n != first}


def check_ties(base: Source, tuned: Source) -> None:
    """Refuses to part what the base ties: one memory cannot take two changes."""
    for first, names in base.names.items():
        for other in names[1:]:
            if first not in tuned or other not in tuned or tuned.tied(first, other):
                continue
            a, b = tuned.read[first](), tuned.read[other]()
            if a.shape != b.shape or a.dtype != b.dtype or ops.diff(a, b, other).numel():
                raise ShapeError(
                    f"{first} and {other} are one tensor in the base, but differ in the tuned "
                    "model: untie them in the base first (clone one of the two)"
                )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint, by the rule of `retouch diff`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    if (path / _INDEX).is_file():
        try:
            shards = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted({str(s) for s in shards})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise FormatError(f"{path / _INDEX}: damaged, it has no weight_map ({e})") from e
        if outside := [n for n in names if Path(n).name != n]:
            raise FormatError(f"{path / _INDEX}: {outside[0]} is no file of this folder")
        return [path / name for name in names]
    if (path / "delta_config.json").is_file():
        raise FormatError(f"{path}: this is a delta; a checkpoint was expected")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{path}: no .safetensors file in this folder")
    return files


def _checkpoint(path: Path) -> dict[str, Callable[[], Tensor]]:
    out: dict[str, Callable[[], Tensor]] = {}
    for file in _files(path):
        try:
            opened: Any = safe_open(file, "pt")
            names = list(opened.keys())
        except SafetensorError as e:
            raise FormatError(f"{file}: damaged or truncated ({e})") from e
        for name in names:
            if name in out:
                raise FormatError(f"{file}: {name} is in another file of this folder too")
            out[name] = partial(opened.get_tensor, name)
    return out
