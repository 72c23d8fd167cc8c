"""Exact global top-k over the tensors of a 125 M parameter model, beside what torch offers.

    python tests/bench/bench_topk.py [--quick]

All exact ways must select the same coordinates before anything is timed. Extra memory is the peak of
the process above the scores, of one run in a child process.
"""

import argparse
import subprocess
import sys

import torch
from harness import high_water, interleave, machine, rows, table

from retouch import ops

WAYS = ("retouch", "torch.topk of cat", "torch.kthvalue of cat", "torch.histc, two passes")


def scores(quick: bool) -> list[torch.Tensor]:
    """|gradient|-like scores: 145 tensors, 125 M elements (--quick: 24 tensors, 8 M)."""
    generator = torch.Generator().manual_seed(0)
    width, layers, vocabulary = (256, 4, 4096) if quick else (768, 16, 16154)
    shapes = [(vocabulary, width)]
    for _ in range(layers):
        shapes += [(width, width)] * 4 + [
            (4 * width, width),
            (width, 4 * width),
            (width,),
            (width,),
            (width,),
        ]
    return [torch.randn(s, generator=generator).abs_() for s in shapes]


def ours(parts: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """retouch: one pass, nothing concatenated."""
    return ops.topk(parts, [str(i) for i in range(len(parts))], k)


def by_topk(parts: list[torch.Tensor], k: int) -> torch.Tensor:
    """torch.topk: flat positions of the concatenation."""
    return torch.cat([p.flatten() for p in parts]).topk(k, sorted=False).indices


def by_kthvalue(parts: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """torch.kthvalue for the bound, then a mask of each tensor."""
    flat = torch.cat([p.flatten() for p in parts])
    bound = flat.kthvalue(flat.numel() - k + 1).values
    return [p >= bound for p in parts]


def by_histogram(parts: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """Two passes of torch.histc: not exact, the bound is a bin edge."""
    low, high, need = 0.0, max(float(p.max()) for p in parts), float(k)
    for _ in range(2):
        counts = sum(torch.histc(p, 2048, low, high) for p in parts)
        assert isinstance(counts, torch.Tensor)
        above = counts.flip(0).cumsum(0)
        at = int((above < need).sum())
        width = (high - low) / 2048
        need -= float(above[at - 1]) if at else 0.0
        high -= at * width
        low = high - width
    return [p >= low for p in parts]


RUN = dict(zip(WAYS, (ours, by_topk, by_kthvalue, by_histogram), strict=True))


def peak(way: str, quick: bool) -> float:
    """Extra MB of one run, in a child."""
    command = [sys.executable, __file__, "--peak", way] + (["--quick"] if quick else [])
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="8 M scores, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = scores(args.quick)
    total = sum(p.numel() for p in parts)
    k = total // 100
    if args.peak:
        before = high_water()
        RUN[args.peak](parts, k)
        print(high_water() - before)
        return
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[by_topk(parts, k)] = True
    offset = 0
    for part, index, mask in zip(parts, ours(parts, k), by_kthvalue(parts, k), strict=True):
        mine = torch.zeros(part.numel(), dtype=torch.bool)
        mine[index.long()] = True
        want = chosen[offset : offset + part.numel()]
        same_values = torch.equal(
            part.flatten()[mine].sort().values, part.flatten()[want].sort().values
        )
        assert same_values and int((mask.flatten() != mine).sum()) < 64, "the ways disagree"
        offset += part.numel()
    print(f"top 1 % of {total / 1e6:.0f} M float32 scores in {len(parts)} tensors; {machine()}\n")
    ways = {name: (lambda run=run: run(parts, k)) for name, run in RUN.items()}
    ways["read once (sum)"] = lambda: [p.sum() for p in parts]
    times = interleave(ways, 2 if args.quick else args.rounds)
    lines = rows(times, "retouch")
    for line in lines:
        line.append(f"{peak(line[0], args.quick):.0f}" if line[0] in RUN else "-")
    table(["way", "median ms", "range ms", "time / retouch", "extra MB"], lines)


if __name__ == "__main__":
    main()
