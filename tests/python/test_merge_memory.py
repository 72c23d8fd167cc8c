"""Merges of models in memory: the bits of a merge of files, beside mergekit's own function."""

from typing import Any

import pytest
import torch
from tiny_hf import llama

from retouch import Delta, errors, merge
from retouch.merge import merge_state_dicts
from retouch.merge.sources import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit's dependencies

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.4, "density": 0.3},
    "dare_ties": {"weight": 0.4, "density": 0.3},
    "breadcrumbs": {"weight": 0.4, "density": 0.3},
    "slerp": {},
}


def tuned(number: int, share: float = 1.0) -> torch.nn.Module:
    """A Llama; the same base, changed by a number's noise on a share of each weight."""
    model = llama()
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for p in model.parameters():
            noise = 0.02 * torch.randn(p.shape, generator=generator)
            p += noise * (torch.rand(p.shape, generator=generator) < share) * (number > 0)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {name: tuned(i, 0.1) for i, name in enumerate(("base", "one", "two"))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dialect", [None, "mergekit"])
def test_the_bits_of_a_merge_of_files(models, tmp_path, method, dialect):
    if method == "slerp":
        options: dict[str, Any] = {"base": "one", "shared": {"t": 0.3}}
        chosen = ["two"]
    else:
        options = {"parameters": METHODS[method]}
        options |= {} if method == "linear" else {"base": "base"}
        chosen = ["one", "two"]
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in models}
    files = options | ({"base": paths[options["base"]]} if "base" in options else {})
    written = merge(
        [paths[n] for n in chosen], tmp_path / "out", method=method, dialect=dialect, **files
    )
    found = Checkpoint(written.out)
    # the same ids: random masks depend on them
    given = {paths[n]: models[n] for n in chosen}
    options |= {"base": models[options["base"]]} if "base" in options else {}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in models.items()}
    out = merge_state_dicts(given, method, dialect=dialect, **options)
    assert {n for n in found.names()} <= set(out)
    for name in found.names():
        assert torch.equal(out[name], found.read(name)), name
    # whatever was given is left alone, and the result is no part of it
    assert all(same(before[n], m.state_dict()) for n, m in models.items())
    own = {t.untyped_storage().data_ptr() for m in models.values() for t in m.state_dict().values()}
    assert not own & {t.untyped_storage().data_ptr() for t in out.values()}
    assert not any(t.requires_grad for t in out.values())
    tuned(0).load_state_dict(out)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "breadcrumbs", "sce"])
def test_mergekit_in_memory_gives_the_same(models, method):
    from mergekit.merge_methods.api import merge_state_dicts as theirs

    # some weights tie (most do not change): what mergekit keeps of equals is its own affair
    some = {name: tuned(i) for i, name in enumerate(("base", "one", "two"))}
    parameters = METHODS.get(method, {"select_topk": 0.5})
    with torch.no_grad():
        if method == "linear":
            want = theirs({n: some[n] for n in ("one", "two")}, method, parameters=parameters)
        else:
            want = theirs(some, method, parameters=parameters, base="base")
    split = {"shared": parameters} if method == "sce" else {"parameters": parameters}
    base = {} if method == "linear" else {"base": some["base"]}
    got = merge_state_dicts([some["one"], some["two"]], method, dialect="mergekit", **base, **split)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-6, atol=2e-7, msg=name)


def test_deltas_are_merged_over_their_base(models):
    base = models["base"]
    deltas = [Delta.between(base, models[name]) for name in ("one", "two")]
    for method in ("task_arithmetic", "ties", "dare_ties"):
        options: dict[str, Any] = {"parameters": METHODS[method], "dialect": "mergekit"}
        whole = merge_state_dicts([models["one"], models["two"]], method, base=base, **options)
        assert same(merge_state_dicts(deltas, method, base=base, **options), whole)
        mixed = merge_state_dicts([deltas[0], models["two"]], method, base=base, **options)
        assert same(mixed, whole)
    with pytest.raises(errors.HyperparameterError, match="is a delta: give the base"):
        merge_state_dicts(deltas, "linear", parameters={"weight": 1.0})
    with pytest.raises(errors.BaseMismatchError, match=r"model 0: .* is not the one"):
        merge_state_dicts(deltas, "task_arithmetic", base=models["one"])


def test_names_seeds_and_dtypes():
    base = {"w": torch.zeros(4000, dtype=torch.bfloat16), "n": torch.tensor([3])}
    a, b = (base | {"w": base["w"] + x} for x in (1.0, 2.0))
    options: dict[str, Any] = {"base": base, "parameters": {"density": 0.5, "weight": 0.5}}
    out = merge_state_dicts({"x": a, "y": b}, "dare_linear", **options)
    assert out["w"].dtype == torch.bfloat16 and torch.equal(out["n"], base["n"])
    assert same(out, merge_state_dicts({"y": b, "x": a}, "dare_linear", **options))
    assert not same(out, merge_state_dicts({"x": a, "z": b}, "dare_linear", **options))
    assert not same(out, merge_state_dicts({"x": a, "y": b}, "dare_linear", seed=1, **options))
    wide = merge_state_dicts(
        {"x": a, "y": b}, "linear", parameters={"weight": 1.0}, out_dtype="float32"
    )
    assert wide["w"].dtype == torch.float32 and torch.equal(wide["w"], torch.full((4000,), 1.5))
    large = {"w": torch.zeros(5, (1 << 25) // 4 + 3)}  # made in two pieces
    large["w"][4, -1] = 2.0
    out = merge_state_dicts([large, {"w": large["w"] * 2}], "linear", parameters={"weight": 1.0})
    assert torch.equal(out["w"], large["w"] * 1.5)


def test_what_is_wrong_is_said(models):
    w = {"w": torch.ones(3)}
    wrong: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([], {}, errors.HyperparameterError, "at least one"),
        (w, {}, errors.HyperparameterError, "one state dict"),
        (models["one"], {}, errors.HyperparameterError, "several models"),
        ({"base": w}, {}, errors.HyperparameterError, "named 'base'"),
        ([w, {"w": torch.ones(4)}], {}, errors.ShapeError, r"w of 1 is \[4\]"),
        ([w, {"v": torch.ones(3)}], {}, errors.FormatError, "not in all models"),
        (
            [w, {"w": torch.tensor([1.0, float("nan"), 1.0])}],
            {},
            errors.ScoreError,
            "w of 1 is NaN",
        ),
        ([w, {"w": torch.ones(3, device="meta")}], {}, errors.EngineError, "without values"),
        ([w, {"w": torch.eye(3).to_sparse()}], {}, errors.EngineError, "only dense tensors"),
        ([w, {}], {}, errors.EngineError, "model 1 has no tensors"),
        (["one/", "two/"], {}, errors.HyperparameterError, "is a path: retouch.merge merges"),
        ([w, 3], {}, errors.EngineError, "a model or a state dict"),
        ([w, w], {"method": "tis"}, errors.HyperparameterError, "ties"),
        ([w, w], {"method": "ties"}, errors.HyperparameterError, "needs a base"),
        ([w, w], {"method": "robust_merge"}, errors.HyperparameterError, "factors of LoRA"),
        ([w, w], {"parameters": [{}]}, errors.HyperparameterError, "1 sets of parameters for 2"),
        ([w, w], {"parameters": {"wieght": 1.0}}, errors.HyperparameterError, "weight"),
        ([w, w], {"dialect": "megakit"}, errors.HyperparameterError, "has no dialect"),
        ([w, w], {"out_dtype": "int8"}, errors.HyperparameterError, "dtype must be one of"),
    ]
    for given, options, error, words in wrong:
        options = {"method": "linear", "parameters": {"weight": 1.0}} | options
        with pytest.raises(error, match=words):
            merge_state_dicts(given, options.pop("method"), **options)
