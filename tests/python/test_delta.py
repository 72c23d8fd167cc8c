"""Deltas: exact both ways, for every dtype; wrong bases and damaged files are refused."""

import json
import math
import os
import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import retouch
from retouch import Delta, errors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip
STRANGE = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 1.0, 448.0]


def llama(**kwargs):
    torch.manual_seed(0)
    config = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | kwargs))


def bits(state):
    return {
        n: t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for n, t in state.items()
    }


def same(a, b):
    a, b = bits(a), bits(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def nudged(model, fraction=0.01, seed=1):
    """A copy of a state dict in which a fraction of each float matrix differs."""
    gen = torch.Generator().manual_seed(seed)
    out = {}
    for name, t in model.state_dict().items():
        move = torch.rand(t.shape, generator=gen) < fraction
        out[name] = torch.where(move, t + 1, t)
    if "lm_head.weight" in out:  # tied
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


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


def llama_with(state):
    model = llama()
    model.load_state_dict(state)
    return model


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
    delta.apply_(other, force=True)
    assert not same(other.state_dict(), before)
    with pytest.raises(errors.ShapeError, match=r"vocab|shape"):
        delta.apply_(llama(vocab_size=101))
    with pytest.raises(errors.ShapeError, match="no tensor"):
        delta.apply_(torch.nn.Linear(2, 2))


def test_reverted_refuses_a_model_without_the_change():
    model = llama()
    delta = Delta.between(model, nudged(model))
    with pytest.raises(errors.BaseMismatchError, match="apply it first"), delta.reverted(model):
        pass


@pytest.fixture
def folder(tmp_path):
    model = llama()
    Delta.between(model, nudged(model)).save_pretrained(tmp_path / "d", reversible=True)
    return tmp_path / "d"


@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.9, 0.9999])
def test_truncated_files_are_refused(folder, share):
    path = folder / "delta.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(errors.FormatError, match=r"delta\.safetensors.*damaged or truncated"):
        Delta.load(folder)


def edit(folder, change):
    path = folder / "delta_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update(format="other"), "not a retouch delta"),
        (lambda c: c.update(format_version=99), "version 99.*update retouch"),
        (lambda c: c.pop("tensors"), "lists no tensors"),
        (lambda c: first(c).update(kind="magic"), "unknown kind"),
        (lambda c: first(c).update(index_encoding="zip"), "unknown index coding"),
        (lambda c: first(c).update(dtype="F99"), "F99"),
        (lambda c: first(c).update(shape=[1]), "inside of the tensor"),
        (lambda c: first(c).update(count=1), "positions and"),
        (lambda c: c["tensors"].update(ghost=first(c)), "ghost"),
    ],
)
def test_hostile_configs_are_refused(folder, change, why):
    edit(folder, change)
    with pytest.raises(errors.FormatError, match=why):
        Delta.load(folder)


def first(config):
    return next(iter(config["tensors"].values()))


def test_json_that_is_none_and_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no delta at"):
        Delta.load(tmp_path / "nowhere")
    (folder / "delta_config.json").write_text("{")
    with pytest.raises(errors.FormatError, match="not a JSON file"):
        Delta.load(folder)


@given(positions=st.sets(st.integers(0, 300_000), max_size=40), wide=st.booleans())
def test_positions_survive_their_coding(positions, wide):
    from retouch.deltafile import decode, encode

    index = torch.tensor(sorted(positions), dtype=torch.int64 if wide else torch.int32)
    coding, stored = encode(index)
    gaps = [b - a - 1 for a, b in zip([-1, *sorted(positions)], sorted(positions), strict=False)]
    assert (coding == "gap16") == (max(gaps, default=0) < 2**16)
    assert decode(coding, stored, 300_001).tolist() == sorted(positions)
    if positions:
        with pytest.raises(ValueError, match="inside of the tensor"):
            decode(coding, stored, max(positions))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on file size stands for the full disk: the write fails in the middle."""
    code = (
        "import resource, signal, sys, torch, retouch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "base = {'w': torch.zeros(100_000)}\n"
        "tuned = {'w': torch.randn(100_000)}\n"
        "delta = retouch.Delta.between(base, tuned)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    delta.save_pretrained(sys.argv[1])\n"
        "except OSError as e:\n"
        "    print('refused', type(e).__name__)\n"
    )
    out = tmp_path / "d"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert list(out.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = llama()
    delta = Delta.between(model, nudged(model))
    with pytest.raises(OSError, match="file"):
        delta.save_pretrained(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
