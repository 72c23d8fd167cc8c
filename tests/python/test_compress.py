"""Compressed deltas: what each coding means to the bit, what is refused, and a real tiny model."""

import json
import math

import pytest
import torch
from deltas import llama, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from retouch import Delta, _core, compress, deltachange, errors
from retouch.compress import BitDelta, Dare, LowRank, Magnitude, Quantise

A = torch.tensor([[0.5, -0.25, 0, 1, -0.125, 0.25]])
ALL = [
    (Magnitude(0.2),), (Dare(0.2, seed=3),), (BitDelta(),), (Quantise(8),), (Quantise(4, 32),),
    (LowRank(4),), (Magnitude(0.3), Quantise(4)), (Magnitude(0.3), BitDelta()),
    (Dare(0.5), Quantise(8)), (Magnitude(0.4), Dare(0.5), Quantise(8)), (Magnitude(0.2), LowRank(2)),
]  # fmt: skip


def tuned_llama(dtype=torch.float32, seed=0):
    """A model and a state dict in which every float tensor moved."""
    base = llama(tie_word_embeddings=False).to(dtype)
    gen = torch.Generator().manual_seed(seed)
    state = {
        n: t + (0.01 * torch.randn(t.shape, generator=gen)).to(dtype)
        for n, t in base.state_dict().items()
    }
    return base, state


def one(delta):
    return delta["w"]


def small(*steps, dtype=torch.float32, tuned=1 + A):
    base = {"w": torch.ones(tuned.shape, dtype=dtype)}
    return base, Delta.between(base, {"w": tuned.to(dtype)}).compress(*steps)


def applied(base, delta):
    state = {n: t.clone() for n, t in base.items()}
    delta.apply_(state)
    return state


# --- worked numbers ---------------------------------------------------------------------------------


def test_magnitude_keeps_exactly_k_the_first_of_equals():
    base, delta = small(Magnitude(0.5))  # of the two .25 the first
    assert one(delta).index.tolist() == [0, 1, 3]
    assert applied(base, delta)["w"].tolist() == [[1.5, 0.75, 1, 2, 1, 1]]
    lost = math.sqrt((0.125**2 + 0.25**2) / float(A.square().sum()))
    assert math.isclose(delta.stats()["w"]["error"], lost, rel_tol=1e-6)


def test_bitdelta():
    base, delta = small(BitDelta())
    # the delta holds the whole tensor, so the zero has a sign too: +
    size = torch.tensor(2.125 / 6)
    want = torch.ones(1, 6) + size * torch.tensor([1.0, -1, 1, 1, -1, 1])
    assert torch.equal(applied(base, delta)["w"], want)
    assert one(delta).change.parts["bits"].tolist() == [0b010010]
    assert delta.stats()["w"]["bytes"] == 1 + 4


def test_low_rank():
    base = {"w": torch.zeros(2, 2)}
    delta = Delta.between(base, {"w": torch.tensor([[1.0, 1], [1, 0]])}).compress(LowRank(1))
    got = applied(base, delta)["w"].flatten()
    want = torch.tensor([1.17082, 0.723607, 0.723607, 0.447214])
    assert torch.allclose(got, want, atol=1e-6)
    left = 0.618034 / math.sqrt(1.618034**2 + 0.618034**2)
    assert math.isclose(delta.stats()["w"]["error"], left, rel_tol=1e-5)


def test_quantised():
    values = torch.tensor([1.27, -0.635, 0.004, 0, 7, -3.5, 0.4, 1])
    coded = deltachange.integers(values, 8, 4)
    assert coded.parts["codes"].tolist() == [127, -64, 0, 0, 127, -64, 7, 18]
    coded = deltachange.integers(values, 4, 4)
    assert coded.parts["scale"].tolist() == [
        float(torch.tensor(1.27) / 7), 1.0
    ]  # fmt: skip
    # 7, -3.5 (to even: -4), .4 and 1 are codes 7 -4 0 1, stored plus 8, the first in the low half
    assert coded.parts["codes"].tolist()[2:] == [15 | 4 << 4, 8 | 9 << 4]
    assert coded.decode().tolist()[4:] == [7, -4, 0, 1]


@given(st.integers(1, 70), st.sampled_from([4, 8]), st.integers(1, 20), st.integers(0, 99))
def test_integers_are_off_by_at_most_half_a_step(n, bits, block, seed):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    coded = deltachange.integers(values, bits, block)
    coded.check((n,))
    step = coded.parts["scale"].repeat_interleave(block)[:n]
    off = (coded.decode() - values).abs()
    assert bool((off <= step / 2 * (1 + 1e-5) + 1e-12).all())
    assert not deltachange.integers(torch.zeros(n), bits, block).decode().any()


@given(st.integers(0, 40), st.integers(0, 99))
def test_signs_come_back(n, seed):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    coded = deltachange.signs(values)
    coded.check((n,))
    assert torch.equal(coded.decode() < 0, values < 0)


def test_dare_drops_by_position_and_keeps_the_mean():
    tuned = 1 + torch.full((100, 100), 0.5)
    base, delta = small(Dare(0.25, seed=1), tuned=tuned)
    got = applied(base, delta)["w"] - 1
    assert set(got.unique().tolist()) == {0.0, 2.0}
    assert abs(float(got.mean()) - 0.5) < 0.05
    _, again = small(Dare(0.25, seed=1), tuned=tuned)
    assert torch.equal(one(again).index, one(delta).index)
    _, other = small(Dare(0.25, seed=2), tuned=tuned)
    assert not torch.equal(one(other).index, one(delta).index)


def test_a_sum_is_rounded_once():
    base = {"w": torch.full((1, 2), 256.0, dtype=torch.bfloat16)}  # spacing 2
    delta = Delta.between(base, {"w": torch.tensor([[258.0, 260]], dtype=torch.bfloat16)})
    small = delta.compress(BitDelta())
    assert one(small).change.parts["scale"].item() == 3
    # 259 lies between 258 and 260: to even
    assert applied(base, small)["w"].tolist() == [[260, 260]]


# --- the laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_save_load_apply_revert_on_a_model(steps, dtype, tmp_path):
    model, tuned = tuned_llama(dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    exact = Delta.between(model, tuned)
    delta = exact.compress(*steps)
    size, most = (sum(row["bytes"] for row in d.stats().values()) for d in (delta, exact))
    assert size < most
    delta.save_pretrained(tmp_path / "d", reversible=True)
    assert json.loads((tmp_path / "d/delta_config.json").read_text())["format_version"] == 2
    delta.save_pretrained(tmp_path / "forward")
    file = (tmp_path / "forward/delta.safetensors").read_bytes()
    assert size == len(file) - 8 - int.from_bytes(file[:8], "little")
    loaded = Delta.load(tmp_path / "d")
    loaded.apply_(model)
    want = applied(before, delta)
    assert same(model.state_dict(), want)
    rows = loaded.stats()
    for name, entry in delta.items():
        if want[name].ndim < 2:
            assert torch.equal(want[name], tuned[name]) and "error" not in rows[name]
            continue
        true = tuned[name].double() - before[name].double()
        got = entry.change.decode().double()
        dense = got.reshape(true.shape) if entry.index is None else torch.zeros_like(true)
        if entry.index is not None:
            dense.view(-1)[entry.index.long()] = got
        error = float((dense - true).norm() / true.norm())
        assert math.isclose(rows[name]["error"], error, rel_tol=1e-5)
        assert torch.equal(want[name], (before[name].float() + dense.float()).to(dtype))
    loaded.apply_(model)  # idempotent
    assert same(model.state_dict(), want)
    with loaded.reverted(model):
        assert same(model.state_dict(), before)
    assert same(model.state_dict(), want)
    Delta.load(tmp_path / "d").revert_(model)
    assert same(model.state_dict(), before)


def test_revert_needs_the_old_values(tmp_path):
    base, delta = small(Quantise(8))
    delta.save_pretrained(tmp_path)
    state = applied(base, Delta.load(tmp_path))
    with pytest.raises(errors.FormatError, match="old values of w"):
        Delta.load(tmp_path).revert_(state)
    loaded = Delta.load(tmp_path)
    state = {n: t.clone() for n, t in base.items()}
    loaded.apply_(state)
    loaded.revert_(state)
    assert same(state, base)


def test_another_base_is_refused():
    base, delta = small(Quantise(8))
    wrong = {"w": base["w"] + 1}
    with pytest.raises(errors.BaseMismatchError, match="w"):
        delta.apply_(wrong)
    delta.apply_(wrong, force=True)
    assert torch.allclose(wrong["w"], 2 + A, atol=1e-2)


def sparse():
    """A delta that holds three values of a tensor, and does not know the rest."""
    base = {"w": torch.ones(4, 4)}
    tuned = {"w": base["w"].clone()}
    tuned["w"].view(-1)[[1, 7, 9]] = torch.tensor([2.0, 0, 4])
    delta = Delta.between(base, tuned)
    assert one(delta).kind == "sparse-replace"
    return base, tuned, delta


def test_a_sparse_delta_without_its_base_has_no_fingerprint_but_is_not_added_twice(tmp_path):
    base, tuned, delta = sparse()
    short = delta.compress(Magnitude(2 / 16))
    assert one(short).index.tolist() == [1, 9] and one(short).old.tolist() == [1, 1]
    assert one(short).result_hash is None
    assert one(delta.compress(Magnitude(2 / 16), base=base)).result_hash is not None
    state = applied(base, short)
    short.apply_(state)
    want = tuned["w"].clone()
    want.view(-1)[7] = 1
    assert torch.equal(state["w"], want)
    short.save_pretrained(tmp_path)
    with pytest.raises(errors.BaseMismatchError, match="not the base"):
        Delta.load(tmp_path).apply_(state)
    short.revert_(state)
    assert same(state, base)


def test_low_rank_of_a_sparse_delta_needs_no_base():
    base, tuned, delta = sparse()
    assert same(applied(base, delta.compress(LowRank(4), base=base)).keys() and
                {"w": applied(base, delta.compress(LowRank(4)))["w"].round(decimals=4)}, tuned)  # fmt: skip


def test_integers_and_vectors_stay_exact():
    base = {"w": torch.ones(3), "n": torch.arange(4).reshape(2, 2), "m": torch.ones(2, 3)}
    tuned = {"w": torch.zeros(3), "n": torch.arange(4).reshape(2, 2) + 1, "m": torch.zeros(2, 3)}
    delta = Delta.between(base, tuned).compress(Magnitude(0.5))
    assert {n: e.kind for n, e in delta.items()} == {"w": "dense", "n": "dense", "m": "sparse-add"}
    vectors = Delta.between(base, tuned).compress(Magnitude(0.34), min_dims=1)
    assert vectors["w"].index.tolist() == [0]


def test_tied_weights_are_added_once():
    model = llama()
    tuned = {n: t + 0.5 for n, t in model.state_dict().items()}
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    delta = Delta.between(model, tuned).compress(BitDelta(), base=model)
    delta.apply_(model)
    assert torch.allclose(model.lm_head.weight, tuned["lm_head.weight"], atol=1e-6)


def test_an_exact_delta_is_still_version_one(tmp_path):
    _, _, delta = sparse()
    delta.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "delta_config.json").read_text())["format_version"] == 1


def test_damage_is_found(tmp_path):
    _, delta = small(Quantise(4))
    delta.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "delta_config.json").read_text())
    for key, value in [("coding", "int8"), ("coding", "x"), ("block", 0), ("block", "a"),
                       ("kind", "low-rank"), ("kind", "sparse-add"), ("count", 5),
                       ("dtype", "I64")]:  # fmt: skip
        broken = json.loads(json.dumps(config))
        broken["tensors"]["w"][key] = value
        (tmp_path / "delta_config.json").write_text(json.dumps(broken))
        with pytest.raises(errors.FormatError):
            Delta.load(tmp_path)


def test_scales_are_distilled():
    model, tuned = tuned_llama()
    teacher = llama(tie_word_embeddings=False)
    teacher.load_state_dict(tuned)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    delta = Delta.between(model, tuned).compress(BitDelta())
    ids = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits
    for entry in delta.values():  # from the mean magnitude there is little to gain: begin elsewhere
        if entry.change is not None:
            entry.change.parts["scale"] *= 0.5
    batches = [({"input_ids": ids}, wanted)] * 12
    losses = compress.distil_scales(delta, model, batches, lr=3e-4)
    assert losses[-1] < 0.8 * losses[0]
    assert same(model.state_dict(), before)
    delta.apply_(model)
    with torch.no_grad():
        after = float((model(input_ids=ids).logits - wanted).square().mean())
    assert after < losses[-1] * 1.01
    with pytest.raises(errors.HyperparameterError, match="BitDelta"):
        compress.distil_scales(Delta.between(before, tuned), llama(tie_word_embeddings=False), [])


def test_what_is_refused():
    base, tuned, delta = sparse()
    for bad in (lambda: Magnitude(0), lambda: Dare(1.5), lambda: Quantise(3), lambda: LowRank(0)):
        with pytest.raises(errors.HyperparameterError):
            bad()
    with pytest.raises(errors.HyperparameterError, match="at least one step"):
        delta.compress()
    with pytest.raises(errors.HyperparameterError, match="comes last"):
        delta.compress(BitDelta(), Magnitude(0.5))
    with pytest.raises(errors.HyperparameterError, match="wanted a step"):
        delta.compress("magnitude")
    with pytest.raises(errors.BaseMismatchError, match="w differs"):
        delta.compress(BitDelta(), base={"w": torch.zeros(4, 4)})
    delta["w"].old = None
    with pytest.raises(errors.FormatError, match="pass base="):
        delta.compress(BitDelta())
    assert delta.compress(BitDelta(), base=base)["w"].old is not None
    tuned["w"][0, 0] = math.inf
    with pytest.raises(errors.ScoreError, match="w holds NaN or infinity"):
        Delta.between(base, tuned).compress(BitDelta())


def test_figures_and_mask():
    base, delta = small(Magnitude(0.5), BitDelta())
    assert one(delta).kind == "sparse-add"
    row = delta.stats()["w"]
    assert row["kind"] == "sparse-add" and row["changed"] == 3 and row["max_abs"] > 0
    assert delta.mask().count == 3
    assert delta.updates(base).changed == 3
    assert "3 weights" in delta.card() and "w" in delta._repr_html_()


# --- files ---------------------------------------------------------------------------------------------


def checkpoint(state, path):
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    return path


@pytest.mark.parametrize("steps", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_verbs_of_files_do_the_same_to_the_bit(steps, dtype, tmp_path):
    model, tuned = tuned_llama(dtype)
    before = model.state_dict()
    delta = Delta.between(model, tuned).compress(*steps)
    want = applied(before, delta)
    base = checkpoint(before, tmp_path / "base.safetensors")
    delta.save_pretrained(tmp_path / "d")
    delta.save_pretrained(tmp_path / "r", reversible=True)
    out = tmp_path / "out.safetensors"
    _core.apply_files(base, tmp_path / "d", out)
    assert same(load_file(out), want)
    assert json.loads(_core.verify_files(base, tmp_path / "d")) == []
    assert json.loads(_core.verify_files(out, tmp_path / "d", result=True)) == []
    again = tmp_path / "again.safetensors"
    _core.apply_files(out, tmp_path / "d", again)
    assert again.read_bytes() == out.read_bytes()  # not added twice
    _core.revert_files(out, tmp_path / "r", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), before)
    _core.revert_files(out, tmp_path / "d", tmp_path / "back2.safetensors", base=base)
    assert same(load_file(tmp_path / "back2.safetensors"), before)
    with pytest.raises(errors.RetouchError, match="--base BASE"):
        _core.revert_files(out, tmp_path / "d", tmp_path / "back3.safetensors")
    shown = json.loads(_core.show_files(tmp_path / "r"))
    assert shown["bytes"]["old"] == sum(t.numel() * t.element_size() for t in map(
        lambda e: e.old, delta.values()))  # fmt: skip


def test_files_refuse_to_add_to_another_base(tmp_path):
    base, _, delta = sparse()
    short = delta.compress(Magnitude(2 / 16))
    assert one(short).result_hash is None
    short.save_pretrained(tmp_path / "d")
    path = checkpoint(base, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    _core.apply_files(path, tmp_path / "d", out)
    assert same(load_file(out), applied(base, short))
    with pytest.raises(errors.BaseMismatchError, match="w"):
        _core.apply_files(out, tmp_path / "d", tmp_path / "twice.safetensors")
    _core.revert_files(out, tmp_path / "d", tmp_path / "back.safetensors", base=path)
    assert same(load_file(tmp_path / "back.safetensors"), base)


@pytest.mark.parametrize("key", ["coding", "block", "base_hash", "kind", "count", "dtype"])
def test_files_find_damage(key, tmp_path):
    base, delta = small(Quantise(4))
    delta.save_pretrained(tmp_path / "d")
    path = tmp_path / "d/delta_config.json"
    config = json.loads(path.read_text())
    bad = {
        "coding": "x",
        "block": 0,
        "base_hash": None,
        "kind": "low-rank",
        "count": 5,
        "dtype": "I64",
    }
    config["tensors"]["w"][key] = bad[key]
    path.write_text(json.dumps(config))
    with pytest.raises(errors.FormatError):
        _core.apply_files(
            checkpoint(base, tmp_path / "b.safetensors"), tmp_path / "d", tmp_path / "o.safetensors"
        )
    with pytest.raises(errors.FormatError):
        Delta.load(tmp_path / "d")
