"""What a mask that moves at every step costs, beside the way of the published code.

    python tests/bench/bench_moving.py [--quick] [--memory]

A Llama-style model with random weights; its linear layers are trained. All ways have the gradient of
the same step and end with the selected weights moved:

* full: torch.optim.AdamW over all weights, the step without any selection;
* topk: `torch.topk` of each |gradient|, the gradient times the mask, torch.optim.AdamW (dense state);
* gmt: `Schedule(every=1, now=True)`, a fifth of each matrix, state of survivors kept;
* gmt-gate: the same choice by `AdamW(gate=TopK(0.2))`, the mask is all of them, dense state;
* id3: the same with a growing mask of 0.5 % over all matrices together.

"selection" is the time of the step beyond forward and backward; its share is of the whole training
step of `full`, in the same round.

`--memory` trains whole runs in place of that, three moves of LISA, BAdam and ID3 each, and looks after
every step at what the optimizer holds: never more than two float32 moments and a clock for each weight
that is selected at that time.
"""

import argparse
import time
from typing import Any

import torch
from harness import machine, spread, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import retouch
from retouch import Schedule, SelectConfig
from retouch.scores import D3, Gradient

NOW = {"every": 1, "collect": 1, "now": True}
CONFIGS = {
    "gmt": SelectConfig(score=Gradient(), density=0.2, scope="tensor", schedule=Schedule(**NOW)),
    "id3": SelectConfig(
        score=D3(),
        density=0.005,
        schedule=Schedule(**NOW, change="grow", ramp="linear", rounds=20),
    ),
    "gmt-gate": SelectConfig.named("gmt-gate"),
}
RUNS = {
    "lisa": {"every": 4},
    "badam": {"every": 4},
    "id3": {"every": 4, "rounds": 3},
}  # fmt: skip


def model(quick: bool) -> Any:
    torch.manual_seed(0)
    hidden, layers = (256, 2) if quick else (768, 12)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def linears(model: nn.Module) -> list[nn.Parameter]:
    return [
        m.weight
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not n.endswith("lm_head")
    ]


class Masked:
    """As published re-implementations do it."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.optimizer = torch.optim.AdamW(weights, lr=1e-5)

    def step(self) -> None:
        for weight in self.weights:
            grad = weight.grad
            assert grad is not None
            size = grad.abs()
            bound = size.flatten().topk(int(0.2 * size.numel())).values[-1]
            grad.mul_(size >= bound)
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def held(optimizer: Any) -> int:
    """Bytes of an optimizer's state."""
    return sum(
        x.numel() * x.element_size()
        for state in optimizer.state.values()
        for x in state.values()
        if isinstance(x, torch.Tensor)
    )


def memory(quick: bool) -> None:
    """Whole runs: state against what is selected, after every step."""
    ids = torch.randint(8192, (4, 128), generator=torch.Generator().manual_seed(1))
    rows = []
    for name, changes in RUNS.items():
        net = model(quick)
        total = sum(p.numel() for p in net.parameters())
        config = SelectConfig.named(name, schedule=changes)
        optimizer = retouch.wrap(retouch.AdamW, config, net, fingerprint=False, lr=1e-5)
        seen = []
        for _ in range(12):
            net(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mask = retouch.get_engine(net).mask
            seen.append((held(optimizer), mask.count if mask is not None else 0))
        most = max(n for _, n in seen)
        worst = max(size / n for size, n in seen if n)
        rows.append([
            name, f"{most / 1e6:.2f}", f"{100 * most / total:.1f}", f"{max(s for s, _ in seen) / 2**20:.1f}",
            f"{worst:.2f}", f"{total * 8 / 2**20:.0f}",
        ])  # fmt: skip
        retouch.unwrap(net)
    table(
        ["run", "selected at most, M", "% of all", "state at most, MiB", "bytes per selected at most",
         "full AdamW, MiB"], rows,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 M weights, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="optimizer memory of whole runs")
    options = parser.parse_args()
    if options.memory:
        memory(options.quick)
        return
    rounds = 2 if options.quick else options.rounds
    ways: dict[str, tuple[Any, Any]] = {}
    for name in ("full", "topk", *CONFIGS):
        net = model(options.quick).requires_grad_(False)
        weights = linears(net)
        for weight in weights:
            weight.requires_grad_(True)
        if name == "full":
            optimizer: Any = torch.optim.AdamW(weights, lr=1e-5)
        elif name == "topk":
            optimizer = Masked(weights)
        else:
            optimizer = retouch.wrap(retouch.AdamW, CONFIGS[name], net, fingerprint=False, lr=1e-5)
        ways[name] = net, optimizer
    count = sum(w.numel() for w in linears(ways["full"][0]))
    total = sum(p.numel() for p in ways["full"][0].parameters())
    ids = torch.randint(8192, (4, 128), generator=torch.Generator().manual_seed(1))
    backward: dict[str, list[float]] = {n: [] for n in ways}
    step: dict[str, list[float]] = {n: [] for n in ways}
    for number in range(rounds + 1):
        for name, (net, optimizer) in ways.items():
            start = time.perf_counter()
            net(input_ids=ids, labels=ids).loss.backward()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            optimizer.zero_grad()
            if number:  # the first round makes states
                backward[name].append(middle - start)
                step[name].append(end - middle)
    print(
        f"{total / 1e6:.0f} M parameters, {count / 1e6:.0f} M compete; 4 x 128 tokens; {machine()}"
    )
    rows = []
    for name, (_, optimizer) in ways.items():
        inner = optimizer.optimizer if isinstance(optimizer, Masked) else optimizer
        base = [b + s for b, s in zip(backward["full"], step["full"], strict=True)]
        share = [100 * s / b for s, b in zip(step[name], base, strict=True)]
        rows.append([
            name, spread([1e3 * t for t in backward[name]]), spread([1e3 * t for t in step[name]]),
            spread(share), f"{held(inner) / 2**20:.0f}",
        ])  # fmt: skip
    table(["way", "forward + backward ms", "step ms", "step, % of full", "state MiB"], rows)


if __name__ == "__main__":
    main()
