"""Merging a base and three fine-tunes of 495 M bf16 parameters, beside mergekit where it is installed.

    python tests/bench/bench_merge.py [--quick] [--methods ties,linear] [--mergekit] [--max-ram 256MB]
                                      [--out /dev/shm] [--floor]

Both programs get the same file of YAML and run as their users run them, each merge in a process of its own
with a warm page cache, one after the other in every round. Wall and CPU time are those of the whole
process, imports and the flush to disk included (mergekit does not flush); "beyond start-up" is the wall
time less that of a process that only reads the configuration and plans (ours) or only imports (mergekit).
"anonymous" is the most memory beside maps of files that was seen (every 10 ms); ours is given less what
the program holds when it has only read the configuration. Checkpoints are
made once in a folder (--folder, default: a temporary one). mergekit runs in the first round only, since
most of its merges take minutes (--mergekit-rounds for more). Both have made a small merge before, so that
Python finds its modules compiled.

--floor adds what no merge of ours can do without, each part alone on all threads: hashing the inputs,
reading them once, writing the output, and (DARE) one random number for each element of each model.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from harness import machine, spread, table
from safetensors import safe_open
from safetensors.torch import save_file

from retouch import _core

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


def write_config(folder: Path, method: str) -> Path:
    """What both programs are given."""
    models = [
        {"model": str(folder / m), "parameters": {"weight": w} | METHODS[method]}
        for m, w in zip(MODELS, WEIGHTS, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        recipe["base_model"] = str(folder / "base")
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def command(way: str, config: Path, out: Path | None, max_ram: str | None) -> list[str]:
    """The command line of a program; without `out` it only reads the configuration (ours)."""
    if way == "mergekit":
        options = ["--no-copy-tokenizer", "--quiet", "--random-seed", "0"]
        return [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out), *options]
    line = [sys.executable, "-c", "from retouch.cli import main; main()", "merge", str(config)]
    if out is not None:
        line += ["-o", str(out), "--no-report"]  # mergekit makes none
    return line + (["--max-ram", max_ram] if max_ram else [])


def watched(line: list[str]) -> tuple[float, float, float]:
    """Runs a program: seconds, CPU seconds, most anonymous memory in MB."""
    start = time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
        peak = 0
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            try:
                text = Path(f"/proc/{child.pid}/status").read_text()
                peak = max(peak, int(text.split("RssAnon:")[1].split()[0]))
            except (OSError, IndexError):
                pass  # it has just ended
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(line)}: exit {child.returncode}\n{log.read().decode()}")
    return seconds, usage.ru_utime + usage.ru_stime, peak * 1024 / 1e6


def start_up(way: str, config: Path) -> list[float]:
    """What a program takes before it merges: ours reads the configuration and plans, mergekit imports."""
    if way == "retouch":
        return list(watched(command(way, config, None, None)))
    return list(watched([sys.executable, "-m", "mergekit.scripts.run_yaml", "--help"]))


def measure(folder: Path, out: Path, method: str, way: str, max_ram: str | None) -> list[float]:
    """One merge: seconds, those beyond start-up, CPU seconds, anonymous MB (ours: beyond start-up)."""
    out = out / f"out-{way}-{method}"
    shutil.rmtree(out, ignore_errors=True)
    config = write_config(folder, method)
    before, _, rest = start_up(way, config)
    seconds, cpu, peak = watched(command(way, config, out, max_ram))
    shutil.rmtree(out)
    return [seconds, seconds - before, cpu, peak - (rest if way == "retouch" else 0)]


def floor(folder: Path, out: Path, quick: bool) -> list[tuple[str, Callable[[], None]]]:
    """What nothing avoids, each part on all threads."""
    files = [f for m in ("base", *MODELS) for f in sorted((folder / m).glob("*.safetensors"))]
    sizes = [torch.Size(s).numel() for s in shapes(quick).values()]
    bits = torch.zeros(8 * -(-max(sizes) // 64), dtype=torch.uint8)
    block = bytes(4 << 20)

    def spread_out(work: Callable[[Path], object], over: Iterable[Path]) -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(work, over))

    def read(file: Path) -> None:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                tensors.get_tensor(name).view(torch.int16).max()

    def write(file: Path) -> None:
        rest = 2 * sum(sizes) // torch.get_num_threads()
        with open(file, "wb", buffering=0) as to:
            while rest:
                rest -= to.write(block[:rest])
        file.unlink()

    def draw() -> None:
        for model in MODELS:
            for i, n in enumerate(sizes):
                _core.draw_(bits[: 8 * -(-n // 64)], 0, f"{model} {i}", 0.2)

    parts = [out / f"part-{i}" for i in range(torch.get_num_threads())]
    return [
        ("hash the inputs", lambda: spread_out(_core.file_hash, files)),
        ("read them once", lambda: spread_out(read, files)),
        ("write the output", lambda: spread_out(write, parts)),
        ("draw three masks", draw),
    ]


def floor_rows(folder: Path, out: Path, quick: bool, rounds: int) -> list[list[str]]:
    """Wall and CPU seconds of each part, the fastest round."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    rows, total = [], [0.0, 0.0]
    for name, part in floor(folder, out, quick):
        best = [float("inf"), float("inf")]
        for _ in range(rounds + 1):
            wall, before = time.perf_counter(), cpu()
            part()
            best = [min(best[0], time.perf_counter() - wall), min(best[1], cpu() - before)]
        total = [total[0] + best[0], total[1] + best[1]]
        rows.append([name, f"{best[0]:.2f}", f"{best[1]:.2f}"])
    return [*rows, ["together", f"{total[0]:.2f}", f"{total[1]:.2f}"]]


def warm_up(folder: Path, ways: list[str]) -> None:
    """A small merge by each program."""
    small = folder / "small"
    make(small, quick=True)
    for way in ways:
        watched(command(way, write_config(small, "ties"), small / f"out-{way}", None))
    shutil.rmtree(small)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="28 M parameters, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument(
        "--mergekit", action="store_true", help="run mergekit too (it must be installed)"
    )
    parser.add_argument("--mergekit-rounds", type=int, default=1)
    parser.add_argument("--max-ram", help="the budget that ours is given")
    parser.add_argument("--folder", type=Path, help="of the checkpoints, kept; made if missing")
    parser.add_argument("--out", type=Path, help="where results go; /dev/shm: no disk has a part")
    parser.add_argument("--floor", action="store_true", help="add what no merge can do without")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "models"
        if not (folder / "base").exists():
            make(folder, args.quick)
        total = sum(torch.Size(s).numel() for s in shapes(args.quick).values())
        print(f"base and three models of {total / 1e6:.0f} M bf16 parameters; {machine()}")
        print(
            f"max_ram: {args.max_ram or 'no limit'}; results in {args.out or 'the same folder'}\n"
        )
        warm_up(folder, ["retouch", *(["mergekit"] if args.mergekit else [])])
        rows = []
        for method in args.methods.split(","):
            mine, theirs = [], []
            for i in range(rounds):
                mine.append(measure(folder, args.out or folder, method, "retouch", args.max_ram))
                if args.mergekit and i < args.mergekit_rounds:
                    theirs.append(measure(folder, args.out or folder, method, "mergekit", None))
            columns = list(zip(*mine, strict=True))
            wall, merging, cpu, peak = map(statistics.median, columns)
            moved = 2 * total * (4 if method == "linear" else 5)
            row = [
                method, spread(list(columns[0])), f"{merging:.1f}", f"{moved / merging / 1e9:.2f}",
                f"{cpu:.1f}", f"{peak:.0f}",
            ]  # fmt: skip
            if theirs:
                other = [statistics.median(c) for c in zip(*theirs, strict=True)]
                row += [f"{other[0]:.1f}", f"{other[1]:.1f}", f"{other[2]:.1f}", f"{other[3]:.0f}"]
                ratios = zip(other[:3], (wall, merging, cpu), strict=True)
                row += [f"{a / b:.1f}x" for a, b in ratios]
            rows.append(row)
        names = ["method", "wall s", "beyond start-up s", "GB/s of it", "CPU s", "anonymous MB"]
        if args.mergekit:
            names += ["mergekit s", "beyond start-up s", "CPU s", "anonymous MB"]
            names += ["wall", "beyond start-up", "CPU"]
        table(names, rows)
        if args.floor:
            print()
            parts = floor_rows(folder, args.out or folder, args.quick, rounds)
            table(["what nothing avoids", "wall s", "CPU s"], parts)


if __name__ == "__main__":
    main()
