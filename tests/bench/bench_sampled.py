"""Selected entries of a weight gradient, beside the dense product and torch's sampled product.

    python tests/bench/bench_sampled.py [--quick]

All ways must agree before anything is timed; masks are random. torch.sparse.sampled_addmm is timed in
float32, its pattern ready as CSR. A processor without bfloat16 instructions multiplies dense bfloat16
slowly: there, compare with the float32 rows.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
from harness import interleave, machine, rows, table

from retouch import ops

SHAPES = ((512, 512), (768, 3072), (2048, 2048), (4096, 4096))
TOKENS = (512, 2048)
DENSITIES = (0.001, 0.01, 0.025, 0.05, 0.1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def case(
    shape: tuple[int, int], tokens: int, density: float, dtype: torch.dtype, rounds: int
) -> list[list[str]]:
    """One row for each way."""
    n_out, n_in = shape
    generator = torch.Generator().manual_seed(0)
    dy = torch.randn(tokens, n_out, generator=generator).to(dtype)
    x = torch.randn(tokens, n_in, generator=generator).to(dtype)
    mask = torch.rand(n_out, n_in, generator=generator) < density
    index = mask.flatten().nonzero().flatten().int()
    csr = mask.to(dtype).to_sparse_csr()
    ways: dict[str, Callable[[], object]] = {
        "retouch": lambda: ops.selected(dy, x, index, "w"),
        "dense product, indexed": lambda: (dy.t() @ x).view(-1).index_select(0, index),
    }
    if dtype == torch.float32:
        ways["torch.sparse.sampled_addmm"] = lambda: torch.sparse.sampled_addmm(
            csr, dy.t(), x, beta=0.0
        ).values()
    want = (dy.t() @ x).view(-1).index_select(0, index).float()
    for name, run in ways.items():
        got = run()
        assert isinstance(got, torch.Tensor)
        error = float((got.float() - want).abs().max() / want.abs().max())
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), f"{name} is off by {error}"
    what = [
        f"{n_out} x {n_in}",
        str(tokens),
        f"{100 * density:g} %",
        str(dtype).removeprefix("torch."),
        str(torch.get_num_threads()),
    ]
    return [what + line for line in rows(interleave(ways, rounds), "retouch")]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two shapes, 512 tokens, two rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    args = parser.parse_args()
    shapes, tokens = (SHAPES[:2], TOKENS[:1]) if args.quick else (SHAPES, TOKENS)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    rounds = 2 if args.quick else args.rounds
    lines = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in shapes:
            for count in tokens:
                for density in DENSITIES:
                    for dtype in args.dtypes:
                        lines += case(shape, count, density, DTYPES[dtype], rounds)
    print(f"Selected entries of dY.T @ X, random masks; {machine()}\n")
    columns = ["shape", "tokens", "density", "dtype", "threads", "way", "median ms", "range ms"]
    table([*columns, "time / retouch"], lines)


if __name__ == "__main__":
    main()
