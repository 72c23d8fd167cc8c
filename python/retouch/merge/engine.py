"""Carries out a plan: tensor by tensor, in bounded memory, complete or not at all."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retouch import _core, ops
from retouch.errors import FormatError, HyperparameterError, LayoutError, ShapeError
from retouch.merge.base import Job, method_named
from retouch.merge.factormethods import FactorMethod, matched
from retouch.merge.output import Extra, Result, Task, TensorResult, Writer, files, shards, size
from retouch.merge.plan import Input, Plan, TensorPlan, natural
from retouch.merge.sources import (
    NAMES,
    AdapterReader,
    DeltaReader,
    Factors,
    Meta,
    Reader,
    open_sources,
)

__all__ = ["Result", "TensorResult", "collect", "run"]

_NATIVE = (torch.float32, torch.float16, torch.bfloat16)
_PIECE = 1 << 25  # elements of a stretch where no budget asks for less

Progress = Callable[[int, int, str], None]


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
        max_ram: Bytes of anonymous memory for tensors, in the merge and in the passes over the whole model
            before it; None for no limit. Maps of files are not counted: the system takes them back when
            it needs memory. Nor is what opened deltas hold.
        progress: Called with tensors done, tensors in all, and a name.
        readers: By source id, in place of what the plan's paths hold.
        extra_files: Small files by name, written into the folder in place of side files of that name
            (None: no such file); or a function that gets the result (all tensors written, not yet
            published) and returns them.

    Returns:
        What was made and how.

    Raises:
        HyperparameterError: A method, parameter or dtype is unknown or out of range, or `max_ram` is too
            small: the tensor that needs most is named, with the least that would do.
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
    tasks = _tasks(plan, opened)
    result = Result(Path(out), notes=plan.notes)
    merger = _Merger(plan, opened, max_ram, result)
    rows, looks = merger.budget(tasks)  # refuses what does not fit before anything is written
    inputs = sorted({str(p) for r in opened.values() for p in r.paths})
    sink = _core.Sink(result.out, overwrite, inputs)
    try:
        states = merger.survey(tasks, looks)
        parts = shards(tasks, plan.max_shard_size)
        with Writer(sink) as writer:
            done = 0
            for file, members in parts.items():
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
        files(sink, plan, opened, parts, result, extra_files)
        sink.publish()
    except BaseException:
        sink.discard()
        raise
    result.files = sorted(
        p.relative_to(result.out).as_posix() for p in result.out.rglob("*") if p.is_file()
    )
    result.seconds = time.perf_counter() - began
    return result


def collect(plan: Plan, readers: Mapping[str, Reader]) -> dict[str, Tensor]:
    """The tensors that a plan describes, in memory, on the CPU; none of them is one of the inputs.

    Args:
        plan: What to do.
        readers: By source id.

    Returns:
        By name, in the order of the names.

    Raises:
        RetouchError: See `run`.
    """
    tasks = _tasks(plan, readers)
    merger = _Merger(plan, readers, None, Result(Path(), notes=plan.notes))
    rows, looks = merger.budget(tasks)
    states = merger.survey(tasks, looks)
    made = _Collected(tasks)
    for task, step in zip(tasks, rows, strict=True):
        merger.make(task, step, states.get(task.group) if task.method is not None else None, made)
    return made.tensors


class _Collected:
    """Takes what a `Writer` takes."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._metas = {task.plan.name: task.meta for task in tasks}

    def put(self, file: str, name: str, offset: int, tensor: Tensor) -> None:
        """Copies a piece: a method may have returned one of its inputs."""
        if name not in self.tensors:
            shape, dtype = self._metas[name]
            self.tensors[name] = torch.empty(shape, dtype=dtype)
        at = offset // tensor.element_size()
        self.tensors[name].view(-1)[at : at + tensor.numel()] = tensor.reshape(-1)


def _tasks(plan: Plan, readers: Mapping[str, Reader]) -> list[Task]:
    """What is to be made, checked, in the order of the names."""
    tasks = [_check(plan, t, readers) for t in sorted(plan.tensors, key=lambda t: natural(t.name))]
    if not tasks:
        raise FormatError("the plan has no tensors")
    for a, b in pairwise(tasks):
        if a.plan.name == b.plan.name:
            raise FormatError(f"the plan makes {a.plan.name} twice")
    return tasks


class _Fit(NamedTuple):
    """How a tensor is taken: so many rows at a time, with so many bytes."""

    rows: int
    bytes: int
    what: str
    task: Task


def _first(task: Task) -> int:
    """The first dimension, along which tensors are cut."""
    return task.meta.shape[0] if task.meta.shape else 1


def _surveyed(task: Task) -> bool:
    """Whether its method makes passes over the whole model first."""
    return task.method is not None and task.method.global_scope(task.dialect)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if dtype not in _NATIVE:
        raise HyperparameterError(f"dtype must be one of float32, float16, bfloat16; got {name!r}")
    return dtype  # type: ignore[no-any-return]


def _check(plan: Plan, tensor: TensorPlan, readers: Mapping[str, Reader]) -> Task:
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
        return Task(tensor, None, "", [], {}, metas, metas[0])
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
    return Task(tensor, method, dialect, parameters, shared, metas, Meta(metas[0].shape, dtype))


class _Merger:
    def __init__(
        self, plan: Plan, readers: Mapping[str, Reader], max_ram: int | None, result: Result
    ) -> None:
        self.plan, self.readers, self.max_ram, self.result = plan, readers, max_ram, result
        self.cast = _dtype(plan.dtype)

    def budget(self, tasks: list[Task]) -> tuple[list[int], dict[str, int]]:
        """How much of the first dimension of each tensor is taken at a time.

        Returns:
            For the merge, of each task (-1: all, a copy); for the passes over the whole model, by the
            name of the tensor.

        Raises:
            HyperparameterError: `max_ram` does not allow even the smallest pieces.
        """
        groups = Counter(t.group for t in tasks if _surveyed(t))
        rows, looks = [], {}
        fits = []
        for task in tasks:
            held, reading = self._reading(task)
            models, method, dialect = len(task.plan.inputs), task.method, task.dialect
            if method is None:
                # a copy that is no map of a file: it is written while the next tensor is made
                fits.append(_Fit(-1, reading, "a copy of the whole tensor", task))
                rows.append(-1)
                continue
            result = 2 * task.meta.dtype.itemsize  # one made, one being written
            fit = self._fit(
                task, method.pieces, "",
                lambda n: max(reading, held + method.memory(n, models, dialect) + n * result),  # noqa: B023
            )  # fmt: skip
            rows.append(fit.rows)
            fits.append(fit)
            if _surveyed(task):
                kept = method.state_memory(models, groups[task.group])
                fit = self._fit(
                    task, method.observes_pieces, ", in a pass over the whole model",
                    lambda n: kept + max(reading, held + method.survey_memory(n, models, dialect)),  # noqa: B023
                )  # fmt: skip
                looks[task.plan.name] = fit.rows
                fits.append(fit)
        most = max(fits, key=lambda fit: fit.bytes)
        if self.max_ram is not None and most.bytes > self.max_ram:
            by = "" if most.task.method is None else f" with {most.task.method.name}"
            raise HyperparameterError(
                f"max_ram is {self.max_ram:,} bytes, but {most.what} of {most.task.plan.name} needs "
                f"{most.bytes:,}{by}: that is the least for this merge"
            )
        self.result.piece_bytes = most.bytes
        return rows, looks

    def _fit(self, task: Task, pieces: bool, where: str, needed: Callable[[int], int]) -> "_Fit":
        """The most rows that the budget allows, the fewest where it allows none."""
        first = max(_first(task), 1)
        row = math.prod(task.meta.shape) // first
        limit = math.inf if self.max_ram is None else self.max_ram
        rows = first
        if pieces:
            rows = min(rows, max(1, _PIECE // max(row, 1)))
            while rows > 1 and needed(rows * row) > limit:
                rows = (rows + 1) // 2
        what = ("one row" if pieces else "the whole tensor") + where
        return _Fit(rows, needed(rows * row), what, task)

    def _reading(self, task: Task) -> tuple[int, int]:
        """Bytes of what `job` reads that are no maps of files, and the most while it reads."""
        every = [*task.plan.inputs] + ([task.plan.base] if task.plan.base else [])
        held = most = 0
        pairs = list(zip(every, task.metas, strict=True))
        if task.method is not None and task.method.needs_factors:
            pairs = pairs[len(task.plan.inputs) :]
            for found in self.factors(task) or []:
                held += FactorMethod.factor_memory(found.a.numel() + found.b.numel())
        for one, meta in pairs[::-1]:  # the base first
            memory = self.readers[one.source].memory(one.tensor)
            own = self._cast_bytes(meta) if task.method is not None else 0
            most = max(most, held + max(memory.peak, memory.held + own))
            held += own or memory.held  # what was read goes once it is cast
        return held, most

    def _cast_bytes(self, meta: Meta) -> int:
        """Bytes of the copy that `read` makes of a tensor; 0 for none."""
        if self.cast is not None:
            return 0 if meta.dtype == self.cast else math.prod(meta.shape) * self.cast.itemsize
        return 0 if meta.dtype in _NATIVE else math.prod(meta.shape) * 4

    def read(self, one: Input) -> Tensor:
        """A tensor as methods take it."""
        tensor = self.readers[one.source].read(one.tensor).detach()
        if self.cast is not None:
            tensor = tensor.to(self.cast)
        elif tensor.dtype not in _NATIVE:
            tensor = tensor.to(torch.float32)
        return tensor.contiguous()

    def job(self, task: Task, state: Any = None) -> Job:
        """The whole tensor as a job."""
        plan = task.plan
        by_factors = task.method is not None and task.method.needs_factors
        return Job(
            plan.name, None if plan.base is None else self.read(plan.base),
            [] if by_factors else [self.read(one) for one in plan.inputs],
            [one.source for one in plan.inputs],
            task.parameters, task.shared, task.dialect, self.plan.seed, task.meta.dtype, state,
            factors=self.factors(task) if by_factors else None, room=self.max_ram,
        )  # fmt: skip

    def factors(self, task: Task) -> list[Factors] | None:
        """The LoRA factors of the inputs for one weight; None if there are none."""
        found, names = [], [one.source for one in task.plan.inputs]
        for one in task.plan.inputs:
            reader = self.readers[one.source]
            if not isinstance(reader, AdapterReader):
                assert task.method is not None
                raise HyperparameterError(
                    f"{task.method.name} merges the factors of LoRA adapters, but {one.source} is none "
                    "(nor is one whose vocabulary was aligned)"
                )
            found.append(reader.factors(one.tensor))
        return matched(found, names, task.plan.name)

    def survey(self, tasks: list[Task], rows: Mapping[str, int]) -> dict[str, Any]:
        """The passes over the whole model of the methods that need them; their states by group."""
        groups: dict[str, list[Task]] = {}
        for task in tasks:
            if _surveyed(task):
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
                    job = self.job(task, state)
                    first, step = _first(task), rows[task.plan.name]
                    if step >= first:
                        method.observe(job)
                        continue
                    for at in range(0, first, step):
                        method.observe(job.piece(at, min(at + step, first)))
                if not method.settle(state):
                    break
            states[key] = state
        return states

    def make(self, task: Task, rows: int, state: Any, writer: "Writer | _Collected") -> None:
        """Makes one tensor and hands it to the writer."""
        plan, result = task.plan, self.result
        result.bytes_read += sum(size(m) for m in task.metas)
        result.bytes_written += size(task.meta)
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
        first = _first(task)
        if rows >= first or rows < 1:
            writer.put(task.file, plan.name, 0, _checked(task, task.method.merge(job)))
            return
        width = size(task.meta) // first
        for at in range(0, first, rows):
            piece = job.piece(at, min(at + rows, first))
            writer.put(
                task.file, plan.name, at * width, _checked(task, task.method.merge(piece), piece)
            )

    def _on_supports(self, task: Task, report: TensorResult) -> Tensor | None:
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


def _checked(task: Task, tensor: Tensor, piece: Job | None = None) -> Tensor:
    """Refuses what a method should not have returned: the output's header is written already."""
    shape = task.meta.shape if piece is None else tuple(piece.tensors[0].shape)
    if tensor.dtype != task.meta.dtype or tuple(tensor.shape) != shape:
        raise ShapeError(
            f"{task.plan.method} made {tensor.dtype} {list(tensor.shape)} of {task.plan.name}, expected "
            f"{task.meta.dtype} {list(shape)}"
        )
    return tensor.contiguous()
