"""What the benchmarks share: interleaved rounds, medians with their spread, one Markdown table.

Peers run in the same process, one after the other in every round, so that a busy machine slows all of
them alike; ratios are taken within a round.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch


def cpu() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def interleave(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def rows(times: dict[str, list[float]], ours: str) -> list[list[str]]:
    """Name, median, range, and how many times slower than ours (median and range of the rounds)."""
    out = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[ours], strict=True)]
        out.append(
            [
                name,
                f"{1e3 * statistics.median(seconds):.1f}",
                f"{1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f}",
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})",
            ]
        )
    return out


def table(columns: list[str], lines: list[list[str]]) -> None:
    """Prints a Markdown table."""
    width = [max(len(c), *(len(r[i]) for r in lines)) for i, c in enumerate(columns)]
    for row in [columns, ["-" * w for w in width], *lines]:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, width, strict=True)) + " |")


def spread(values: list[float], digits: int = 1) -> str:
    """The median, and the tenth and ninetieth percentile."""
    low, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.9])).tolist()
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def high_water() -> float:
    """Peak MB of this process; getrusage would count the parent that forked it."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1e3


def reset_high_water() -> None:
    """Makes the peak what is resident now."""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")


def machine() -> str:
    """One line on what this ran on."""
    return f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
