"""Per-sample Fisher of a 23 M parameter encoder on 256 samples, beside a loop over single samples.

    OMP_NUM_THREADS=2 python tests/bench/bench_persample.py [--quick] [--length 32] [--batch 32]

"loop in torch" is what a user writes: one sample, backward, add the squares of all gradients. "loop over
single samples" is `Fisher()` given batches of one. The scores must be equal before anything is timed.
"""

import argparse

import torch
from harness import interleave, machine, rows, table
from transformers import BertConfig, BertForSequenceClassification

from retouch import SelectConfig
from retouch.batches import single_samples
from retouch.eligible import candidates
from retouch.scores import Fisher


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="32 samples, two rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(  # the shape of MiniLM-L6
        vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=12, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    samples = 32 if args.quick else 256
    ids = torch.randint(5, 30522, (samples, args.length))
    labels = torch.randint(0, 2, (samples,))
    batches = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
        for i, y in zip(ids.split(args.batch), labels.split(args.batch), strict=True)
    ]
    singles = [sample for batch in batches for sample in single_samples(batch)]
    found = candidates(model, SelectConfig(score="fisher", density=0.01, target_modules=None))
    eligible = {name: c for name, c in found.items() if c.state != "frozen"}
    count = sum(c.numel for c in eligible.values())
    weights = {n: p for n, p in model.named_parameters() if n in eligible}

    def loop() -> dict[str, torch.Tensor]:
        sums = {n: torch.zeros_like(p) for n, p in weights.items()}
        for sample in singles:
            model.zero_grad()
            model(**sample).loss.backward()
            for n, p in weights.items():
                if p.grad is not None:
                    sums[n].addcmul_(p.grad, p.grad)
        model.zero_grad()
        return sums

    ways = {
        "loop in torch": loop,
        "retouch": lambda: Fisher()(model, eligible, batches),
        "loop over single samples": lambda: Fisher()(model, eligible, singles),
    }
    theirs, ours = (ways[name]() for name in ("loop in torch", "retouch"))
    # the gradient of the bias of attention keys is zero but for rounding
    floor = 1e-9 * max(float(t.max()) for t in theirs.values())
    worst = max(
        float(((ours[n] - t).abs() / (t + 1e-5 * t.max() + floor)).max()) for n, t in theirs.items()
    )
    assert worst < 1e-3, f"the scores differ by {worst}"
    print(
        f"per-sample Fisher of {count / 1e6:.1f} M parameters, {samples} samples of {args.length} "
        f"tokens in batches of {args.batch}; {machine()}\n"
        f"largest relative difference of scores above 1e-5 of the largest of their tensor: {worst:.1e}\n"
    )
    times = interleave(ways, 2 if args.quick else args.rounds)
    table(["way", "median ms", "range ms", "time / retouch"], rows(times, "retouch"))


if __name__ == "__main__":
    main()
