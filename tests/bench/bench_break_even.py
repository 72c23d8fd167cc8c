"""From which density on the dense gradient is as fast as the sampled one: the table behind "auto".

    python tests/bench/bench_break_even.py [--quick] [--write] [--dtypes float32,bfloat16]

Sampled is what the backward pass of a layer does for a mask: the selected entries of dY'X, straight
into the gradient of the compact value. Dense is what torch and the engine's hook do without it: the
whole product, then a gather. Both work on the same dY and X of 1024 tokens. `--write` puts the
result where the package reads it, `python/retouch/break_even.json`; what was not measured now stays.
bfloat16 has two rows there, since torch's product takes six times as long on a processor that only
emulates it: a processor measures the one that is its own.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import machine, table

import retouch
from retouch import routes, sampled
from retouch.masks import Selection

TOKENS = 1024
SIZES = (256, 512, 1024, 2048)
DENSITIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
KINDS = ("elements", "rows", "columns")


def selection(kind: str, size: int, density: float) -> Selection:
    """A random selection of one kind in a square matrix."""
    generator = torch.Generator().manual_seed(0)
    length = size * size if kind == "elements" else size
    index = torch.randperm(length, generator=generator)[: max(1, int(density * length))]
    return Selection(kind, (size, size), index.sort().values)  # type: ignore[arg-type]


def ratio(kind: str, dtype: torch.dtype, size: int, density: float, rounds: int) -> float:
    """Median time of sampled over dense, of interleaved rounds."""
    torch.manual_seed(0)
    x, dy = torch.randn(TOKENS, size).to(dtype), torch.randn(TOKENS, size).to(dtype)
    chosen = selection(kind, size, density)
    value = torch.zeros(chosen.value_shape)
    assert chosen.index is not None
    index = chosen.index

    def one() -> None:
        value.copy_(sampled._product(dy, x, index, kind, False))

    def other() -> None:
        value.copy_(chosen.gather(dy.t() @ x, "weight"))

    ratios = []
    for i in range(rounds + 1):
        seconds = []
        for run in (one, other):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        if i:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def crossing(kind: str, dtype: torch.dtype, size: int, rounds: int) -> tuple[float, list[str]]:
    """The density at which the two are even, and the ratios seen."""
    seen, last = [], (0.0, 0.0)
    for density in DENSITIES:
        now = ratio(kind, dtype, size, density, rounds)
        if now >= 1:  # once more, in case that the machine was busy
            now = ratio(kind, dtype, size, density, 3 * rounds)
        seen.append(f"{now:.2f}")
        if now >= 1:
            before, low = last
            if before == 0.0:
                return 0.0, seen
            share = (1 - low) / (now - low)
            return round(before + share * (density - before), 3), seen
        last = density, now
    return DENSITIES[-1], seen


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="sizes 256 and 512, three rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--write", action="store_true", help="replace the package's table")
    args = parser.parse_args()
    sizes, rounds = (SIZES[:2], 3) if args.quick else (SIZES, args.rounds)
    print(f"sampled / dense, {TOKENS} tokens, square matrices; {machine()}\n")
    found: dict[str, dict[str, list[list[float]]]] = {}
    lines = []
    for kind in KINDS:
        for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
            name = routes.table_key(dtype)
            for size in sizes:
                even, seen = crossing(kind, dtype, size, rounds)
                found.setdefault(kind, {}).setdefault(name, []).append([size, even])
                ratios = seen + ["" for _ in DENSITIES[len(seen) :]]
                lines.append([kind, name, str(size), f"{even:.1%}", *ratios])
    table(["kind", "dtype", "size", "even at", *(f"{d:.1%}" for d in DENSITIES)], lines)
    if args.write:
        path = Path(retouch.__file__).with_name("break_even.json")
        kept = json.loads(path.read_text(encoding="utf-8"))
        text: dict[str, Any] = {"command": "python tests/bench/bench_break_even.py --write"}
        names = dict.fromkeys(name for rows in found.values() for name in rows)
        text["measured"] = kept["measured"] | dict.fromkeys(names, machine())
        text |= {kind: kept[kind] | found[kind] for kind in KINDS}
        rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in text.items()]
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
