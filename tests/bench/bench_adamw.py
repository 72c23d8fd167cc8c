"""One AdamW step of a sparse selection, beside the two ways that torch offers.

    python tests/bench/bench_adamw.py [--quick]

Each way starts from a dense gradient. retouch: gather the selected entries (what its backward hook
does) and one fused step that updates the float32 values and writes them into the weights. "mask":
multiply the gradient by a 0/1 mask, then AdamW(fused=True) over all weights (decay leaks into frozen
ones). "compact": gather, AdamW(fused=True) over the selected values, scatter.

A second table has steps of 8-bit AdamW and of Adafactor from gathered gradients, with the kernels and in
operations of torch alone, as another device takes them.
"""

import argparse
import contextlib
from typing import Any

import torch
from harness import interleave, machine, rows, table

import retouch
from retouch import ops
from retouch.masks import Mask, Selection
from retouch.optim import steps

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


class Ours:
    """retouch."""

    def __init__(self, weight: torch.Tensor, grad: torch.Tensor, index: torch.Tensor) -> None:
        self.weight, self.grad, self.index, self.step = weight.clone(), grad, index, 0
        self.value = ops.gather(self.weight, index, "w")
        self.m, self.v = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self.compact = torch.empty_like(self.value)

    def __call__(self) -> None:
        self.step += 1
        self.compact.zero_()
        ops.gather_add_(self.compact, self.grad, self.index, "w")
        steps.adamw_(
            self.value, self.compact, self.m, self.v, self.weight, self.index, "w",
            step=self.step, lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY,
        )  # fmt: skip


class Masked:
    """Mask, then the dense fused step."""

    def __init__(self, weight: torch.Tensor, grad: torch.Tensor, index: torch.Tensor) -> None:
        self.param = torch.nn.Parameter(weight.clone())
        self.grad = grad.clone()
        self.mask = torch.zeros_like(weight).index_fill_(0, index.long(), 1.0)
        self.optimizer = torch.optim.AdamW(
            [self.param], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )

    def __call__(self) -> None:
        self.param.grad = self.grad.mul_(self.mask)
        self.optimizer.step()


class Compact:
    """Gather, a fused step of the selected values, scatter."""

    def __init__(self, weight: torch.Tensor, grad: torch.Tensor, index: torch.Tensor) -> None:
        self.weight, self.grad, self.index = weight.clone(), grad, index.long()
        self.value = torch.nn.Parameter(self.weight[self.index].float())
        self.optimizer = torch.optim.AdamW(
            [self.value], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )

    @torch.no_grad()
    def __call__(self) -> None:
        self.value.grad = self.grad.index_select(0, self.index).float()
        self.optimizer.step()
        self.weight.index_copy_(0, self.index, self.value.detach().to(self.weight.dtype))


class Wrapped:
    """A step of an optimizer of this package."""

    def __init__(
        self, weight: torch.Tensor, grad: torch.Tensor, index: torch.Tensor, native: bool, cls: Any,
        **options: Any,
    ) -> None:  # fmt: skip
        side = int(len(weight) ** 0.5)
        model = torch.nn.Linear(side, side, bias=False)
        model.weight.data = weight.clone().view(side, side)
        mask = Mask({"weight": Selection("elements", (side, side), index)}, model)
        self.model, self.path = model, contextlib.nullcontext if native else ops.force_torch
        self.optimizer = retouch.wrap(cls, mask, model, fingerprint=False, lr=LR, **options)
        (self.value,) = self.optimizer.param_groups[0]["params"]
        self.grad = ops.gather(grad, index, "w")

    def __call__(self) -> None:
        self.value.grad = self.grad
        with self.path():
            self.optimizer.step()


STATES = {
    "AdamW, 8 bits": (retouch.AdamW, {"state_bits": 8}),
    "Adafactor": (retouch.Adafactor, {}),
}


def states(n: int, rounds: int) -> None:
    """The second table, for one square matrix of n weights."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(n, generator=generator) for _ in range(2))
    order = torch.rand(n, generator=generator)
    lines = []
    for density in (0.001, 0.01, 0.05):
        index = ops.topk([order], ["w"], int(density * n))[0]
        for name, (cls, options) in STATES.items():
            ways = {
                way: Wrapped(weight, grad, index, native, cls, **options)
                for way, native in (("retouch", True), ("retouch in torch", False))
            }
            for run in ways.values():
                run()
            ours, other = (run.value.detach() for run in ways.values())
            torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)
            times = interleave(ways, rounds)
            lines += [[name, f"{density:.1%}", *row] for row in rows(times, "retouch")]
    table(["optimizer", "density", "way", "median ms", "range ms", "time / retouch"], lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="4 M weights, two rounds")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    n = 4_000_000 if args.quick else 64_000_000
    print(f"one AdamW step of {n / 1e6:.0f} M weights in one tensor; {machine()}\n")
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(n, generator=generator).to(dtype)
        grad = torch.randn(n, generator=generator).to(dtype)
        order = torch.rand(n, generator=generator)
        for density in (0.001, 0.01, 0.05):
            index = ops.topk([order], ["w"], int(density * n))[0]
            ours, compact = Ours(weight, grad, index), Compact(weight, grad, index)
            ours(), compact()
            torch.testing.assert_close(ours.value, compact.value.detach(), rtol=1e-5, atol=1e-6)
            masked = Masked(weight, grad, index)
            ways = {"retouch": ours, "mask + fused": masked, "compact + fused": compact}
            times = interleave(ways, 2 if args.quick else args.rounds)
            for row in rows(times, "retouch"):
                lines.append([str(dtype).removeprefix("torch."), f"{density:.1%}", *row])
    table(["dtype", "density", "way", "median ms", "range ms", "time / retouch"], lines)
    print()
    states(n, 2 if args.quick else args.rounds)


if __name__ == "__main__":
    main()
