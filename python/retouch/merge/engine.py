"""Carries out a plan: tensor by tensor, in bounded memory, complete or not at all."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retouch import _core, ops
from retouch.errors import FormatError, HyperparameterError, LayoutError, ShapeError
from retouch.merge.base import Job, Method, method_named
from retouch.merge.plan import Input, Plan, TensorPlan, natural
from retouch.merge.sources import NAMES, DeltaReader, Meta, Reader, open_sources

__all__ = ["Result", "TensorResult", "run"]

_NATIVE = (torch.float32, torch.float16, torch.bfloat16)
_PIECE = 1 << 25  # elements of a stretch where no budget asks for less
_INDEX = "model.safetensors.index.json"

Extra = Mapping[str, str | bytes | None]
Progress = Callable[[int, int, str], None]


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
class _Task:
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


def run(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_ram: int | None = None,
    progress: Progress | None = None,
    readers: Mapping[str, Reader] | None = None,
    extra_files: Extra | Callable[[Result], Extra] | None = None,
) -> Result:
    """Writes the checkpoint that a plan describes.

    Inputs are read through memory maps. The output is staged in a hidden folder beside `out` and gets
    its name when it is complete; an error or Ctrl-C leaves nothing. The bytes do not depend on the
    number of threads, on how inputs are sharded, on the order of the plan or on `max_ram`.

    Args:
        plan: What to do.
        out: The new folder.
        overwrite: Replace a checkpoint of that name.
        max_ram: Bytes of anonymous memory for tensors; None for no limit. Maps of files are not counted:
            the system takes them back when it needs memory.
        progress: Called with tensors done, tensors in all, and a name.
        readers: By source id, in place of what the plan's paths hold.
        extra_files: Small files by name, written into the folder in place of side files of that name
            (None: no such file); or a function that gets the result (all tensors written, not yet
            published) and returns them.

    Returns:
        What was made and how.

    Raises:
        HyperparameterError: A method, parameter or dtype is unknown or out of range, or `max_ram` is too
            small for a tensor, which is named with the least that would do.
        ShapeError: The inputs of a tensor have different shapes.
        LayoutError: A method is to merge a tensor that is not of floats.
        FormatError: A source is damaged or lacks a tensor.
        ScoreError: A weight is NaN; tensor and model are named.
        BaseMismatchError: A delta met a base that is not its own.
    """
    began = time.perf_counter()
    opened = dict(readers) if readers is not None else {}
    if missing := [s.id for s in plan.sources if s.id not in opened]:
        found = open_sources(plan)
        opened |= {name: found[name] for name in missing}
    tasks = [_check(plan, t, opened) for t in sorted(plan.tensors, key=lambda t: natural(t.name))]
    if not tasks:
        raise FormatError("the plan has no tensors")
    for a, b in pairwise(tasks):
        if a.plan.name == b.plan.name:
            raise FormatError(f"the plan makes {a.plan.name} twice")
    result = Result(Path(out), notes=plan.notes)
    merger = _Merger(plan, opened, max_ram, result)
    rows = [
        merger.rows(task) for task in tasks
    ]  # refuses what does not fit before anything is written
    inputs = sorted({str(p) for r in opened.values() for p in r.paths})
    sink = _core.Sink(result.out, overwrite, inputs)
    try:
        states = merger.survey(tasks)
        shards = _shards(tasks, plan.max_shard_size)
        with _Writer(sink) as writer:
            done = 0
            for file, members in shards.items():
                sink.begin(
                    file, [(t.plan.name, NAMES[t.meta.dtype], list(t.meta.shape)) for t in members]
                )
                for task in members:
                    task.file = file
                    if progress is not None:
                        progress(done, len(tasks), task.plan.name)
                    state = states.get(task.group) if task.method is not None else None
                    merger.make(task, rows[done], state, writer)
                    done += 1
                writer.end(file)
        if progress is not None:
            progress(done, len(tasks), "")
        _files(sink, plan, opened, shards, result, extra_files)
        sink.publish()
    except BaseException:
        sink.discard()
        raise
    result.files = sorted(
        p.relative_to(result.out).as_posix() for p in result.out.rglob("*") if p.is_file()
    )
    result.seconds = time.perf_counter() - began
    return result


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if dtype not in _NATIVE:
        raise HyperparameterError(f"dtype must be one of float32, float16, bfloat16; got {name!r}")
    return dtype  # type: ignore[no-any-return]


def _check(plan: Plan, tensor: TensorPlan, readers: Mapping[str, Reader]) -> _Task:
    def meta(one: Input) -> Meta:
        if one.source not in readers:
            raise FormatError(f"{tensor.name}: the plan has no source {one.source!r}")
        return readers[one.source].meta(one.tensor)

    if not tensor.inputs:
        raise FormatError(f"{tensor.name} has no inputs")
    metas = [meta(one) for one in tensor.inputs]
    if tensor.method is None:
        if len(metas) != 1:
            raise FormatError(f"{tensor.name} is to be copied, but has {len(metas)} inputs")
        return _Task(tensor, None, "", [], {}, metas, metas[0])
    method = method_named(tensor.method)
    wanted = tensor.dialect or (plan.dialect if plan.dialect in method.dialects else None)
    given = [i.parameters for i in tensor.inputs]
    dialect, parameters, shared = method.resolve(wanted, given, tensor.shared, tensor.name)
    least, most = method.models
    if len(metas) < least or (most is not None and len(metas) > most):
        limit = (
            f"{least}"
            if most == least
            else f"at least {least}"
            if most is None
            else f"{least} to {most}"
        )
        raise HyperparameterError(
            f"{tensor.name}: {method.name} merges {limit} models beside the base, got {len(metas)}"
        )
    if (method.base == "required") != (tensor.base is not None) and method.base != "optional":
        word = "needs a base" if tensor.base is None else "takes no base"
        raise HyperparameterError(f"{tensor.name}: {method.name} {word}")
    every = list(tensor.inputs) + ([tensor.base] if tensor.base else [])
    if tensor.base:
        metas.append(meta(tensor.base))
    for one, found in zip(every, metas, strict=True):
        if found.shape != metas[0].shape:
            raise ShapeError(
                f"{tensor.name}: {one.tensor} of {one.source} is {list(found.shape)}, but {every[0].tensor} "
                f"of {every[0].source} is {list(metas[0].shape)}; inputs of one tensor need one shape "
                "(a vocabulary must be aligned first)"
            )
        if not found.dtype.is_floating_point:
            raise LayoutError(
                f"{tensor.name}: {one.tensor} of {one.source} is {found.dtype}; {method.name} merges "
                "floats (a copy, method None, takes any dtype)"
            )
    dtype = _dtype(plan.out_dtype) or _dtype(plan.dtype) or metas[-1 if tensor.base else 0].dtype
    if dtype not in _NATIVE:
        raise LayoutError(
            f"{tensor.name} would be {dtype}: choose out_dtype float32, float16 or bfloat16"
        )
    return _Task(tensor, method, dialect, parameters, shared, metas, Meta(metas[0].shape, dtype))


def _size(meta: Meta) -> int:
    return math.prod(meta.shape) * meta.dtype.itemsize


def _shards(tasks: list[_Task], limit: int) -> dict[str, list[_Task]]:
    """The files of the output and their tensors; each tensor is in the file of its turn."""
    if limit < 1:
        raise HyperparameterError(f"max_shard_size must be at least 1 byte, got {limit}")
    parts: list[list[_Task]] = []
    room = 0
    for task in tasks:
        if not parts or _size(task.meta) > room:
            parts.append([])
            room = limit
        parts[-1].append(task)
        room -= _size(task.meta)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": p for i, p in enumerate(parts, 1)}


class _Writer:
    """Writes one piece while the next one is made, and waits for the disk beside both."""

    def __init__(self, sink: "_core.Sink") -> None:
        self.sink = sink
        self._puts, self._ends = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._closing: list[Future[None]] = []

    def put(self, file: str, name: str, offset: int, tensor: Tensor) -> None:
        """Hands over a piece, once the one before is written."""
        if self._last is not None:
            self._last.result()
        data = tensor.reshape(-1).view(torch.uint8)
        self._last = self._puts.submit(self.sink.put, file, name, offset, data)

    def end(self, file: str) -> None:
        """Closes a file."""
        if self._last is not None:
            self._last.result()
        self._closing.append(self._ends.submit(self.sink.end, file))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._puts.shutdown(wait=True, cancel_futures=kind is not None)
        self._ends.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for one in self._closing:
                one.result()


class _Merger:
    def __init__(
        self, plan: Plan, readers: Mapping[str, Reader], max_ram: int | None, result: Result
    ) -> None:
        self.plan, self.readers, self.max_ram, self.result = plan, readers, max_ram, result
        self.cast = _dtype(plan.dtype)

    def rows(self, task: _Task) -> int:
        """How much of the first dimension is made at a time.

        Raises:
            HyperparameterError: `max_ram` does not allow even one row.
        """
        numel = math.prod(task.meta.shape)
        if task.method is None:
            return -1
        every = [*task.plan.inputs] + ([task.plan.base] if task.plan.base else [])
        held = sum(self._copies(one, meta) for one, meta in zip(every, task.metas, strict=True))

        def needed(elements: int) -> int:
            assert task.method is not None
            models = len(task.plan.inputs)
            own = task.method.memory(elements, models, task.dialect)
            return (
                held + own + 2 * elements * task.meta.dtype.itemsize
            )  # one made, one being written

        first = task.meta.shape[0] if task.meta.shape else 1
        row = numel // max(first, 1)
        limit = math.inf if self.max_ram is None else self.max_ram
        rows = max(first, 1)
        if task.method.pieces:
            rows = min(rows, max(1, _PIECE // max(row, 1)))
            while rows > 1 and needed(rows * row) > limit:
                rows = (rows + 1) // 2
        elements = rows * row
        if needed(elements) > limit:
            what = "one row" if task.method.pieces else "the whole tensor"
            raise HyperparameterError(
                f"max_ram is {self.max_ram:,} bytes, but {what} of {task.plan.name} needs "
                f"{needed(elements):,} with {task.method.name}"
            )
        self.result.piece_bytes = max(self.result.piece_bytes, needed(elements))
        return rows

    def _copies(self, one: Input, meta: Meta) -> int:
        """Bytes of what `read` must hold beside maps of files."""
        numel = math.prod(meta.shape)
        reader = self.readers[one.source]
        held = 0
        if isinstance(reader, DeltaReader):
            held += _size(meta)
        elif one.tensor in getattr(reader, "_modules", {}):
            held += 2 * 4 * numel
        if self.cast is not None and meta.dtype != self.cast:
            held += numel * self.cast.itemsize
        elif self.cast is None and meta.dtype not in _NATIVE:
            held += numel * 4
        return held

    def read(self, one: Input) -> Tensor:
        """A tensor as methods take it."""
        tensor = self.readers[one.source].read(one.tensor).detach()
        if self.cast is not None:
            tensor = tensor.to(self.cast)
        elif tensor.dtype not in _NATIVE:
            tensor = tensor.to(torch.float32)
        return tensor.contiguous()

    def job(self, task: _Task, state: Any = None) -> Job:
        """The whole tensor as a job."""
        plan = task.plan
        return Job(
            plan.name, None if plan.base is None else self.read(plan.base),
            [self.read(one) for one in plan.inputs], [one.source for one in plan.inputs],
            task.parameters, task.shared, task.dialect, self.plan.seed, task.meta.dtype, state,
        )  # fmt: skip

    def survey(self, tasks: list[_Task]) -> dict[str, Any]:
        """The passes over the whole model of the methods that need them; their states by group."""
        groups: dict[str, list[_Task]] = {}
        for task in tasks:
            if task.method is not None and task.method.global_scope(task.dialect):
                groups.setdefault(task.group, []).append(task)
        heads: dict[str, str] = {}
        for key, members in groups.items():
            head = json.dumps([members[0].plan.method, members[0].dialect])
            if head in heads and heads[head] != key:
                raise HyperparameterError(
                    f"{members[0].plan.name}: {members[0].plan.method} ({members[0].dialect}) has statistics "
                    "of the whole model, so models and parameters must be the same for all tensors"
                )
            heads[head] = key
        states = {}
        for key, members in groups.items():
            method = members[0].method
            assert method is not None
            state = method.begin(self.job(members[0]))
            while True:
                for task in members:
                    method.observe(self.job(task, state))
                if not method.settle(state):
                    break
            states[key] = state
        return states

    def make(self, task: _Task, rows: int, state: Any, writer: _Writer) -> None:
        """Makes one tensor and hands it to the writer."""
        plan, result = task.plan, self.result
        result.bytes_read += sum(_size(m) for m in task.metas)
        result.bytes_written += _size(task.meta)
        inputs = plan.inputs
        if task.parameters:
            pairs = zip(plan.inputs, task.parameters, strict=True)
            inputs = tuple(Input(i.source, i.tensor, p) for i, p in pairs)
        dialect = task.dialect or None
        report = TensorResult(
            plan.name, plan.method, dialect, ops.dtype_name(task.meta.dtype), task.meta.shape, plan.base,
            inputs, task.shared,
        )  # fmt: skip
        result.tensors.append(report)
        if task.method is None:
            one = plan.inputs[0]
            tensor = self.readers[one.source].read(one.tensor).detach().contiguous()
            writer.put(task.file, plan.name, 0, tensor)
            return
        if (whole := self._on_supports(task, report)) is not None:
            writer.put(task.file, plan.name, 0, whole)
            return
        job = self.job(task, state)
        job.notes = report.notes
        job.local = task.method.prepare(job)
        first = task.meta.shape[0] if task.meta.shape else 1
        if rows >= first or rows < 1:
            writer.put(task.file, plan.name, 0, _checked(task, task.method.merge(job)))
            return
        width = _size(task.meta) // first
        for at in range(0, first, rows):
            piece = job.piece(at, min(at + rows, first))
            writer.put(
                task.file, plan.name, at * width, _checked(task, task.method.merge(piece), piece)
            )

    def _on_supports(self, task: _Task, report: TensorResult) -> Tensor | None:
        """The merge of sparse deltas of one base where any of them differs from it; None if not so."""
        base, method = task.plan.base, task.method
        if base is None or method is None or not method.fixes_base or self.cast is not None:
            return None
        parts = []
        for one in task.plan.inputs:
            reader = self.readers[one.source]
            if not isinstance(reader, DeltaReader) or one.tensor != base.tensor:
                return None
            if reader.base is not self.readers[base.source]:
                return None
            parts.append(reader.sparse(one.tensor))
        numel = math.prod(task.meta.shape)
        if numel == 0 or any(p is None or p.base.dtype not in _NATIVE for p in parts):
            return None
        found = [p for p in parts if p is not None]
        if sum(p.positions.numel() for p in found) > numel // 4:
            return None
        union = torch.empty(0, dtype=ops.index_dtype(numel))
        for p in found:
            union = ops.union(union, p.positions.to(union.dtype))
        whole = self.read(base)
        there = ops.take(whole, union, base.tensor)
        tensors = []
        for p in found:
            values = there.clone()
            values[torch.searchsorted(union, p.positions.to(union.dtype))] = p.values
            tensors.append(values)
        names = [one.source for one in task.plan.inputs]
        job = Job(
            task.plan.name, there, tensors, names, task.parameters, task.shared, task.dialect,
            self.plan.seed, task.meta.dtype, notes=report.notes,
        )  # fmt: skip
        job.note("merged_on_supports", union.numel())
        out = whole.to(task.meta.dtype, copy=True).reshape(-1)
        ops.put_(out, union, method.merge(job), task.plan.name)
        return out.view(task.meta.shape)


def _checked(task: _Task, tensor: Tensor, piece: Job | None = None) -> Tensor:
    """Refuses what a method should not have returned: the output's header is written already."""
    shape = task.meta.shape if piece is None else tuple(piece.tensors[0].shape)
    if tensor.dtype != task.meta.dtype or tuple(tensor.shape) != shape:
        raise ShapeError(
            f"{task.plan.method} made {tensor.dtype} {list(tensor.shape)} of {task.plan.name}, expected "
            f"{task.meta.dtype} {list(shape)}"
        )
    return tensor.contiguous()


def _files(
    sink: "_core.Sink",
    plan: Plan,
    readers: Mapping[str, Reader],
    shards: dict[str, list[_Task]],
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


def _config(folder: Path, shards: dict[str, list[_Task]]) -> str | None:
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
