"""Merges of LoRA factors: what PEFT loads is what the methods say, with a base and without."""

import json
import shutil

import pytest
import torch
from deltas import llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import retouch
from retouch.cli import app
from retouch.errors import FormatError, HyperparameterError
from retouch.merge import adapters
from retouch.merge.sources import Adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
FILE = "adapter_model.safetensors"


def lora(base, folder, seed, **options):
    torch.manual_seed(seed)
    config = dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**config | options)
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and three adapters of it."""
    root = tmp_path_factory.mktemp("adapters")
    llama().save_pretrained(root / "base")
    return root / "base", [lora(root / "base", root / f"lora{i}", i) for i in range(3)]


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


def factors(folder):
    held = load_file(folder / FILE)
    for key in sorted(held):
        if ".lora_A." in key:
            yield key, held[key], held[key.replace(".lora_A.", ".lora_B.")]


CASES = {
    "robust_merge": (
        {"density": 0.5, "tail": 0.25},
        lambda pairs: adapters.robust_merge(pairs, 0.5, 0.25),
    ),
    "mos": (
        {"momentum": 0.2},
        lambda pairs: tuple(
            0.8 * side[-1].double() + 0.2 * (side[0].double() + side[1].double()) / 2
            for side in zip(*pairs, strict=True)
        ),
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_peft_loads_the_merged_adapter_and_it_is_the_merged_model(folders, tmp_path, method):
    base, loras = folders
    shared, expected = CASES[method]
    made = retouch.merge(loras, tmp_path / "lora", method=method, shared=shared)
    assert {FILE, "adapter_config.json", "merge_report.json"} <= set(made.result.files)
    assert len(made.result.tensors) == 8
    for (key, a, b), *rest in zip(factors(tmp_path / "lora"), *map(factors, loras), strict=True):
        assert all(key == other for other, *_ in rest)
        want_a, want_b = expected([(a, b) for _, a, b in rest])
        torch.testing.assert_close(a, want_a.float())
        torch.testing.assert_close(b, want_b.float())
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    loaded = logits(peft.PeftModel.from_pretrained(plain, tmp_path / "lora"))
    assert not torch.allclose(loaded, before, atol=1e-3)
    over = retouch.merge(loras, tmp_path / "model", base=base, method=method, shared=shared)
    merged = logits(AutoModelForCausalLM.from_pretrained(over.out))
    torch.testing.assert_close(merged, loaded, rtol=1e-4, atol=1e-5)
    norm = "model.norm.weight"
    kept = load_file(over.out / "model.safetensors")[norm]
    assert torch.equal(kept, load_file(base / "model.safetensors")[norm])


def test_other_scales_are_brought_to_the_first(folders, tmp_path):
    _, loras = folders
    other = tmp_path / "other"
    other.mkdir()
    held = load_file(loras[1] / FILE)
    halved = {key: t / 2 if ".lora_B." in key else t for key, t in held.items()}
    save_file(halved, other / FILE)
    config = json.loads((loras[1] / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 12}))
    for name, pair in (("x", loras[:2]), ("y", [loras[0], other])):
        retouch.merge(pair, tmp_path / name, method="robust_merge")
    x, y = (load_file(tmp_path / name / FILE) for name in "xy")
    assert all(torch.equal(x[key], y[key]) for key in x)


def test_the_report_compares_what_adapters_add(folders, tmp_path):
    _, loras = folders
    made = retouch.merge(loras[:2], tmp_path / "out", method="robust_merge")
    found = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert found == json.loads(json.dumps(made.report.to_dict()))
    (warning,) = made.report.warnings  # its scales for weak ranks
    assert "moved farther than any model did" in warning and "normalize" not in warning
    opened = [Adapter(folder) for folder in [tmp_path / "out", *loras[:2]]]
    assert len(made.report.tensors) == len(opened[0].keys)
    for row in made.report.tensors:
        norms = []
        for one in opened:
            f = one.factors(row.name)
            norms.append(float((f.scale * f.b.double() @ f.a.double()).norm()))
        assert [row.change, *row.changes] == pytest.approx(norms, rel=1e-6)
        assert row.bad == 0 and row.ratio == pytest.approx(norms[0] / max(norms[1:]), rel=1e-6)
    retouch.merge(loras[:2], tmp_path / "quiet", method="robust_merge", report=False)
    assert not (tmp_path / "quiet" / "merge_report.json").exists()

    loud = tmp_path / "loud"
    loud.mkdir()
    (loud / "adapter_config.json").write_text((loras[0] / "adapter_config.json").read_text())
    save_file({k: t * 1e6 for k, t in load_file(loras[0] / FILE).items()}, loud / FILE)
    command = ["merge", str(tmp_path / "c.yml"), "-o", str(tmp_path / "half")]
    (tmp_path / "c.yml").write_text(
        "merge_method: robust_merge\nout_dtype: float16\n"
        f"models: [{{model: {loud}}}, {{model: {loras[1]}}}]\n"
    )
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "values are NaN or infinite" in done.output, done.output
    plan = CliRunner().invoke(app, command[:2])
    assert plan.exit_code == 2 and "no plan to show" in plan.output, plan.output


def test_a_configuration_on_the_command_line(folders, tmp_path):
    _, loras = folders
    (tmp_path / "c.yml").write_text(
        "merge_method: mos\nmodels:\n"
        + "".join(f"  - model: {one}\n" for one in loras)
        + "parameters:\n  momentum:\n    - filter: up_proj\n      value: 1.0\n    - value: 0.0\n"
    )
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "c.yml"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    every = [load_file(folder / FILE) for folder in loras]
    for key, tensor in load_file(tmp_path / "out" / FILE).items():
        earlier = (every[0][key].double() + every[1][key].double()) / 2
        want = earlier.float() if "up_proj" in key else every[2][key]
        torch.testing.assert_close(tensor, want)


def test_what_does_not_fit_is_named_and_nothing_is_written(folders, tmp_path):
    base, loras = folders
    out = tmp_path / "out"

    def refused(error, match, models, **options):
        with pytest.raises(error, match=match):
            retouch.merge(models, out, **{"method": "robust_merge"} | options)
        assert not out.exists()

    fewer = lora(base, tmp_path / "fewer", 5, target_modules=["q_proj"])
    refused(FormatError, "up_proj.weight: .*fewer does not change it", [loras[0], fewer])
    refused(FormatError, "does not change it", [loras[0], fewer], base=base)
    wider = lora(base, tmp_path / "wider", 5, r=8)
    refused(FormatError, r"A \(8, 32\) .*one rank", [loras[0], wider])
    refused(HyperparameterError, "LoRA adapters, but .*base is none", [loras[0], base])
    whole = shutil.copytree(base, tmp_path / "whole")
    refused(HyperparameterError, "merges the factors", [loras[0], whole], base=base)
    refused(HyperparameterError, "merges 2 or more", loras[:1], method="mos")
    refused(HyperparameterError, "gradients", loras, shared={"density": [0.1, 0.2]})
    refused(HyperparameterError, "the least for this merge", loras, max_ram=1000)
    refused(HyperparameterError, "the least for this merge", loras, max_ram=1000, base=base)
    refused(HyperparameterError, "no parameter 'momentun'", loras, shared={"momentun": 1.0})
