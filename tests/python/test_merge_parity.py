"""mergekit 0.1.5 beside ours: the same file of YAML, the same checkpoints, the same weights.

It is one of the packages of the `test` extra and runs as it is.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import llama

import retouch
from retouch.merge.sources import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's dependencies

MODELS = ("base", "one", "two", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Four Llamas in shards: a base and three fine-tunes of it."""
    out = tmp_path_factory.mktemp("models")
    for number, name in enumerate(MODELS):
        model = llama(num_hidden_layers=3)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=generator) * (0.02 if number else 0.0)
        model.save_pretrained(out / name, max_shard_size="60KB")
        assert len(list((out / name).glob("*.safetensors"))) > 1
    return out


def theirs(text: str, out: Path) -> Checkpoint:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False, random_seed=0))
    return Checkpoint(out)


def both(text: str, folder: Path, out: Path, **options: Any) -> tuple[Checkpoint, Checkpoint]:
    for name in MODELS:
        text = text.replace(f"<{name}>", str(folder / name))
    config = out / "config.yml"
    config.write_text(text)
    retouch.merge(config, out / "ours", **options)
    return Checkpoint(out / "ours"), theirs(text, out / "theirs")


TASKS = """
merge_method: METHOD
base_model: <base>
models:
  - model: <one>
    parameters: {weight: [0.7, 0.3], density: [0.9, 0.4]}
  - model: <two>
    parameters: {weight: {filter: mlp, value: 0.5}, density: 0.6}
  - model: <three>
parameters: {weight: 0.4, EXTRA}
dtype: float32
"""
PAIR = """
merge_method: METHOD
base_model: <base>
models: [{model: <base>}, {model: <one>}]
parameters: {EXTRA}
dtype: float32
"""
FREE = """
merge_method: METHOD
models:
  - {model: <one>, parameters: {weight: 0.7}}
  - {model: <two>, parameters: {weight: [0.1, 0.6]}}
parameters: {EXTRA}
dtype: float32
"""
CASES = {
    "linear": (FREE, "linear", ""),
    "linear-sum": (FREE, "linear", "normalize: false"),
    "linear-base": (TASKS, "linear", ""),
    "slerp": (PAIR, "slerp", "t: [{filter: self_attn, value: [0, 1]}, {value: 0.3}]"),
    "nuslerp": (FREE, "nuslerp", ""),
    "nuslerp-base": (FREE + "base_model: <base>\n", "nuslerp", ""),
    "nuslerp-rows": (FREE, "nuslerp", "nuslerp_flatten: false, nuslerp_row_wise: true"),
    "multislerp": (FREE, "multislerp", ""),
    "multislerp-base": (TASKS, "multislerp", ""),
    "karcher": (FREE, "karcher", ""),
    "task_arithmetic": (TASKS, "task_arithmetic", "lambda: 0.8"),
    "task_arithmetic-mean": (TASKS, "task_arithmetic", "normalize: true"),
    "ties": (TASKS, "ties", "lambda: 1.2"),
    "ties-sum": (TASKS, "ties", "normalize: false"),
    "breadcrumbs": (TASKS, "breadcrumbs", "gamma: 0.05"),
    "breadcrumbs_ties": (TASKS, "breadcrumbs_ties", "gamma: 0.05, normalize: true"),
    "sce": (TASKS, "sce", "select_topk: 0.3"),
    "ram": (TASKS, "ram", ""),
    "ramplus_tl": (TASKS, "ramplus_tl", "r: 0.2"),
    "model_stock": (TASKS, "model_stock", ""),
    "model_stock-rows": (TASKS, "model_stock", "filter_wise: true"),
    "nearswap": (PAIR, "nearswap", "t: 0.005"),
    "arcee_fusion": (PAIR, "arcee_fusion", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_deterministic_methods(case: str, folder: Path, tmp_path: Path) -> None:
    text, method, extra = CASES[case]
    ours, reference = both(text.replace("METHOD", method).replace("EXTRA", extra), folder, tmp_path)
    assert ours.names() == reference.names()
    differ = {}
    for name in ours.names():
        a, b = ours.read(name), reference.read(name)
        assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
        if not torch.allclose(a, b, rtol=2e-5, atol=2e-6):
            differ[name] = (float((a - b).abs().max()), float((a != b).float().mean()))
    assert not differ


SLICED = """
merge_method: passthrough
slices:
  - sources: [{model: <one>, layer_range: [0, 2]}]
  - sources: [{model: <two>, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0.5}]}}]
dtype: bfloat16
"""
BLENDED = """
merge_method: slerp
base_model: <one>
slices:
  - sources:
      - {model: <one>, layer_range: [0, 3]}
      - {model: <two>, layer_range: [0, 3]}
parameters: {t: [0.1, 0.9]}
dtype: float32
out_dtype: float16
"""


@pytest.mark.parametrize("text", [SLICED, BLENDED], ids=["stacked", "blended"])
def test_slices(text: str, folder: Path, tmp_path: Path) -> None:
    ours, reference = both(text, folder, tmp_path)
    assert ours.names() == reference.names()
    for name in ours.names():
        a, b = ours.read(name), reference.read(name)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs")]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_agree_on_average(method: str, folder: Path, tmp_path: Path) -> None:
    """Masks differ, so norms of the merged differences are compared, of all tensors together."""
    text = TASKS.replace("METHOD", method).replace("0.4, EXTRA", "0.4, density: 0.5")
    text = text.replace("0.9, 0.4", "0.8, 0.4")  # density + epsilon must not pass 1
    ours, reference = both(text, folder, tmp_path)
    base = Checkpoint(folder / "base")
    norms = torch.zeros(2, 2)
    for name in base.names():
        if base.read(name).dim() == 2:
            for i, found in enumerate((ours, reference)):
                change = (found.read(name) - base.read(name)).flatten()
                norms[i] += torch.stack([change.abs().sum(), change.square().sum()])
    assert torch.allclose(norms[0], norms[1], rtol=0.05)
