"""The command line on real checkpoints: exact files, exit codes, one-line errors, bounded memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import retouch
from retouch.cli import app


def run(*args):
    """Exit code, standard output, standard error of `retouch ARGS`."""
    done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def checkpoint(folder: Path, seed_of_change: int | None, shards: str = "5GB", dtype=torch.bfloat16):
    model = llama(dtype)
    if seed_of_change is not None:
        gen = torch.Generator().manual_seed(seed_of_change)
        with torch.no_grad():
            for p in model.parameters():
                p[torch.rand(p.shape, generator=gen) < 0.02] += 0.5
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "notes.txt").write_text("goes along")
    return folder


def tensors(folder: Path):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return {
        n: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).tolist())
        for n, t in out.items()
    }


@pytest.fixture(params=["5GB", "20KB"], ids=["one-file", "shards"])
def pair(tmp_path, request):
    base = checkpoint(tmp_path / "base", None, request.param)
    tuned = checkpoint(tmp_path / "tuned", 3, request.param)
    return base, tuned


@pytest.mark.parametrize("reversible", [False, True])
def test_diff_apply_revert_verify(tmp_path, pair, reversible):
    base, tuned = pair
    flags = ["--reversible"] if reversible else []
    code, text, _ = run("diff", base, tuned, "-o", tmp_path / "d", *flags)
    assert code == 0 and "values in" in text and "wrote" in text
    assert run("verify", base, tmp_path / "d")[0] == 0
    code, text, _ = run("verify", tuned, tmp_path / "d")
    assert code == 1 and "tensors differ" in text
    assert run("verify", tuned, tmp_path / "d", "--result")[0] == 0

    assert run("apply", base, tmp_path / "d", "-o", tmp_path / "out")[0] == 0
    assert tensors(tmp_path / "out") == tensors(tuned)
    assert run("diff", tmp_path / "out", tuned)[0] == 0
    # the shards of the base, and everything that lies beside them
    names = sorted(p.name for p in base.iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16

    if not reversible:
        code, _, error = run("revert", tmp_path / "out", tmp_path / "d", "-o", tmp_path / "back")
        assert code == 2 and "--reversible" in error and "--base" in error
        assert not (tmp_path / "back").exists()
        flags = ["--base", base]
    else:
        flags = []
    code, _, error = run(
        "revert", tmp_path / "out", tmp_path / "d", "-o", tmp_path / "back", *flags
    )
    assert code == 0, error
    assert tensors(tmp_path / "back") == tensors(base)


def test_shards_do_not_change_a_delta(tmp_path):
    one = checkpoint(tmp_path / "one", None), checkpoint(tmp_path / "one-tuned", 3)
    many = (
        checkpoint(tmp_path / "many", None, "20KB"), checkpoint(tmp_path / "many-tuned", 3, "9KB")
    )  # fmt: skip
    for i, (base, tuned) in enumerate([one, many, (one[0], many[1])]):
        assert run("diff", base, tuned, "-o", tmp_path / f"d{i}")[0] == 0
    files = [(tmp_path / f"d{i}" / "delta.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] == files[2]


def test_python_and_command_line_write_the_same_delta(tmp_path, pair):
    base, tuned = pair
    run("diff", base, tuned, "-o", tmp_path / "rust", "--reversible")
    delta = retouch.Delta.between(base, tuned)
    delta.save_pretrained(tmp_path / "python", reversible=True)
    a, b = (load_file(tmp_path / w / "delta.safetensors") for w in ("rust", "python"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    c, d = (
        json.loads((tmp_path / w / "delta_config.json").read_text())["tensors"]
        for w in ("rust", "python")
    )
    assert c == d
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    retouch.Delta.load(tmp_path / "rust").apply_(model)
    want = AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").state_dict()
    assert all(torch.equal(t, want[n]) for n, t in model.state_dict().items())
    assert run("apply", base, tmp_path / "python", "-o", tmp_path / "out")[0] == 0
    assert tensors(tmp_path / "out") == tensors(tuned)


def test_diff_without_output_answers_like_diff(tmp_path, pair):
    base, tuned = pair
    code, text, _ = run("diff", base, base)
    assert code == 0 and text.startswith("no difference in")
    code, text, _ = run("diff", base, tuned, "--json")
    report = json.loads(text)
    assert code == 1 and report["changed"] > 0
    assert report["changed_tensors"] == len(report["config"]["tensors"])


def test_show(tmp_path, pair):
    base, tuned = pair
    run("diff", base, tuned, "-o", tmp_path / "d")
    code, text, _ = run("show", tmp_path / "d")
    assert code == 0 and "reversible without the base: no" in text and "embed_tokens" in text
    code, text, _ = run("show", tmp_path / "d", "--json")
    assert json.loads(text)["config"]["format_version"] == 1


def test_errors_are_one_line_and_leave_nothing(tmp_path, pair):
    base, tuned = pair
    run("diff", base, tuned, "-o", tmp_path / "d")
    other = checkpoint(tmp_path / "other", 5)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "x").write_text("x")
    cases = [
        (("apply", other, tmp_path / "d", "-o", tmp_path / "out"), "not the base"),
        (("apply", tmp_path / "nowhere", tmp_path / "d", "-o", tmp_path / "out"), "no such file"),
        (("apply", base, tmp_path / "nowhere", "-o", tmp_path / "out"), "no such file"),
        (("apply", base, tuned, "-o", tmp_path / "out"), "delta"),
        (("apply", base, tmp_path / "d", "-o", tmp_path / "occupied"), "overwrite"),
        (("apply", base, tmp_path / "d", "-o", base), "place of its own"),
        (("diff", base, tmp_path / "occupied"), "safetensors"),
        (("diff", "no-such-org/no-such-model", base), "Hub"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for args, part in cases:
        code, out, error = run(*args)
        assert code == 2, (args, out, error)
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert part in error, (part, error)
        assert sorted(p.name for p in tmp_path.iterdir()) == before, args
    assert tensors(base) != tensors(tuned)
    assert run("apply", other, tmp_path / "d", "-o", tmp_path / "out", "--force")[0] == 0
    assert run("apply", base, tmp_path / "d", "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert tensors(tmp_path / "out") == tensors(tuned)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("which", ["base", "delta"])
def test_truncated_files_are_refused(tmp_path, pair, share, which):
    base, tuned = pair
    run("diff", base, tuned, "-o", tmp_path / "d")
    folder = base if which == "base" else tmp_path / "d"
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    code, _, error = run("apply", base, tmp_path / "d", "-o", tmp_path / "out")
    assert code == 2 and path.name in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (10**15).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        (70).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'[:70],
    ],
)
def test_hostile_headers_are_refused(tmp_path, header):
    save_file({"x": torch.ones(2)}, tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(header)
    code, _, error = run("diff", tmp_path / "good.safetensors", tmp_path / "bad.safetensors")
    assert code == 2 and "bad.safetensors" in error, error


def test_hostile_deltas_are_refused(tmp_path, pair):
    base, tuned = pair
    run("diff", base, tuned, "-o", tmp_path / "d")
    config_path = tmp_path / "d" / "delta_config.json"
    config = json.loads(config_path.read_text())
    name = next(iter(config["tensors"]))
    for change in (
        {"format_version": 99}, {"format": "x"}, {"tensors": {name: {}}},
        {"tensors": {name: config["tensors"][name] | {"shape": [1]}}},
        {"tensors": {name: config["tensors"][name] | {"count": 10**18}}},
        {"tensors": {name: config["tensors"][name] | {"index_encoding": "zip"}}},
    ):  # fmt: skip
        config_path.write_text(json.dumps(config | change))
        code, _, error = run("apply", base, tmp_path / "d", "-o", tmp_path / "out")
        assert code == 2 and not (tmp_path / "out").exists(), (change, error)


def big(path: Path, seed: int) -> None:
    """Six tensors of 24 MB."""
    rng = np.random.default_rng(0)
    state = {
        f"w{i}": torch.from_numpy(rng.standard_normal((2000, 3000), dtype=np.float32))
        for i in range(6)
    }
    if seed:
        for t in state.values():
            t.view(-1)[seed::100] += 1
    path.mkdir()
    save_file(state, path / "model.safetensors")


MEMORY = """
import sys, json
from retouch import _core
def anonymous():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))
import threading, time
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
base, tuned, d, out, back = sys.argv[1:]
_core.diff_files(base, tuned, d, reversible=True)
_core.apply_files(base, d, out)
_core.revert_files(out, d, back)
print(peak[0] - start)
"""


def test_memory_is_bounded_by_a_few_tensors(tmp_path):
    """144 MB of weights; the engine may hold two tensors' worth (48 MB) of anonymous memory."""
    big(tmp_path / "base", 0)
    big(tmp_path / "tuned", 7)
    args = [str(tmp_path / n) for n in ("base", "tuned", "d", "out", "back")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60_000, f"{done.stdout} kB"
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "model.safetensors"
    ).read_bytes()


def test_a_killed_command_leaves_nothing_under_the_name(tmp_path):
    big(tmp_path / "base", 0)
    big(tmp_path / "tuned", 7)
    assert run("diff", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "d")[0] == 0
    out = tmp_path / "out"
    code = "from retouch.cli import main; print('ready', flush=True); main()"
    args = ["apply", tmp_path / "base", tmp_path / "d", "-o", out]
    for delay in (0.0, 0.02, 0.05):
        child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if out.exists():  # it was quicker than the signal: then it is whole
            assert run("diff", out, tmp_path / "tuned")[0] == 0
            break


def test_a_full_disk_leaves_nothing(tmp_path):
    big(tmp_path / "base", 0)
    big(tmp_path / "tuned", 7)
    assert run("diff", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "d")[0] == 0
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from retouch.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "main()\n"
    )
    args = ["apply", tmp_path / "base", tmp_path / "d", "-o", tmp_path / "out"]
    before = sorted(os.listdir(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_recipes():
    code, text, _ = run("recipes")
    assert code == 0 and "fish" in text
    code, text, _ = run("recipes", "fish")
    assert code == 0 and "2111.09839" in text and "@misc{" in text
    for part in (
        "scores: sum of squared",
        "budget: density=0.005",
        "when: once",
        "cost: ",
        "source: ",
    ):
        assert part in text
    code, text, _ = run("recipes", "magnitude")
    assert code == 0 and "arXiv" not in text
    code, text, _ = run("recipes", "--markdown")
    assert code == 0 and "| `fish` | FISH Mask | [2111.09839]" in text
    code, _, error = run("recipes", "fihs")
    assert code == 2 and "fish" in error


def test_help_is_quick_to_read_and_complete():
    code, text, _ = run("--help")
    assert code == 0
    for command in ("diff", "show", "apply", "revert", "verify", "recipes", "demo"):
        assert command in text
        assert run(command, "--help")[0] == 0
