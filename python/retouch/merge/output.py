"""What a merge writes: which tensor goes into which file, and the small files beside them."""

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retouch import _core
from retouch.errors import FormatError, HyperparameterError
from retouch.merge.base import Method
from retouch.merge.plan import Input, Plan, TensorPlan
from retouch.merge.sources import Meta, Reader

__all__ = ["Extra", "Result", "Task", "TensorResult", "Writer", "files", "shards", "size"]

_INDEX = "model.safetensors.index.json"
_FLUSH = 1 << 26  # bytes after which the disk begins to work
Extra = Mapping[str, str | bytes | None]


@dataclass
class TensorResult:
    """How one tensor was made; parameters are complete."""

    name: str
    method: str | None
    dialect: str | None
    dtype: str
    shape: tuple[int, ...]
    base: Input | None
    inputs: tuple[Input, ...]
    shared: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What a merge made.

    Attributes:
        out: The folder.
        tensors: How each tensor was made, in the order of names.
        files: Names of all files in the folder.
        notes: Those of the plan.
        seconds: From the first look at the sources to the published folder.
        bytes_read: Size of all tensors that were merged or copied.
        bytes_written: Size of all tensors of the output.
        piece_bytes: Anonymous memory that the largest step was planned with.
    """

    out: Path
    tensors: list[TensorResult] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    piece_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"out": str(self.out)}


@dataclass
class Task:
    """One output tensor, checked."""

    plan: TensorPlan
    method: Method | None
    dialect: str
    parameters: list[dict[str, Any]]
    shared: dict[str, Any]
    metas: list[Meta]
    meta: Meta  # of the output
    file: str = ""

    @property
    def group(self) -> str:
        """The tensors that share statistics of the whole model have one."""
        p = self.plan
        sources = [i.source for i in p.inputs]
        base = None if p.base is None else p.base.source
        return json.dumps([p.method, self.dialect, self.shared, self.parameters, sources, base])


def size(meta: Meta) -> int:
    """Bytes of a tensor."""
    return math.prod(meta.shape) * meta.dtype.itemsize


def shards(tasks: list[Task], limit: int) -> dict[str, list[Task]]:
    """The files of the output and their tensors; each tensor is in the file of its turn."""
    if limit < 1:
        raise HyperparameterError(f"max_shard_size must be at least 1 byte, got {limit}")
    parts: list[list[Task]] = []
    room = 0
    for task in tasks:
        if not parts or size(task.meta) > room:
            parts.append([])
            room = limit
        parts[-1].append(task)
        room -= size(task.meta)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": p for i, p in enumerate(parts, 1)}


class Writer:
    """Writes one piece while the next one is made, and waits for the disk beside both.

    What was written is flushed as soon as it is worth it: the disk has little left to do at the end.
    """

    def __init__(self, sink: "_core.Sink") -> None:
        self.sink = sink
        self._unflushed = 0
        self._puts, self._ends = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._closing: list[Future[None]] = []

    def put(self, file: str, name: str, offset: int, tensor: Tensor) -> None:
        """Hands over a piece, once the one before is written."""
        if self._last is not None:
            self._last.result()
        data = tensor.reshape(-1).view(torch.uint8)
        self._last = self._puts.submit(self.sink.put, file, name, offset, data)
        self._unflushed += data.numel()
        if self._unflushed >= _FLUSH:
            self._unflushed = 0
            self._closing.append(self._ends.submit(self.sink.flush, file))

    def end(self, file: str) -> None:
        """Closes a file."""
        if self._last is not None:
            self._last.result()
        self._unflushed = 0
        self._closing.append(self._ends.submit(self.sink.end, file))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._puts.shutdown(wait=True, cancel_futures=kind is not None)
        self._ends.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for one in self._closing:
                one.result()


def files(
    sink: "_core.Sink",
    plan: Plan,
    readers: Mapping[str, Reader],
    shards: dict[str, list[Task]],
    result: Result,
    extra_files: Extra | Callable[[Result], Extra] | None,
) -> None:
    """Everything beside the tensors."""
    extra = dict((extra_files(result) if callable(extra_files) else extra_files) or {})
    if len(shards) > 1:
        weight_map = {t.plan.name: file for file, members in shards.items() for t in members}
        index = {"metadata": {"total_size": result.bytes_written}, "weight_map": weight_map}
        extra[_INDEX] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    if plan.side_files is not None:
        folder = readers[plan.side_files].folder
        if folder is not None:
            config = _config(folder, shards)
            if config is not None:
                extra.setdefault("config.json", config)
            sink.copy_side_files(folder, sorted(extra))
    for name, content in extra.items():
        if content is None:
            continue
        sink.write(name, content.encode() if isinstance(content, str) else content)


def _config(folder: Path, shards: dict[str, list[Task]]) -> str | None:
    """The model's config with the dtype of the output; None where it needs no change."""
    path = folder / "config.json"
    dtypes = {t.meta.dtype for members in shards.values() for t in members if t.method is not None}
    if not path.is_file() or len(dtypes) != 1:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FormatError(f"{path}: not valid JSON ({e})") from e
    name = str(dtypes.pop()).removeprefix("torch.")
    keys = [k for k in ("dtype", "torch_dtype") if k in config and config[k] != name]
    if not keys:
        return None
    return json.dumps(config | dict.fromkeys(keys, name), indent=2) + "\n"
