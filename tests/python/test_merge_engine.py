"""Merges of files: same bytes whatever the threads, shards, order and memory; nothing half-written."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deltas import llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import retouch
from retouch.errors import (
    BaseMismatchError,
    FormatError,
    HyperparameterError,
    LayoutError,
    ScoreError,
    ShapeError,
)
from retouch.merge import Plan, build, method_named, open_sources, run

METHODS = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.3},
    "dare_ties": {"weight": 0.5, "density": 0.4},
    "breadcrumbs": {"weight": 0.5, "density": 0.4, "gamma": 0.02},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "model_stock": {},
    "sce": {},
}


def state(seed, dtype=torch.bfloat16):
    """A fine-tune of the tiny Llama."""
    gen = torch.Generator().manual_seed(seed)
    model = llama(tie_word_embeddings=False, num_hidden_layers=3)
    if seed:
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=gen)
    return {n: t.to(dtype).contiguous() for n, t in model.state_dict().items()}


def save(folder, tensors, shards=1):
    folder.mkdir()
    model = llama(tie_word_embeddings=False, num_hidden_layers=3)
    model.config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same base and three fine-tunes as one file each, and in five shards in another order."""
    root = tmp_path_factory.mktemp("merge")
    for form, shards in (("one", 1), ("five", 5)):
        (root / form).mkdir()
        for i, name in enumerate(("base", "a", "b", "c")):
            tensors = state(i)
            if shards > 1:
                tensors = dict(reversed(tensors.items()))
            save(root / form / name, tensors, shards)
    return root


def plan_of(folder, method, **options):
    base = None if method == "linear" else folder / "base"
    return build(
        method, [folder / n for n in "abc"], base=base, parameters=METHODS[method], **options
    )


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "config.json"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dialect", ["paper", "mergekit"])
def test_same_bytes_whatever_threads_shards_order_and_memory(
    checkpoints, tmp_path, method, dialect
):
    if dialect not in method_named(method).dialects:
        pytest.skip("no such dialect")
    one = plan_of(checkpoints / "one", method, dialect=dialect)
    torch.set_num_threads(1)
    run(one, tmp_path / "x")
    want = files(tmp_path / "x")
    torch.set_num_threads(2)
    run(one, tmp_path / "threads")
    assert files(tmp_path / "threads") == want
    five = plan_of(checkpoints / "five", method, dialect=dialect)
    run(replace(five, tensors=tuple(reversed(five.tensors))), tmp_path / "shards")
    assert files(tmp_path / "shards") == want
    largest = max(t.numel() for t in state(0).values())
    for budget in (20 * largest, 80 * largest):
        try:
            result = run(one, tmp_path / str(budget), max_ram=budget)
        except HyperparameterError as e:
            assert "the whole tensor" in str(e) or "one row" in str(e)
            continue
        assert files(tmp_path / str(budget)) == want and result.piece_bytes <= budget


def test_a_budget_cuts_tensors_and_refuses_what_cannot_be_cut(checkpoints, tmp_path):
    plan = plan_of(checkpoints / "one", "ties", dialect="mergekit")
    run(plan, tmp_path / "x")
    result = run(plan, tmp_path / "y", max_ram=1024)  # a few rows of 32 at a time
    assert files(tmp_path / "x") == files(tmp_path / "y") and result.piece_bytes <= 1024
    with pytest.raises(HyperparameterError, match=r"max_ram is 16 bytes, but one row of .* needs"):
        run(plan, tmp_path / "z", max_ram=16)
    with pytest.raises(HyperparameterError, match="the whole tensor of"):
        run(plan_of(checkpoints / "one", "sce"), tmp_path / "z", max_ram=1024)
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("method", ["ties", "localize_stitch", "pcb", "emr", "opcm"])
def test_a_budget_is_for_the_passes_over_the_model_too(checkpoints, tmp_path, method):
    parameters = {"ties": {"weight": 0.5, "density": 0.3}}.get(method, {})
    shared = {"task": 1} if method == "emr" else {}
    plan = build(
        method, [checkpoints / "one" / n for n in "abc"], base=checkpoints / "one" / "base",
        parameters=parameters, shared=shared, dialect="paper",
    )  # fmt: skip
    whole = run(plan, tmp_path / "x")
    with pytest.raises(HyperparameterError, match="that is the least for this merge") as found:
        run(plan, tmp_path / "y", max_ram=1000)
    assert not (tmp_path / "y").exists()
    least = int(re.search(r"needs ([\d,]+)", str(found.value))[1].replace(",", ""))
    if method != "opcm":  # whose merge of a whole matrix needs more than a pass
        assert "in a pass over the whole model" in str(found.value)
    with pytest.raises(HyperparameterError, match=f"needs {least:,}"):
        run(plan, tmp_path / "y", max_ram=least - 1)
    result = run(plan, tmp_path / "y", max_ram=least)
    assert result.piece_bytes == least <= whole.piece_bytes
    assert files(tmp_path / "x") == files(tmp_path / "y")


def test_passes_see_stretches_where_the_budget_asks_for_it(checkpoints, tmp_path, monkeypatch):
    plan = build("pcb", [checkpoints / "one" / n for n in "abc"], base=checkpoints / "one" / "base")
    method, seen = method_named("pcb"), []
    observe = method.observe
    monkeypatch.setattr(
        type(method), "observe",
        lambda self, job: (seen.append(job.tensors[0].numel()), observe(job)),
    )  # fmt: skip
    run(plan, tmp_path / "x")
    whole = max(seen)
    seen.clear()
    bins = 8 << 16  # 12 histograms, 2 to settle one, and one to count with
    run(plan, tmp_path / "y", max_ram=15 * bins + method.memory(whole // 2, 3, "paper"))
    assert max(seen) <= whole // 2
    assert files(tmp_path / "x") == files(tmp_path / "y")


def test_the_output_is_a_model(checkpoints, tmp_path):
    plan = plan_of(checkpoints / "five", "task_arithmetic", max_shard_size=20_000)
    steps = []
    result = run(plan, tmp_path / "out", progress=lambda *a: steps.append(a))
    assert len(result.files) > 4 and "tokenizer.json" in result.files
    assert steps[-1][:2] == (len(plan.tensors), len(plan.tensors))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    got = model.state_dict()
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    for name, tensor in base.items():
        want = tensor.double() + sum(0.5 * (t[name].double() - tensor.double()) for t in tuned)
        torch.testing.assert_close(got[name].double(), want, atol=0.02, rtol=2.0**-8)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.bytes_written
    assert set(index["weight_map"]) == set(base)
    first = result.tensors[0]
    assert first.inputs[0].parameters == {"weight": 0.5} and first.dialect == "paper"
    json.dumps(result.to_dict())


def test_dtypes_and_extra_files(checkpoints, tmp_path):
    plan = plan_of(checkpoints / "one", "linear", out_dtype="float32")
    run(
        plan,
        tmp_path / "out",
        extra_files=lambda r: {"README.md": str(len(r.tensors)), "config.json": "{}"},
    )
    assert (tmp_path / "out/README.md").read_text() == str(len(plan.tensors))
    assert (tmp_path / "out/config.json").read_text() == "{}"
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {
        torch.float32
    }
    run(plan, tmp_path / "out2", extra_files={"tokenizer.json": None})
    assert not (tmp_path / "out2/tokenizer.json").exists()
    config = json.loads((tmp_path / "out2/config.json").read_text())
    assert config.get("dtype", "float32") == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out2", dtype="auto")
    assert loaded.dtype == torch.float32
    with pytest.raises(HyperparameterError, match="dtype must be one of"):
        run(replace(plan, out_dtype="float17"), tmp_path / "no")
    with pytest.raises(HyperparameterError, match="new or empty folder"):
        run(plan, tmp_path / "out")
    with pytest.raises(HyperparameterError, match="a place of its own"):
        run(plan, checkpoints / "one" / "a", overwrite=True)


def test_the_plan_is_text(checkpoints):
    plan = plan_of(checkpoints / "one", "ties")
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(FormatError, match="not a merge plan"):
        Plan.from_json("{}")


def test_bad_inputs_name_the_tensor(checkpoints, tmp_path):
    good = state(1)
    name = "model.layers.1.mlp.up_proj.weight"
    short = save(tmp_path / "short", good | {name: good[name][:-1].contiguous()})
    base = checkpoints / "one" / "base"
    with pytest.raises(ShapeError, match=r"up_proj.weight of short is \[63, 32\]"):
        run(build("task_arithmetic", [short], base=base), tmp_path / "out")
    nan = good[name].clone()
    nan[3, 4] = float("nan")
    bad = save(tmp_path / "bad", good | {name: nan})
    with pytest.raises(ScoreError, match=rf"{name} of bad is NaN at flat position 100"):
        run(build("task_arithmetic", [bad], base=base), tmp_path / "out")
    lacking = {n: t for n, t in good.items() if n != name}
    less = save(tmp_path / "less", lacking)
    with pytest.raises(FormatError, match="not in less"):
        build("task_arithmetic", [less], base=base)
    kept = build("task_arithmetic", [less], base=base, missing="base")
    run(kept, tmp_path / "kept")
    got = load_file(tmp_path / "kept/model.safetensors")
    assert torch.equal(got[name], state(0)[name]) and "missing" in kept.notes[0]
    assert name not in {
        t.name for t in build("task_arithmetic", [less], base=base, missing="drop").tensors
    }
    with pytest.raises(HyperparameterError, match="needs a base"):
        run(build("task_arithmetic", [less]), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".retouch-*"))


def test_tied_heads_and_buffers(checkpoints, tmp_path):
    tied = {n: t for n, t in state(2).items() if n != "lm_head.weight"}
    count = torch.arange(3)
    a = save(tmp_path / "a", tied | {"count": count})
    base = save(tmp_path / "base0", state(0) | {"count": count})
    plan = build("task_arithmetic", [a], base=base)
    assert any("tied" in n for n in plan.notes) and any("copied" in n for n in plan.notes)
    run(plan, tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(got["lm_head.weight"], tied["model.embed_tokens.weight"])
    assert torch.equal(got["count"], count)
    other = save(tmp_path / "other", state(2) | {"count": count + 1})
    with pytest.raises(FormatError, match="only floats are merged"):
        build("task_arithmetic", [other], base=base)
    forced = replace(plan.tensors[0], method="task_arithmetic", base=None)
    assert forced.name == "count"
    with pytest.raises(HyperparameterError, match="needs a base"):
        run(replace(plan, tensors=(forced,)), tmp_path / "no")
    base_input = replace(forced.inputs[0])
    with pytest.raises(LayoutError, match="merges floats"):
        run(replace(plan, tensors=(replace(forced, base=base_input),)), tmp_path / "no")


def test_sparse_deltas_are_merged_where_they_differ(checkpoints, tmp_path):
    base = checkpoints / "one" / "base"
    gen = torch.Generator().manual_seed(5)
    folders, deltas = [], []
    for i in range(2):
        tuned = {}
        for name, t in state(0).items():
            move = torch.rand(t.shape, generator=gen) < 0.05
            tuned[name] = torch.where(move, (t + 0.1).to(t.dtype), t)
        folders.append(save(tmp_path / f"full{i}", tuned))
        delta = retouch.Delta.between(base, folders[-1])
        delta.save_pretrained(tmp_path / f"delta{i}")
        deltas.append(tmp_path / f"delta{i}")
    for method in ("task_arithmetic", "ram", "magmax"):
        run(build(method, folders, base=base), tmp_path / f"{method}-full")
        result = run(build(method, deltas, base=base), tmp_path / f"{method}-delta")
        assert files(tmp_path / f"{method}-full") == files(tmp_path / f"{method}-delta")
        assert any("merged_on_supports" in t.notes for t in result.tensors)
    # a method that looks at whole tensors gets whole tensors
    run(
        build("ties", folders, base=base, dialect="mergekit", parameters={"density": 0.02}),
        tmp_path / "t1",
    )
    run(
        build("ties", deltas, base=base, dialect="mergekit", parameters={"density": 0.02}),
        tmp_path / "t2",
    )
    assert files(tmp_path / "t1") == files(tmp_path / "t2")
    with pytest.raises(BaseMismatchError):
        run(build("task_arithmetic", deltas, base=checkpoints / "one" / "a"), tmp_path / "no")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_are_widened(checkpoints, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "one" / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "lora")
    plan = build(
        "task_arithmetic",
        [tmp_path / "lora"],
        base=checkpoints / "one" / "base",
        out_dtype="float32",
    )
    run(plan, tmp_path / "out")
    want = model.merge_and_unload().state_dict()
    got = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(FormatError, match="use_dora is set"):
        open_sources(plan)


def test_a_killed_merge_leaves_nothing_under_its_name(checkpoints, tmp_path):
    script = textwrap.dedent("""
        import signal, sys, time
        from retouch.merge import build, run
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
        root, out = sys.argv[1:]
        plan = build("task_arithmetic", [f"{root}/a", f"{root}/b"], base=f"{root}/base")
        def progress(done, total, name):
            if done == 5:
                print("half", flush=True)
                time.sleep(60)
        run(plan, out, progress=progress)
    """)
    for kill in (signal.SIGKILL, signal.SIGINT):
        out = tmp_path / kill.name / "merged"
        command = [sys.executable, "-c", script, str(checkpoints / "one"), str(out)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"half\n"
            child.send_signal(kill)
            child.communicate(timeout=60)
            assert child.returncode != 0
        time.sleep(0.1)
        assert not out.exists()
        if kill == signal.SIGINT:
            assert not (tmp_path / kill.name).exists()  # not even the staging folder
