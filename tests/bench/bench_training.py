"""Training steps of a Llama-style model with random weights: retouch beside full training and PEFT.

    python tests/bench/bench_training.py [--dtype float32]

All ways train the linear layers inside of the model (not its head) from the same weights on the same
batch, one step each in every round; ratios are taken within a round. "saved" is what the graph of one
step alone keeps alive between forward and backward: storages that go with it, so no weights and no
masks. "peak" is the high-water mark of the resident memory of a fresh process over two steps (so
gradients and optimizer state are in it), above that of the process with the bare model; the memory
that a way needs for its installation is not in it, what it keeps of that is. Before anything is timed,
retouch and SHiRA must have the same losses with one mask.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from harness import high_water, machine, reset_high_water, spread, table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

import retouch
from retouch.masks import Mask, Selection

LORA = "PEFT LoRA r=8"
R, VOCABULARY, LR = 8, 8192, 1e-4
PRELOAD = ["torch", "peft", "retouch", "transformers.models.llama.modeling_llama"]
warnings.filterwarnings("ignore", message="Sparse invariant checks")
warnings.filterwarnings("ignore", category=FutureWarning)


@dataclass(frozen=True)
class Size:
    """Of the model and its batches."""

    hidden: int
    layers: int
    seq: int
    batch: int
    dtype: torch.dtype

    def model(self) -> Any:
        """The same weights in every call; nothing requires grad."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.hidden,
            intermediate_size=-(-self.hidden * 8 // 3 // 64) * 64, num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64), max_position_embeddings=self.seq,
            tie_word_embeddings=False, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(self.dtype).requires_grad_(False)

    def ids(self, step: int = 0) -> Tensor:
        """Tokens of a batch."""
        generator = torch.Generator().manual_seed(step)
        return torch.randint(VOCABULARY, (self.batch, self.seq), generator=generator)


def linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that all ways train, or some of."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def lora_count(model: nn.Module) -> int:
    """Parameters of LoRA, which SHiRA has as many of."""
    return sum(R * sum(p.shape) for p in linears(model).values())


# --- the ways: each turns the bare model into one that trains, and gives its optimizer ----------------

Made = tuple[Any, Any]


def frozen(model: Any) -> Made:
    """Forward and the gradient of the input: what no way to train can do without."""
    model.enable_input_require_grads()
    return model, None


def full(model: Any) -> Made:
    """Every weight of the linear layers."""
    weights = [p.requires_grad_() for p in linears(model).values()]
    return model, torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True)


def by_peft(config: Callable[[Any], Any], **options: Any) -> Callable[[Any], Made]:
    """An adapter of PEFT."""

    def make(model: Any) -> Made:
        model = peft.get_peft_model(model, config(model), **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    return make


def by_retouch(gradient: Any, granularity: str, density: float | None) -> Callable[[Any], Made]:
    """A random mask; as many elements as LoRA has parameters without a density."""

    def make(model: Any) -> Made:
        budget = {"k": lora_count(model)} if density is None else {"density": density}
        mask = retouch.select(model, "random", granularity=granularity, **budget)
        optimizer = retouch.wrap(
            retouch.AdamW,
            mask,
            model,
            gradient=gradient,
            fingerprint=False,
            lr=LR,
            weight_decay=0.0,
        )
        return model, optimizer

    return make


COMMON = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora(model: Any) -> Any:
    return peft.LoraConfig(r=R, **COMMON)


def shira(model: Any) -> Any:
    return peft.ShiraConfig(r=R, random_seed=0, **COMMON)


def supertuning(model: Any) -> Any:
    total = sum(p.numel() for p in linears(model).values())
    return peft.SupertuningConfig(sparsity=1 - lora_count(model) / total, **COMMON)


def ways(dtype: torch.dtype) -> dict[str, Callable[[Any], Made]]:
    """By the names that the table has."""
    out = {"frozen floor": frozen, "full AdamW": full, LORA: by_peft(lora)}
    if dtype != torch.float32:  # PEFT's default is float32 adapters
        out[f"{LORA}, 16-bit adapters"] = by_peft(lora, autocast_adapter_dtype=False)
    out |= {"PEFT SHiRA": by_peft(shira), "PEFT Super-Tuning": by_peft(supertuning)}
    for gradient in ("dense", "sampled"):
        for density, label in ((0.001, "0.1%"), (0.01, "1%"), (None, "as LoRA")):
            out[f"retouch {gradient}, elements {label}"] = by_retouch(gradient, "element", density)
        for granularity in ("row", "column"):
            out[f"retouch {gradient}, {granularity}s 1%"] = by_retouch(gradient, granularity, 0.01)
    return out


# --- what is measured ---------------------------------------------------------------------------------


class Run:
    """A model that trains in one way."""

    def __init__(self, make: Callable[[Any], Made], size: Size, model: Any = None) -> None:
        self.model, self.optimizer = make(size.model() if model is None else model)
        self.size, self.loss = size, 0.0
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        self.trained = sum(p.numel() for g in groups for p in g["params"])

    def __call__(self, step: int = 0) -> tuple[float, float, float]:
        """One step; seconds of forward, backward and optimizer (with zero_grad)."""
        ids = self.size.ids(step)
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end = time.perf_counter()
        self.loss = loss.item()
        return forward - start, backward - forward, end - backward

    def saved(self) -> float:
        """MiB that the graph of a step keeps alive."""
        found: dict[int, tuple[StorageWeakRef, int]] = {}

        def pack(tensor: Tensor) -> Tensor:
            parts = [tensor]
            if tensor.is_sparse:
                parts = [tensor._indices(), tensor._values()]
            for part in parts:
                storage = part.untyped_storage()
                found[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
            return tensor.detach()  # an output that held itself would never go

        ids = self.size.ids()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(input_ids=ids, labels=ids).loss
        del loss
        gc.collect()
        return sum(n for ref, n in found.values() if ref.expired()) / 2**20


def peak(name: str, size: Size, threads: int, results: Any) -> None:
    """In a child: MB above the bare model that two steps need."""
    torch.set_num_threads(threads)
    make = ways(size.dtype)[name]
    tiny = Size(64, 1, 16, 2, size.dtype)
    warm = Run(make, tiny)  # loads code and starts threads
    warm(), warm()
    del warm
    trim = ctypes.CDLL(None).malloc_trim
    model = size.model()
    gc.collect(), trim(0), reset_high_water()
    before = high_water()
    run = Run(make, size, model)
    gc.collect(), trim(0), reset_high_water()
    run(), run()
    results.put(high_water() - before)


def peaks(names: list[str], size: Size) -> dict[str, float]:
    """Of each way, in a process of its own, forked from one that has imported and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    out = {}
    for name in names:
        results = context.Queue()
        child = context.Process(target=peak, args=(name, size, torch.get_num_threads(), results))
        child.start()
        out[name] = results.get(timeout=120)
        child.join()
    return out


def check(size: Size) -> None:
    """retouch and SHiRA have the same losses with SHiRA's mask."""
    theirs = Run(by_peft(shira), size)
    chosen = {}
    for name, module in theirs.model.get_base_model().named_modules():
        if hasattr(module, "shira_indices"):
            where, width = module.shira_indices["default"].long(), module.in_features
            flat = (where[0] * width + where[1]).sort().values
            shape = (module.out_features, width)
            chosen[f"{name}.weight"] = Selection("elements", shape, flat)
    model = size.model()
    mask = Mask(chosen, model)
    optimizer = retouch.wrap(
        retouch.AdamW, mask, model, gradient="sampled", lr=LR, weight_decay=0.0
    )
    ours = Run(lambda model: (model, optimizer), size, model)
    for step in range(3):
        theirs(step), ours(step)
        assert abs(ours.loss - theirs.loss) <= 1e-5 * theirs.loss, (step, ours.loss, theirs.loss)


def measure(size: Size, args: argparse.Namespace) -> list[list[str]]:
    """The lines of one dtype."""
    made = ways(size.dtype)
    names = [name for name in made if args.only in name or name == LORA]
    memory = {} if args.no_memory else peaks(names, size)
    runs = {name: Run(made[name], size) for name in names}
    weights = sum(p.numel() for p in linears(size.model()).values())
    saved = {name: run.saved() for name, run in runs.items()}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for i in range(-1, args.rounds):  # the first round warms up
        for name, run in runs.items():
            seconds = run(0)
            if i >= 0:
                times[name].append(seconds)
    totals = {name: [sum(t) for t in seconds] for name, seconds in times.items()}
    lines = []
    for name, run in runs.items():
        parts = [spread([1e3 * t[i] for t in times[name]]) for i in range(3)]
        ratios = [a / b for a, b in zip(totals[name], totals[LORA], strict=True)]
        lines.append(
            [
                str(size.dtype).removeprefix("torch."),
                name,
                f"{run.trained:,} ({run.trained / weights:.2%})",
                *parts,
                f"{1e3 * statistics.median(totals[name]):.0f}",
                f"{spread(ratios, 2)}x",
                f"{saved[name]:.0f}",
                f"{memory[name]:.0f}" if memory else "-",
            ]
        )
    return lines


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="ways with this in their name, and LoRA")
    parser.add_argument("--no-memory", action="store_true", help="no processes for the peak")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = (args.hidden, args.layers, args.seq, args.batch)
    check(Size(*shape, torch.float32))
    lines = []
    for dtype in [args.dtype] if args.dtype else ["float32", "bfloat16"]:
        lines += measure(Size(*shape, getattr(torch, dtype)), args)
    model = Size(*shape, torch.float32).model()
    print(
        f"hidden {args.hidden}, {args.layers} layers, batch {args.batch} of {args.seq} tokens, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{sum(p.numel() for p in linears(model).values()) / 1e6:.1f} M of them in the linear "
        f"layers that train; medians of {args.rounds} rounds (10-90 %); {machine()}, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}\n"
    )
    parts = ["forward ms", "backward ms", "optimizer ms", "step ms", "step / LoRA"]
    table(["dtype", "way", "trainable", *parts, "saved MiB", "peak MB"], lines)


if __name__ == "__main__":
    main()
