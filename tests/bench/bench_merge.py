"""Merging a base and three fine-tunes of 495 M bf16 parameters, beside mergekit where it is installed.

    python tests/bench/bench_merge.py [--quick] [--methods ties,linear] [--mergekit]

Checkpoints are made once in a folder (--folder, default: a temporary one). Each merge runs in a process of
its own, warm page cache; wall time includes everything after `import torch`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import high_water, machine, table
from safetensors.torch import save_file

METHODS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.2},
    "breadcrumbs": {"density": 0.2, "gamma": 0.01},
}
WEIGHTS = (0.5, 0.3, 0.2)
MODELS = ("ft1", "ft2", "ft3")


def shapes(quick: bool) -> dict[str, tuple[int, ...]]:
    """A Llama of 495 M parameters (--quick: 28 M)."""
    hidden, layers, mlp, vocabulary = (384, 6, 1024, 16000) if quick else (1280, 24, 3456, 32000)
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (hidden // 5, hidden) if not quick else (128, hidden),
            f"{at}self_attn.v_proj.weight": (hidden // 5, hidden) if not quick else (128, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (mlp, hidden),
            f"{at}mlp.up_proj.weight": (mlp, hidden),
            f"{at}mlp.down_proj.weight": (hidden, mlp),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def config(quick: bool) -> dict[str, object]:
    """The config.json that belongs to `shapes`."""
    hidden, layers, mlp, vocabulary = (384, 6, 1024, 16000) if quick else (1280, 24, 3456, 32000)
    heads = 12 if quick else 20
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 4, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip


def make(folder: Path, quick: bool) -> None:
    """A base; a dense, a heavy-tailed and a sparse change of it; each in four shards."""
    names = list(shapes(quick).items())
    for model in ("base", *MODELS):
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(json.dumps(config(quick)))
        weight_map = {}
        for shard in range(4):
            file, part = f"model-{shard + 1:05}-of-00004.safetensors", {}
            for i in range(shard, len(names), 4):
                name, shape = names[i]
                base = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
                gen = torch.Generator().manual_seed(
                    1000 * (1 + MODELS.index(model)) + i if model in MODELS else 0
                )
                noise = torch.randn(shape, generator=gen)
                if model == "ft1":
                    base += 1e-3 * noise
                elif model == "ft2":
                    base += 2e-4 * noise**3
                elif model == "ft3":
                    base = torch.where(
                        torch.rand(shape, generator=gen) < 0.15, base + 2e-3 * noise, base
                    )
                part[name] = base.bfloat16()
                weight_map[name] = file
            save_file(part, folder / model / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))


def ours(folder: Path, method: str, out: Path) -> None:
    """One merge; prints seconds, CPU seconds, peak MB and bytes moved."""
    before = high_water()
    start, cpu = time.perf_counter(), time.process_time()
    from retouch.merge import build, run

    per_model = [{"weight": w} | METHODS[method] for w in WEIGHTS]
    base = None if method == "linear" else folder / "base"
    models = [folder / m for m in MODELS]
    dialect = None if method in ("linear", "task_arithmetic") else "mergekit"
    result = run(build(method, models, base=base, parameters=per_model, dialect=dialect), out)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = high_water() - before
    print(
        json.dumps(
            [seconds, cpu, peak, result.bytes_read + result.bytes_written, result.piece_bytes]
        )
    )


def mergekit(folder: Path, method: str, out: Path) -> None:
    """The same by mergekit."""
    models = [
        {"model": str(folder / m), "parameters": {"weight": w} | METHODS[method]}
        for m, w in zip(MODELS, WEIGHTS, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        recipe["base_model"] = str(folder / "base")
    path = out.with_suffix(".yml")
    path.write_text(json.dumps(recipe))
    command = [
        sys.executable, "-m", "mergekit.scripts.run_yaml", str(path), str(out), "--no-copy-tokenizer",
        "--quiet", "--random-seed", "0",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    print(json.dumps([time.perf_counter() - start]))


def measure(folder: Path, method: str, way: str, quick: bool) -> list[float]:
    """One run in a child process."""
    out = folder / f"out-{way}-{method}"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        __file__,
        "--child",
        way,
        "--folder",
        str(folder),
        "--methods",
        method,
    ]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    shutil.rmtree(out, ignore_errors=True)
    return [float(x) for x in json.loads(answer)]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="28 M parameters, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument(
        "--mergekit", action="store_true", help="run mergekit too (it must be installed)"
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", choices=("retouch", "mergekit"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run = ours if args.child == "retouch" else mergekit
        run(args.folder, args.methods, args.folder / f"out-{args.child}-{args.methods}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "models"
        if not (folder / "base").exists():
            make(folder, args.quick)
        total = sum(torch.Size(s).numel() for s in shapes(args.quick).values())
        print(f"base and three models of {total / 1e6:.0f} M bf16 parameters; {machine()}\n")
        rows = []
        for method in args.methods.split(","):
            found = [
                measure(folder, method, "retouch", args.quick)
                for _ in range(1 if args.quick else args.rounds)
            ]
            wall, cpu, peak, moved, pieces = (
                statistics.median(c) for c in zip(*found, strict=True)
            )
            row = [
                method,
                f"{wall:.2f}",
                f"{cpu:.2f}",
                f"{moved / wall / 1e9:.2f}",
                f"{peak:.0f}",
                f"{pieces / 1e6:.0f}",
            ]
            if args.mergekit:
                theirs = measure(folder, method, "mergekit", args.quick)[0]
                row += [f"{theirs:.1f}", f"{theirs / wall:.1f}x"]
            rows.append(row)
        columns = ["method", "wall s", "CPU s", "GB/s", "extra MB with maps", "planned MB"]
        table(columns + (["mergekit s", "times ours"] if args.mergekit else []), rows)


if __name__ == "__main__":
    main()
