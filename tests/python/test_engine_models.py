"""Wrapped models under checkpoints, copies and changes; fingerprints and the base."""

import copy
import pickle

import pytest
import torch
from torch import nn
from training import (
    assert_frozen,
    assert_same,
    batch,
    bits,
    element_mask,
    llama,
    loss_of,
    mixed_mask,
    net,
    own_weights,
    snapshot,
    train,
    wrapped,
)
from transformers import LlamaForCausalLM

import retouch
from retouch.engine import get_engine, wrap
from retouch.errors import (
    EngineError,
    FrozenError,
)
from retouch.masks import Mask

# --- checkpoints and copies of the model ---------------------------------------------------------


def test_checkpoints_have_the_models_own_keys(tmp_path):
    plain, model = llama(), llama()
    before = snapshot(model)
    _, mask, optimizer = wrapped(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(model._retouch.state_dict()) == []
    train(model, optimizer, range(2))
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same(snapshot(plain), snapshot(model))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(snapshot(loaded), snapshot(model))
    assert_frozen(before, loaded, mask)
    model.load_state_dict(llama(seed=5).state_dict(), strict=True)  # and demands none of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_weights_keeps_the_values_that_round_to_them(dtype):
    model, _, optimizer = wrapped(net(dtype))
    train(model, optimizer, range(3))
    engine = get_engine(model)
    values = {n: s.value.detach().clone() for n, s in engine.slots.items()}
    weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    assert all(torch.equal(engine.slots[n].value, v) for n, v in values.items())
    other = net(dtype, seed=3)
    model.load_state_dict(other.state_dict())
    for name, slot in engine.slots.items():
        flat = dict(other.named_parameters())[name].detach().reshape(-1)
        assert torch.equal(slot.value.to(dtype), flat[slot.selection.flat().long()])


def test_weights_written_behind_the_engines_back_are_taken_over():
    model, _, optimizer = wrapped(cls=torch.optim.SGD, lr=0.0)
    with torch.no_grad():
        model.up.weight.fill_(2.0)
    train(model, optimizer, [0])
    assert torch.equal(model.up.weight, torch.full_like(model.up.weight, 2.0))
    model.up.load_state_dict({"weight": torch.full((20, 12), 3.0), "bias": torch.zeros(20)})
    saved = optimizer.state_dict()["param_groups"][0]["retouch"]
    value = saved["value"][saved["names"].index("up.weight")]
    assert torch.equal(value, torch.full_like(value, 3.0))
    with torch.no_grad():
        model.up.weight.fill_(4.0)
    train(model, optimizer, [0])
    assert torch.equal(model.up.weight, torch.full_like(model.up.weight, 4.0))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_plain_model_that_says_so(way):
    model, mask, optimizer = wrapped(llama())
    train(model, optimizer, [0])
    twin = way(model)
    assert_same(snapshot(twin), snapshot(model))
    assert list(twin.state_dict()) == list(model.state_dict())
    with pytest.raises(EngineError, match=r"deep copy .* wrap it again"):
        get_engine(twin)
    held = snapshot(twin)
    train(model, optimizer, [1])
    assert_same(snapshot(twin), held)
    again = wrap(torch.optim.AdamW, Mask(dict(mask), twin), twin, lr=1e-2)
    train(twin, again, [1])
    assert_frozen(held, twin, mask)
    other = way(model)
    retouch.unwrap(other)
    assert "_retouch" not in dict(other.named_children())


def test_resized_embeddings_are_noticed():
    model, _, optimizer = wrapped(llama(tied=False))
    model.resize_token_embeddings(120)  # resizes in place
    match = r"embed_tokens\.weight was resized from \(97, 32\) to \(120, 32\); call retouch.unwrap"
    with pytest.raises(EngineError, match=match):
        loss_of(model, batch(0)).backward()
    with pytest.raises(EngineError, match=match):
        optimizer.step()


def test_a_replaced_layer_is_noticed():
    model, _, optimizer = wrapped()
    model.up = nn.Linear(12, 20)
    with pytest.raises(EngineError, match=r"up\.weight is not the tensor that was wrapped"):
        optimizer.step()


def test_assigned_weights_are_noticed():
    model, _, optimizer = wrapped()
    model.load_state_dict(net().state_dict(), assign=True)
    with pytest.raises(EngineError, match="assign=True"):
        optimizer.step()


def test_a_cast_of_the_model_is_noticed():
    model, _, optimizer = wrapped()
    values = [s.value.detach().clone() for s in get_engine(model).slots.values()]
    model.to(torch.bfloat16)
    for slot, value in zip(get_engine(model).slots.values(), values, strict=True):
        assert torch.equal(slot.value, value)  # float32 still
    with pytest.raises(EngineError, match=r"was cast from torch.float32 to torch.bfloat16"):
        optimizer.step()


def test_a_cast_of_the_values_is_noticed():
    model, _, optimizer = wrapped()
    slot = get_engine(model).slots["up.weight"]
    slot.value.data = slot.value.data.to(torch.bfloat16)
    with pytest.raises(EngineError, match=r"up\.weight has a compact value of torch.bfloat16"):
        optimizer.step()


# --- verify, base, metrics -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_finds_a_single_flipped_bit(dtype):
    model, mask, optimizer = wrapped(net(dtype), mixed_mask(net(dtype)))
    train(model, optimizer, range(2))
    report = retouch.verify_untouched(model)
    assert (report.parameters, report.buffers_changed) == (len(snapshot(model)), [])
    assert report.frozen == len(snapshot(model)) - len(mask)
    for name, p in model.named_parameters():
        if name.startswith("_retouch.") or (name in mask and mask[name].kind == "all"):
            continue
        off = torch.ones(p.numel(), dtype=torch.bool)
        if name in mask:
            off[mask[name].flat().long()] = False
        place = off.nonzero()[-1]
        raw = bits(p).reshape(-1)
        raw[place] ^= 1
        with pytest.raises(FrozenError, match=f"1 parameters have changed .*: {name}$"):
            retouch.verify_untouched(model)
        raw[place] ^= 1
    assert retouch.verify_untouched(model) == report


def test_verify_lists_buffers_and_missing_parameters():
    model, _, _ = wrapped()
    model.seen += 1
    assert retouch.verify_untouched(model).buffers_changed == ["seen"]
    del model.down
    with pytest.raises(FrozenError, match=r"down\.weight \(gone\)"):
        retouch.verify_untouched(model)


def test_verify_needs_fingerprints():
    model = net()
    wrap(torch.optim.SGD, element_mask(model), model, fingerprint=False, lr=0.1)
    with pytest.raises(EngineError, match="fingerprint=False"):
        retouch.verify_untouched(model)


def test_base_weights_is_a_reference_model():
    model, _, optimizer = wrapped(llama())
    base = llama()
    train(model, optimizer, range(3))
    after, engine = snapshot(model), get_engine(model)
    policy = model(batch(0)).logits
    with engine.base_weights():
        with engine.base_weights(), torch.no_grad():
            assert torch.equal(model(batch(0)).logits, base(batch(0)).logits)
        assert torch.equal(model(batch(0)).logits, base(batch(0)).logits)
    assert_same(snapshot(model), after)
    assert torch.equal(model(batch(0)).logits, policy)
    policy.square().mean().backward()  # a graph from before the swap is still right
    optimizer.step()


def test_base_weights_gives_the_weights_back_after_an_error():
    model, _, optimizer = wrapped()
    train(model, optimizer, range(2))
    after, engine = snapshot(model), get_engine(model)
    with pytest.raises(ZeroDivisionError), engine.base_weights():
        raise ZeroDivisionError
    assert_same(snapshot(model), after)


def test_no_training_on_the_base():
    model, _, optimizer = wrapped()
    train(model, optimizer, range(2))
    after = snapshot(model)
    engine = get_engine(model)
    with engine.base_weights():
        loss = loss_of(model, batch(0))
        with pytest.raises(EngineError, match="inside of base_weights"):
            loss.backward()
        with pytest.raises(EngineError, match="inside of base_weights"):
            optimizer.step()
        with pytest.raises(EngineError, match="inside of base_weights"):
            retouch.unwrap(model)
        inside = loss_of(model, batch(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()
    assert_same(snapshot(model), after)


def test_metrics():
    model = net(torch.bfloat16)
    mask = element_mask(model)
    optimizer = wrap(torch.optim.AdamW, mask, model, lr=1e-2)
    engine = get_engine(model)
    selected, total = (
        sum(s.count for s in mask.values()),
        sum(p.numel() for p in own_weights(model)),
    )
    sizes = {"density": selected / total, "selected": selected, "delta_bytes": 6 * selected}
    assert engine.metrics() == {**sizes, "state_bytes": 0}
    train(model, optimizer, [0])
    state = 8 * selected + 4 * len(mask)
    assert engine.metrics() == {**sizes, "state_bytes": state}
    engine.measure = True
    before = torch.cat([s.value.detach() for s in engine.slots.values()])
    held = torch.cat([s.selection.take(s.param) for s in engine.slots.values()])
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    train(model, optimizer, [1])
    after = torch.cat([s.value.detach() for s in engine.slots.values()])
    kept = held == torch.cat([s.selection.take(s.param) for s in engine.slots.values()])
    figures = engine.metrics()
    assert figures["update_norm"] == pytest.approx(float((after - before).norm()), rel=1e-5)
    lost = int((kept & (before != after)).sum())
    assert 0 < lost < selected and figures["lost_updates"] == lost / selected
