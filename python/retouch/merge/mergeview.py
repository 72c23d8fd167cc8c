"""A merge for the terminal: sizes in words, a bar, and tables as titles, columns and rows."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from retouch.errors import HyperparameterError
from retouch.merge.api import Merged, Prepared
from retouch.merge.card import parameter_rows
from retouch.merge.engine import Progress

__all__ = ["Table", "bar", "changes", "parameters", "return_memory", "size", "summary"]

Table = tuple[str, list[str], list[list[str]]]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def size(text: str | None) -> int | None:
    """Bytes: ``8GB``, ``500 MB``, ``2GiB``, ``1000000``.

    Raises:
        HyperparameterError: It is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    unit = None if match is None else (_UNITS | _BINARY).get(match[2])
    if match is None or unit is None:
        raise HyperparameterError(f"got {text!r} for a size, wanted one such as 8GB or 500MB")
    return int(float(match[1]) * unit)


def return_memory() -> None:
    """Has glibc give every block of 256 KiB or more back to the system when it is freed.

    By itself it learns from the first large blocks to keep up to 64 MiB of freed memory, which no budget
    of `max_ram` counts. A process that ends after the merge can have it so; a notebook may not want it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        mallopt(mmap_threshold, 1 << 18)
        mallopt(trim_threshold, 1 << 18)


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(
        TextColumn("merge"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[name]}"),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    ) as bars:  # fmt: skip
        task = bars.add_task("merge", total=None, name="")
        yield lambda done, total, name: bars.update(task, completed=done, total=total, name=name)


def parameters(ready: Prepared) -> Table:
    """The resolved parameters, tensors with the same ones in one row."""
    rows = []
    for group in parameter_rows(ready.plan.tensors):
        names = group["tensors"]
        values = [f"{k}={v}" for k, v in group["shared"].items()]
        for source, given in group["models"].items():
            values.append(f"{source}({', '.join(f'{k}={v}' for k, v in given.items())})")
        rows.append([names[0], str(len(names)), group["method"], " ".join(values)])
    title = f"{len(ready.plan.tensors)} tensors by {ready.config.method}"
    return title, ["first tensor", "tensors", "method", "parameters"], rows


def changes(made: Merged, limit: int = 12) -> Table | None:
    """The tensors that moved farthest from the base; None without a base or a report."""
    if made.report is None:
        return None
    found = [row for row in made.report.tensors if row.change is not None]
    found.sort(key=lambda row: -(row.change or 0.0) / (row.base_norm or 1.0))
    if not found:
        return None
    rows = [
        [
            row.name,
            f"{(row.change or 0.0) / row.base_norm:.3%}" if row.base_norm else "-",
            f"{row.ratio:.3f}" if row.ratio is not None else "-",
            f"{(row.moved or 0) / max(row.numel, 1):.1%}",
        ]
        for row in found[:limit]
    ]
    columns = ["tensor", "change / base", "change / largest of the models", "values changed"]
    return f"the {len(rows)} of {len(found)} tensors that moved farthest", columns, rows


def summary(made: Merged) -> list[str]:
    """What was done and what looks wrong, as lines."""
    result, report = made.result, made.report
    lines = [f"note: {note}" for note in result.notes]
    if report is not None:
        lines += [f"warning: {text}" for text in report.warnings]
        for words, names in (
            ("unchanged by the merge", report.untouched),
            ("copied", report.copied),
            ("of the inputs that the output has not", report.missing),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"{len(names)} tensors {words}: {', '.join(names[:3])}{more}")
    lines.append(
        f"wrote {made.out}: {len(result.tensors)} tensors, {result.bytes_written / 1e6:,.1f} MB "
        f"in {result.seconds:.1f} s"
    )
    return lines
