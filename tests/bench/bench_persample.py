"""Per-sample Fisher of a 23 M parameter encoder on 256 samples, beside a loop over single samples.

    OMP_NUM_THREADS=2 python tests/bench/bench_persample.py [--quick] [--length 32] [--batch 32]

A row for each number of tokens. "loop in torch" is what a user writes: one sample, backward, add the
squares of all gradients. "single samples" is `Fisher()` given batches of one. "forward and backward" is
the same batches up to the gradients of the activations alone, which every way needs. Ratios are taken
within a round: median and range. The scores must be equal before anything is timed.

OMP_WAIT_POLICY=passive keeps torch's idle threads off the cores that our kernel works on.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from harness import interleave, machine, table
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from retouch import SelectConfig
from retouch.batches import single_samples
from retouch.eligible import candidates
from retouch.scores import Fisher

LENGTHS = [8, 16, 32, 64]
COLUMNS = [
    "tokens", "retouch s", "forward and backward s", "loop in torch s", "loop / retouch",
    "single samples / retouch",
]  # fmt: skip


class Bench:
    """The model, and the ways to score it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = BertConfig(  # the shape of MiniLM-L6
            vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
            num_attention_heads=12, num_labels=2,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config).eval()
        found = candidates(
            self.model, SelectConfig(score="fisher", density=0.01, target_modules=None)
        )
        self.eligible = {name: c for name, c in found.items() if c.state != "frozen"}
        self.weights = {n: p for n, p in self.model.named_parameters() if n in self.eligible}

    def loop(self, singles: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a user writes."""
        sums = {n: torch.zeros_like(p) for n, p in self.weights.items()}
        for sample in singles:
            self.model.zero_grad()
            self.model(**sample).loss.backward()
            for n, p in self.weights.items():
                if p.grad is not None:
                    sums[n].addcmul_(p.grad, p.grad)
        self.model.zero_grad()
        return sums

    def passes(self, batches: list[dict[str, Tensor]]) -> None:
        """Forward and backward without the gradient of any parameter."""
        self.model.requires_grad_(False)
        for batch in batches:
            rest = {k: v for k, v in batch.items() if k != "input_ids"}
            words = self.model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            self.model(inputs_embeds=words, **rest).loss.backward()
        self.model.requires_grad_(True)

    def fisher(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Ours."""
        return Fisher()(self.model, self.eligible, batches)

    def ways(self, samples: int, length: int, batch: int) -> dict[str, Callable[[], object]]:
        """The ways, on the same samples; raises if their scores differ."""
        ids = torch.randint(5, 30522, (samples, length))
        labels = torch.randint(0, 2, (samples,))
        batches = [
            {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
            for i, y in zip(ids.split(batch), labels.split(batch), strict=True)
        ]
        singles = [sample for batch in batches for sample in single_samples(batch)]
        ours, theirs = self.fisher(batches), self.loop(singles)
        # the gradient of the bias of attention keys is zero but for rounding
        floor = 1e-9 * max(float(t.max()) for t in theirs.values())
        for n, t in theirs.items():
            # relative, for scores above 1e-5 of the largest of their tensor
            worst = float(((ours[n] - t).abs() / (t + 1e-5 * t.max() + floor)).max())
            assert worst < 1e-3, f"the scores of {n} differ by {worst}"
        return {
            "retouch": lambda: self.fisher(batches),
            "passes": lambda: self.passes(batches),
            "loop": lambda: self.loop(singles),
            "singles": lambda: self.fisher(singles),
        }


def row(length: int, times: dict[str, list[float]]) -> list[str]:
    """One line of the table."""

    def seconds(name: str) -> str:
        return f"{statistics.median(times[name]):.2f}"

    def ratio(name: str) -> str:
        ratios = [a / b for a, b in zip(times[name], times["retouch"], strict=True)]
        return f"{statistics.median(ratios):.1f}x ({min(ratios):.1f}-{max(ratios):.1f})"

    return [
        str(length), seconds("retouch"), seconds("passes"), seconds("loop"), ratio("loop"),
        ratio("singles"),
    ]  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="32 samples, two rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--length", type=int, help="tokens of a sample; all of 8, 16, 32, 64 if not given"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch")
    args = parser.parse_args()
    bench = Bench()
    samples = 32 if args.quick else 256
    count = sum(c.numel for c in bench.eligible.values())
    print(
        f"per-sample Fisher of {count / 1e6:.1f} M parameters, {samples} samples in batches of "
        f"{args.batch}; {machine()}\n"
    )
    rows = []
    for length in [args.length] if args.length else LENGTHS:
        ways = bench.ways(samples, length, args.batch)
        rows.append(row(length, interleave(ways, 2 if args.quick else args.rounds)))
    table(COLUMNS, rows)


if __name__ == "__main__":
    main()
