"""Deltas in memory: exact both ways for every dtype, tied weights, wrong bases, figures."""

import dataclasses
import json
import math

import pytest
import torch
from deltas import DTYPES, STRANGE, llama, llama_with, nudged, same
from hypothesis import given
from hypothesis import strategies as st

import retouch
from retouch import Delta, errors


@given(
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.sampled_from(STRANGE), min_size=1, max_size=40),
    changes=st.lists(st.tuples(st.integers(0, 39), st.sampled_from(STRANGE)), max_size=12),
    reversible=st.booleans(),
)
def test_between_apply_revert_is_exact_for_every_dtype(
    tmp_path_factory, dtype, values, changes, reversible
):
    def cast(xs):
        wide = torch.tensor(xs, dtype=torch.float64)
        if not dtype.is_floating_point:
            wide = wide.nan_to_num(0, 3, 0)
        return wide.to(dtype)

    base = {"a.weight": cast(values), "same": torch.arange(3), "scalar": cast(values[:1])[0]}
    tuned = {k: v.clone() for k, v in base.items()}
    for at, value in changes:
        tuned["a.weight"][at % len(values)] = cast([value])[0]
    delta = Delta.between(base, tuned)
    folder = tmp_path_factory.mktemp("delta")
    delta.save_pretrained(folder, reversible=reversible)
    loaded = Delta.load(folder)
    state = {k: v.clone() for k, v in base.items()}
    loaded.apply_(state)
    assert same(state, tuned)
    loaded.apply_(state)  # idempotent
    assert same(state, tuned)
    loaded.revert_(state)
    assert same(state, base)
    again = Delta.load(folder)
    if reversible or not again:
        again.revert_(tuned)
        assert same(tuned, base)
    else:
        with pytest.raises(errors.FormatError, match="reversible=True"):
            again.revert_(tuned)
        assert not same(tuned, base)


@given(
    dtype=st.sampled_from([d for d in DTYPES if d != torch.bool]),
    base=st.binary(min_size=8, max_size=320),
    changes=st.lists(st.tuples(st.integers(0, 319), st.integers(1, 255)), max_size=20),
)
def test_any_bits_survive(tmp_path_factory, dtype, base, changes):
    """NaN payloads, signalling NaN, denormals: whatever the bytes are."""
    base = base[: len(base) // 8 * 8]
    tuned = bytearray(base)
    for at, flip in changes:
        tuned[at % len(tuned)] ^= flip
    one, other = ({"w": torch.frombuffer(bytearray(b), dtype=dtype)} for b in (base, tuned))
    folder = tmp_path_factory.mktemp("delta")
    Delta.between(one, other).save_pretrained(folder, reversible=True)
    delta = Delta.load(folder)
    state = {"w": one["w"].clone()}
    delta.apply_(state)
    assert same(state, other)
    delta.revert_(state)
    assert same(state, one)
    assert json.dumps(delta.stats(), allow_nan=False)


def test_added_and_removed_tensors_need_a_state_dict(tmp_path):
    base = {"kept": torch.ones(3), "gone": torch.arange(4.0)}
    tuned = {"kept": torch.ones(3), "new": torch.zeros(2, 2)}
    delta = Delta.between(base, tuned)
    assert {n: e.kind for n, e in delta.items()} == {"gone": "removed", "new": "added"}
    delta.save_pretrained(tmp_path, reversible=True)
    delta = Delta.load(tmp_path)
    state = {k: v.clone() for k, v in base.items()}
    delta.apply_(state)
    assert same(state, tuned)
    delta.revert_(state)
    assert same(state, base)
    with pytest.raises(errors.ShapeError, match="cannot gain or lose"):
        delta.apply_(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_model_to_a_file_and_back(tmp_path, dtype):
    model = llama().to(dtype)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    mask = retouch.select(model, "random", density=0.05)
    optimizer = retouch.wrap(retouch.AdamW, mask, lr=1e-2)
    ids = torch.randint(0, 97, (2, 12))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = {n: t.clone() for n, t in model.state_dict().items()}
    delta = Delta.from_model(model)
    assert 0 < delta.count <= mask.count
    assert all(e.kind == "sparse-replace" for e in delta.values())
    with delta.reverted(model):
        assert same(model.state_dict(), base)
    assert same(model.state_dict(), tuned)
    delta.save_pretrained(tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    values = delta.count * (4 if dtype == torch.float32 else 2)
    assert values < size < values + 2.2 * delta.count + 30_000  # 2 bytes a position, and headers
    fresh = llama().to(dtype)
    loaded = Delta.load(tmp_path)
    with loaded.applied(fresh):
        assert same(fresh.state_dict(), tuned)
    assert same(fresh.state_dict(), base)
    between = Delta.between(base, tuned)
    assert (
        between.keys() - {"lm_head.weight"} == delta.keys()
    )  # copies of tied weights are not tied
    assert all(torch.equal(between[n].index, delta[n].index) for n in delta)
    assert {n: (e.base_hash, e.result_hash) for n, e in between.items() if n in delta} == {
        n: (e.base_hash, e.result_hash) for n, e in delta.items()
    }


def test_applying_to_a_wrapped_model_reaches_its_masters():
    model = llama()
    mask = retouch.select(model, "random", density=0.05)
    tuned = nudged(model)
    delta = Delta.between(model, tuned)
    optimizer = retouch.wrap(torch.optim.SGD, mask, lr=0.0)
    delta.apply_(model)
    ids = torch.randint(0, 97, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # writes the masters back: they must be the new weights
    assert same(model.state_dict(), tuned)


def test_tied_weights_are_one_entry_and_stay_tied():
    model = llama()
    tuned = nudged(model, 0.02)
    delta = Delta.between(model, llama_with(tuned))
    assert "lm_head.weight" not in delta
    assert delta.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    delta.apply_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(model.state_dict(), tuned)


def test_a_checkpoint_without_the_tie_takes_the_delta():
    model, tuned = llama(), llama_with(nudged(llama(), 0.02))
    delta = Delta.between(model, tuned)
    embedding = "model.embed_tokens.weight"
    for names in ([embedding], ["lm_head.weight"], [embedding, "lm_head.weight"]):
        state = {n: t.clone() for n, t in llama().state_dict().items()}
        for name in {embedding, "lm_head.weight"} - set(names):
            del state[name]
        delta.apply_(state)
        assert same(state, {n: tuned.state_dict()[n] for n in state})
        delta.revert_(state)
        assert same(state, {n: llama().state_dict()[n] for n in state})
    # a checkpoint on disk that has the one name is the base of a model that has both
    stored = {n: t.clone() for n, t in llama().state_dict().items() if n != embedding}
    again = Delta.between(stored, tuned)
    assert again.aliases == {embedding: "lm_head.weight"} and "lm_head.weight" in again
    assert {e.kind for e in again.values()} == {"sparse-replace"}
    again.apply_(model)
    assert same(model.state_dict(), tuned.state_dict())


def test_ties_that_come_or_go():
    def tied(value):
        t = torch.full((50,), value)
        return {"a": t, "b": t}

    loose = {"a": torch.zeros(50), "b": torch.zeros(50)}
    loose["b"][7] = 1
    with pytest.raises(errors.ShapeError, match="a and b are one tensor in the base"):
        Delta.between(tied(0.0), loose)
    # the tuned model ties what was apart: each name has its own change
    tuned = tied(0.0)
    tuned["a"][3] = 5
    delta = Delta.between(loose, tuned)
    assert set(delta) == {"a", "b"} and not delta.aliases
    state = {n: t.clone() for n, t in loose.items()}
    delta.apply_(state)
    assert same(state, tuned)
    delta.revert_(state)
    assert same(state, loose)
    # one memory cannot take two changes
    other = {n: t.clone() for n, t in loose.items()}
    other["a"][9], other["b"][10] = 1, 1
    two = Delta.between({"a": torch.zeros(50), "b": torch.zeros(50)}, other)
    target = tied(0.0)
    with pytest.raises(errors.ShapeError, match="shares its memory"):
        two.apply_(target)
    assert same(target, tied(0.0))
    # but the same change twice, and the old values are those from before either
    same_twice = Delta.between(
        loose | {"b": loose["a"]}, {"a": other["a"], "b": other["a"].clone()}
    )
    assert set(same_twice) == {"a", "b"}
    for entry in same_twice.values():
        entry.old = None
    same_twice.apply_(target)
    assert same(target, {"a": other["a"], "b": other["a"]})
    same_twice.revert_(target)
    assert same(target, tied(0.0))


def test_checkpoints_on_disk_are_compared_lazily(tmp_path):
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    tuned = llama(tie_word_embeddings=False)
    tuned.load_state_dict(nudged(model))
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    delta = Delta.between(tmp_path / "base", tmp_path / "tuned")
    delta.apply_(model)
    assert same(model.state_dict(), tuned.state_dict())
    assert delta.base_model == str(tmp_path / "base")


def test_folders_are_read_by_one_rule(tmp_path):
    """As transformers and the command line: the one file or the index, whatever lies beside it."""
    from safetensors.torch import save_file

    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "base" / "other.safetensors")
    tuned = llama_with(nudged(model))
    tuned.save_pretrained(tmp_path / "tuned")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "tuned" / "consolidated.safetensors")
    delta = Delta.between(tmp_path / "base", tmp_path / "tuned")
    assert set(delta) == set(Delta.between(model, tuned))
    delta.save_pretrained(tmp_path / "d")
    with pytest.raises(errors.FormatError, match="this is a delta"):
        Delta.between(tmp_path / "base", tmp_path / "d")
    index = tmp_path / "base" / "model.safetensors.index.json"
    for text, why in (
        ("{", "damaged"),
        ('{"weight_map": {"a": "../x"}}', "no file of this folder"),
    ):
        index.write_text(text)
        with pytest.raises(errors.FormatError, match=why):
            Delta.between(tmp_path / "base", tmp_path / "tuned")


def test_a_wrong_base_is_refused_by_name_and_left_alone():
    model = llama()
    delta = Delta.between(model, nudged(model))
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(errors.BaseMismatchError, match=r"1 tensors.*layers\.1\.mlp\.up_proj"):
        delta.apply_(other)
    assert same(other.state_dict(), before)
    fresh = {n: dataclasses.replace(e, old=None) for n, e in delta.items()}
    unknown = Delta(fresh, delta.aliases)
    unknown.apply_(other, force=True)
    assert not same(other.state_dict(), before)
    # what another base had there is not the old value of this delta
    assert [n for n, e in unknown.items() if e.old is None] == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(errors.ShapeError, match=r"vocab|shape"):
        delta.apply_(llama(vocab_size=101))
    with pytest.raises(errors.ShapeError, match="no tensor"):
        delta.apply_(torch.nn.Linear(2, 2))
    with pytest.raises(errors.EngineError, match="a model or a state dict, got str"):
        delta.apply_("model")
    with pytest.raises(errors.EngineError, match="path, a model or a state dict, got int"):
        Delta.between(3, model)


def test_reverted_refuses_a_model_without_the_change():
    model = llama()
    delta = Delta.between(model, nudged(model))
    with pytest.raises(errors.BaseMismatchError, match="apply it first"), delta.reverted(model):
        pass


def test_figures():
    one = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, math.nan, 5.0, 2.0], dtype=torch.bfloat16)
    other = one.clone()
    other[0] = -0.0
    other[2:6] = torch.tensor([1 + 2**-7, 2.0, 1.0, 3.0], dtype=torch.bfloat16)
    entry = Delta.between({"w": one.repeat(2)}, {"w": torch.cat([other, one])}).stats()["w"]
    # from 1 to the next float, to 2 (128 steps), from -1 to 1 over zero (2 * 0x3f80), 0 to -0 (none)
    assert entry == {
        "kind": "sparse-replace", "changed": 5, "numel": 16, "fraction": 5 / 16, "not_finite": 1,
        "bytes": 5 * (2 + 2),
        "max_abs": 2.0, "l2": math.sqrt(2**-14 + 1 + 4), "max_ulp": 2 * 0x3F80, "median_ulp": 1,
        "one_ulp": 0.25,
    }  # fmt: skip
    huge = torch.finfo(torch.float64).max
    wide = Delta.between(
        {"w": torch.tensor([-huge, 1.0, 1.0], dtype=torch.float64)},
        {"w": torch.tensor([huge, 1.0, 1.0], dtype=torch.float64)},
    ).stats()["w"]
    assert wide["max_ulp"] == 2**63 - 1
    assert (
        "max_ulp"
        not in Delta.between({"w": torch.zeros(3).int()}, {"w": torch.ones(3).int()}).stats()["w"]
    )


def test_a_delta_in_a_notebook_and_on_the_hub():
    model = llama(num_hidden_layers=3)
    delta = Delta.between(model, nudged(model))
    table = delta._repr_html_()
    assert "model.layers.*.mlp.up_proj.weight" in table and "largest change" in table
    assert f"{delta.count:,} values" in table and f"{delta.count:,} values" in repr(delta)
    delta.base_model = "HuggingFaceTB/SmolLM2-135M"
    assert "base_model: HuggingFaceTB/SmolLM2-135M\n" in delta.card()
    delta.base_model = "/home/me/model"
    assert "base_model" not in delta.card()
