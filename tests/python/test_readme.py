"""The README does what it says: its code runs, its commands exist, its files are there."""

import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from test_demo import load
from tiny_hf import llama, tokens
from typer.testing import CliRunner

import retouch
from retouch import cli, demo_data

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LINES = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
]


def batches(count):
    """Batches as dicts of tensors."""
    samples = tokens(4 * count)
    for i in range(0, len(samples), 4):
        yield {k: torch.stack([s[k] for s in samples[i : i + 4]]) for k in samples[0]}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # what the blocks find: a model, batches, a dataset; they share what they define, so they run in order
    names = {"model": llama(), "batches": list(batches(6)), "dataset": tokens(64)}
    for number, code in enumerate(PYTHON):
        before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
        exec(compile(code, f"README.md, block {number + 1}", "exec"), names)
        if "save_pretrained" in code:
            delta = retouch.Delta.load(tmp_path / "my-delta")
            assert delta.count > 0
            assert {
                n for n in delta if torch.equal(before[n], names["model"].get_parameter(n))
            } == set()


def test_there_is_python_to_run():
    assert len(PYTHON) >= 3
    assert any("retouch.attach" in code for code in PYTHON)


def test_file_commands_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = demo_data.tiny_llama(tmp_path)
    model = load(base)
    with torch.no_grad():
        model.model.norm.weight[:3] += 1
    model.save_pretrained(tmp_path / "TUNED")
    base.rename(tmp_path / "BASE")
    commands = [
        line for line in LINES if re.match(r"retouch (diff|show|apply|revert|verify)", line)
    ]
    assert len(commands) >= 5
    for command in commands:
        done = CliRunner().invoke(cli.app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}: {done.output}"
    for made, wanted in (("OUT", "TUNED"), ("AGAIN", "BASE")):
        file = "model.safetensors"
        assert not retouch.Delta.between(tmp_path / made / file, tmp_path / wanted / file)


def test_named_commands_exist():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    named = set(re.findall(r"\bretouch ([a-z]+)\b", "\n".join(LINES)))
    assert named >= {"demo", "diff", "apply", "revert"}
    assert named <= known


def test_named_files_and_extras_exist():
    linked = re.findall(r"\]\(([^):]+)\)", README)
    for path in [*linked, "tests/run", "tests/run_dlpack"]:
        assert (ROOT / path).exists(), path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    extras = set(project["project"]["optional-dependencies"])
    assert set(re.findall(r'"\.\[(\w+)\]"', README)) <= extras
    requirements = "\n".join(project["build-system"]["requires"])
    assert re.search(r'pip install "(maturin[^"]+)"', README)[1] in requirements


def test_modules_that_hold_specifications_do():
    import retouch.compact
    import retouch.deltafile
    import retouch.maskfile

    for name in re.findall(r"`retouch\.(compact|deltafile|maskfile)`", README):
        assert len(inspect.getdoc(getattr(retouch, name))) > 200, name
