"""`retouch.merge` and `retouch merge` on real checkpoints: folders that transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_merge_tokens import save_tokenizer
from tiny_hf import llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import retouch
from retouch import _core
from retouch.cli import app
from retouch.errors import BaseMismatchError, HyperparameterError
from retouch.merge import mergeview
from retouch.merge.plan import Plan

WORDS = {"base": "<unk> a b c", "one": "<unk> b a c d", "two": "<unk> a b e"}


def save(folder: Path, seed: int, words: str, **changes: Any) -> Path:
    model = llama(vocab_size=len(words.split()), num_hidden_layers=3, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * 0.01 * bool(seed)
    model.save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder, words)
    (folder / "README.md").write_text("of the base")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Fine-tunes of one base, with one vocabulary."""
    return {n: save(tmp_path / n, i, WORDS["base"]) for i, n in enumerate(("base", "one", "two"))}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def run(*args: Any) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def config(models: dict[str, Path], **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(models["base"]),
        "models": [
            {"model": str(models["one"]), "parameters": {"weight": [0.5, 1.0]}},
            {"model": str(models["two"]), "parameters": {"weight": 0.25}},
        ],
    } | changes


def test_a_configuration_becomes_a_model(models: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = retouch.merge(
        config(models), tmp_path / "out", max_shard_size=60_000, max_ram=400_000,
        progress=lambda done, total, name: seen.append((done, total)),
    )  # fmt: skip
    out = weights(tmp_path / "out")
    base, one, two = (weights(models[n]) for n in ("base", "one", "two"))
    assert out.keys() == base.keys() and seen[-1] == (len(out), len(out))
    for name, t in (("model.layers.1.mlp.up_proj.weight", 0.75), ("lm_head.weight", 0.5)):
        want = base[name] + t * (one[name] - base[name]) + 0.25 * (two[name] - base[name])
        torch.testing.assert_close(out[name], want, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight.detach(), out["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == {
        "<unk>": 0,
        "a": 1,
        "b": 2,
        "c": 3,
    }
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert made.report is not None and made.report.warnings == ()
    row = {r.name: r for r in made.report.tensors}["lm_head.weight"]
    assert row.ratio is not None and 0.4 < row.ratio < 0.8
    kept = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert kept["untouched"] == [] and len(kept["tensors"]) == len(out)


def test_the_card_says_how_to_make_it_again(models: dict[str, Path], tmp_path: Path) -> None:
    wanted = config(models, merge_method="dare_linear", parameters={"density": 0.5})
    retouch.merge(wanted, tmp_path / "out", seed=7)
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["merge", "retouch"]
    given, made = (
        yaml.safe_load(part)
        for part in body.split("```yaml\n")[1:][:2]
        for part in [part.split("```")[0]]
    )
    assert made["seed"] == 7 and made["dialect"] == "mergekit"
    assert made["versions"]["retouch"] == retouch.__version__
    hashes = made["inputs"][str(models["one"])]["blake3"]
    files = sorted(models["one"].glob("*.safetensors"))
    assert hashes == {file.name: _core.file_hash(file) for file in files}
    # what the card says gives the same bytes
    retouch.merge(given, tmp_path / "again", seed=made["seed"])
    first, second = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.equal(first[n], second[n]) for n in first)
    other = retouch.merge(given, tmp_path / "other", seed=8)
    assert not torch.equal(weights(other.out)["lm_head.weight"], first["lm_head.weight"])
    plan = Plan.from_json((tmp_path / "out" / "merge_plan.json").read_text())
    assert plan.seed == 7 and len(plan.tensors) == len(first)
    assert (tmp_path / "out" / "mergekit_config.yml").read_text().startswith("base_model")


def test_a_list_of_models(models: dict[str, Path], tmp_path: Path) -> None:
    pair = [models["one"], models["two"]]
    ways: list[dict[str, Any]] = [
        {"parameters": {"weight": 0.5, "density": 0.4}},
        {"parameters": [{"weight": 0.5, "density": 0.4}] * 2},
    ]
    outs = [
        retouch.merge(
            pair, tmp_path / str(i), method="ties", base=models["base"], dialect="mergekit", **way
        )
        for i, way in enumerate(ways)
    ]
    first, second = (weights(made.out) for made in outs)
    assert all(torch.equal(first[n], second[n]) for n in first)
    paper = retouch.merge(
        pair, tmp_path / "paper", method="ties", base=models["base"], parameters={"density": 0.4}
    )
    assert paper.result.tensors[0].dialect == "paper"
    assert not torch.equal(weights(paper.out)["lm_head.weight"], first["lm_head.weight"])
    with pytest.raises(HyperparameterError, match="got 1 for 2 models"):
        retouch.merge(pair, tmp_path / "x", method="linear", parameters=[{"weight": 1}])
    with pytest.raises(HyperparameterError, match="a method"):
        retouch.merge(pair, tmp_path / "x")
    with pytest.raises(HyperparameterError, match="go with a list of models"):
        retouch.merge(config(models), tmp_path / "x", method="ties")
    with pytest.raises(HyperparameterError, match="did you mean 'ties'"):
        retouch.merge(pair, tmp_path / "x", method="tiess")
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_deltas_and_adapters_are_models(models: dict[str, Path], tmp_path: Path) -> None:
    code, _, _ = run("diff", models["base"], models["one"], "-o", tmp_path / "delta")
    assert code == 1 or code == 0
    whole = retouch.merge(config(models), tmp_path / "whole")
    entry = {"model": str(tmp_path / "delta"), "parameters": {"weight": [0.5, 1.0]}}
    asked = config(models)
    thin = retouch.merge(asked | {"models": [entry, asked["models"][1]]}, tmp_path / "thin")
    a, b = weights(whole.out), weights(thin.out)
    assert all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(HyperparameterError, match="base_model must say"):
        retouch.merge(
            [tmp_path / "delta"], tmp_path / "x", method="linear", parameters={"weight": 1}
        )

    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(models["one"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    name = "model.layers.2.self_attn.q_proj.weight"
    want = tuned.merge_and_unload().state_dict()[name]
    made = retouch.merge(
        {
            "merge_method": "passthrough",
            "models": [{"model": f"{models['one']}+{tmp_path / 'adapter'}"}],
        },
        tmp_path / "merged",
    )
    torch.testing.assert_close(weights(made.out)[name], want, rtol=1e-5, atol=1e-7)


def test_layers_are_stacked(models: dict[str, Path], tmp_path: Path) -> None:
    slices = [
        {"sources": [{"model": str(models["one"]), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(models["two"]), "layer_range": [1, 3]}]},
    ]
    made = retouch.merge(
        {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}, tmp_path / "out"
    )
    model = AutoModelForCausalLM.from_pretrained(made.out, dtype="auto")
    assert model.config.num_hidden_layers == 5 and model.dtype == torch.bfloat16
    two = weights(models["two"])["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight.detach(), two.bfloat16())


def test_vocabularies_are_united(tmp_path: Path) -> None:
    folders = {n: save(tmp_path / n, i, WORDS[n]) for i, n in enumerate(WORDS)}
    with pytest.raises(BaseMismatchError, match="tokenizer_source"):
        retouch.merge(config(folders), tmp_path / "out")
    (folders["base"] / "vocab.json").write_text("out of date")
    asked = config(folders, tokenizer_source="union", chat_template="chatml")
    made = retouch.merge(asked, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(made.out)
    assert tokenizer.get_vocab() == {t: i for i, t in enumerate(["<unk>", "a", "b", "c", "d", "e"])}
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|im_start|>user\nhi<|im_end|>\n"
    model = AutoModelForCausalLM.from_pretrained(made.out)
    assert model.config.vocab_size == 6 and model.lm_head.weight.shape[0] == 6
    assert not (made.out / "vocab.json").exists()
    base, one, two = (weights(folders[n])["lm_head.weight"] for n in WORDS)
    out = weights(made.out)["lm_head.weight"]
    # `a` is the second row of the base and the third of the other: weights as outside the layers
    torch.testing.assert_close(
        out[1], base[1] + 0.5 * (one[2] - base[1]) + 0.25 * (two[1] - base[1])
    )
    torch.testing.assert_close(out[4], one[4])  # only one has `d`, so all start from its row
    assert any("lacked 2 tokens" in note for note in made.result.notes)
    with pytest.raises(HyperparameterError, match="did you mean 'chatml'"):
        retouch.merge(asked | {"chat_template": "chatm"}, tmp_path / "x")


def test_a_budget_counts_aligned_vocabularies(tmp_path: Path) -> None:
    folders = {n: save(tmp_path / n, i, WORDS[n], hidden_size=256) for i, n in enumerate(WORDS)}
    asked = config(folders, tokenizer_source="union")
    whole = retouch.merge(asked, tmp_path / "x")
    with pytest.raises(HyperparameterError, match="that is the least for this merge") as found:
        retouch.merge(asked, tmp_path / "y", max_ram=8000)
    # three copies of 6 rows of 256 floats, and what is made of a row
    least = int(found.value.args[0].split(" needs ")[1].split(" ")[0].replace(",", "").rstrip(":"))
    assert "embed_tokens" in str(found.value) or "lm_head" in str(found.value)
    assert least > 3 * 6 * 256 * 4 and not (tmp_path / "y").exists()
    with pytest.raises(HyperparameterError, match="the least"):
        retouch.merge(asked, tmp_path / "y", max_ram=least - 1)
    retouch.merge(asked, tmp_path / "y", max_ram=least)
    assert weights(whole.out).keys() == weights(tmp_path / "y").keys()
    for name, want in weights(whole.out).items():
        assert torch.equal(weights(tmp_path / "y")[name], want)


def test_a_head_of_its_own_unties(tmp_path: Path) -> None:
    folders = {
        "base": save(tmp_path / "base", 0, WORDS["base"], tie_word_embeddings=True),
        "one": save(tmp_path / "one", 1, WORDS["base"]),
        "two": save(tmp_path / "two", 2, WORDS["base"]),
    }
    made = retouch.merge(config(folders), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(made.out)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight.detach(), weights(made.out)["lm_head.weight"])
    assert any("stands in" in note for note in made.result.notes)


def test_command_line(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config(models)))
    code, out, _ = run("merge", file)
    assert code == 0 and "tensors by task_arithmetic" in out and not (tmp_path / "out").exists()
    code, out, _ = run("merge", file, "-o", tmp_path / "out", "--max-ram", "1MB", "--seed", 3)
    assert code == 0 and "wrote" in out and "moved farthest" in out
    code, _, err = run("merge", file, "-o", tmp_path / "out")
    assert code == 2 and err.startswith("error: ")
    code, out, _ = run("merge", file, "-o", tmp_path / "out", "--overwrite", "--json")
    assert code == 0 and json.loads(out)["report"]["warnings"] == []
    code, _, err = run("merge", file, "--dialect", "papr")
    assert code == 2 and "no dialect 'papr'" in err and "did you mean 'paper'" in err
    file.write_text(file.read_text().replace("weight", "wieght"))
    code, _, err = run("merge", file)
    assert code == 2 and "did you mean 'weight'" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "bytes_"), [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1024", 1024)]
)
def test_sizes(text: str, bytes_: int) -> None:
    assert mergeview.size(text) == bytes_
    with pytest.raises(HyperparameterError, match="wanted one such as 8GB"):
        mergeview.size("much")
