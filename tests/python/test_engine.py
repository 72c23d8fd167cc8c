"""The engine on a model: what it adds, what it leaves alone, what it refuses."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from training import (
    Reference,
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
    positions,
    snapshot,
    train,
    wrapped,
)

import retouch
from retouch.engine import get_engine, install, wrap
from retouch.errors import (
    BudgetError,
    EngineError,
    HyperparameterError,
    LayoutError,
    MaskError,
)
from retouch.masks import Mask, Selection

# --- what it adds --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_compact_values(dtype):
    model = net(dtype)
    mask = mixed_mask(model)
    engine = install(model, mask)
    assert get_engine(model) is engine is model._retouch
    assert engine.mask is mask
    named = dict(model.named_parameters())
    for name, slot in engine.slots.items():
        assert slot.param is named[name]
        assert named[f"_retouch.{name}"] is slot.value
        assert slot.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert slot.base.dtype == dtype and slot.base.shape == slot.value.shape
        assert slot.value.numel() == mask[name].count
        flat = slot.param.detach().reshape(-1)[mask[name].flat().long()]
        assert torch.equal(slot.value.detach().reshape(-1), flat.to(slot.value.dtype))
        assert torch.equal(bits(slot.base).reshape(-1), bits(flat))
        assert slot.param.requires_grad and slot.value.requires_grad
    frozen = set(snapshot(model)) - set(engine.slots)
    assert frozen and not any(named[name].requires_grad for name in frozen)


def test_values_have_the_shape_of_what_is_selected():
    model = nn.Conv2d(4, 6, 3)
    shape = (6, 4, 3, 3)
    for kind, index, want in [
        ("rows", [1, 4], (2, 4, 3, 3)),
        ("columns", [0, 2, 3], (6, 3, 3, 3)),
        ("elements", [5, 7, 100], (3,)),
        ("all", None, shape),
    ]:
        index = None if index is None else torch.tensor(index, dtype=torch.int32)
        engine = install(model, Mask({"weight": Selection(kind, shape, index)}, model))
        assert engine.slots["weight"].value.shape == want
        retouch.unwrap(model)


def test_names_of_the_engine_do_not_shadow_those_of_the_model():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = nn.Linear(3, 3)
            self.slots = nn.ModuleDict({"bind": nn.Linear(3, 3)})
            self.model = nn.ParameterList([nn.Parameter(torch.ones(3))])

        def forward(self, x):
            return self.slots["bind"](self.mask(x)) * self.model[0]

    model = Odd()
    mask = Mask.full(model)
    optimizer = wrap(torch.optim.SGD, mask, model, lr=0.1)
    before = snapshot(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in snapshot(model).items())
    assert get_engine(model).mask is mask
    assert len(list(get_engine(model).parameters())) == 5


def test_a_sequential_model_still_runs():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    want = model(x)
    _, mask, optimizer = wrapped(model, element_mask(model))
    assert torch.equal(model(x), want)
    before = snapshot(model)
    model(x).sum().backward()
    optimizer.step()
    assert_frozen(before, model, mask)


def test_trainer_sorts_compact_values_by_the_names_of_their_weights():
    from transformers import Trainer

    model = llama()
    install(model, element_mask(model))
    decay = set(Trainer.get_decay_parameter_names(None, model))
    for name in get_engine(model).slots:
        assert (f"_retouch.{name}" in decay) == (name in decay), name


# --- gradients -----------------------------------------------------------------------------------


def test_dense_gradients_are_freed_within_the_backward():
    model, _, _ = wrapped()
    alive = []

    def watch(grad):
        alive.append(sum(p.grad is not None for p in own_weights(model)))

    for p in own_weights(model):
        if p.requires_grad:
            p.register_hook(watch)
    loss_of(model, batch(0)).backward()
    assert alive and max(alive) == 0  # when the next gradient comes, the last one is gone
    assert all(p.grad is None for p in own_weights(model))
    assert all(s.value.grad is not None for s in get_engine(model).slots.values())


def test_clipping_and_its_norm_are_those_of_the_selected_gradient():
    model = net()
    mask = mixed_mask(model)
    reference = Reference(model, mask, lambda p: torch.optim.AdamW(p, lr=1e-2))
    optimizer = wrap(torch.optim.AdamW, mask, model, lr=1e-2, gradient="dense")
    for max_norm in (1e-3, 0.05, 1e3):
        ours = train(model, optimizer, range(2), clip=max_norm)
        assert ours == reference.train(range(2), clip=max_norm)
    assert_same(snapshot(model), snapshot(reference.model))


def test_tied_weights_have_one_slot_and_the_sum_of_their_gradients():
    model, plain = llama(), llama()
    mask = element_mask(model)
    assert "lm_head.weight" not in mask and "model.embed_tokens.weight" in mask
    optimizer = wrap(torch.optim.SGD, mask, model, lr=0.1)
    loss_of(plain, batch(0)).backward()
    loss_of(model, batch(0)).backward()
    slot = get_engine(model).slots["model.embed_tokens.weight"]
    want = plain.model.embed_tokens.weight.grad.reshape(-1)[slot.selection.flat().long()]
    assert torch.equal(slot.value.grad, want)
    optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    plain, model = llama(), llama()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    norms = []
    for m in (plain, model):
        m.train()
        optimizer = wrap(torch.optim.AdamW, element_mask(m), m, lr=1e-2)
        norms.append(train(m, optimizer, range(3), clip=1.0))
    assert norms[0] == norms[1]
    assert_same(snapshot(model), snapshot(plain))


def test_sparse_gradients_of_an_embedding():
    models = [nn.Embedding(50, 4, sparse=sparse) for sparse in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        index = torch.tensor([1, 7, 30], dtype=torch.int32)
        mask = Mask({"weight": Selection("rows", (50, 4), index)}, model)
        optimizer = wrap(torch.optim.AdamW, mask, model, lr=0.1)
        for tokens in ([1, 2, 7], [7, 7, 49]):
            model(torch.tensor(tokens)).square().sum().backward()
        optimizer.step()
    assert_same(snapshot(models[0]), snapshot(models[1]))


def test_other_strides():
    models = [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8)
    for kind in ("elements", "rows", "columns", "all"):
        count = {"elements": 216, "rows": 6, "columns": 4, "all": 0}[kind]
        index = positions(count, count // 2, 0) if count else None
        for model in models:
            selection = Selection(kind, (6, 4, 3, 3), index)
            optimizer = wrap(torch.optim.SGD, Mask({"weight": selection}, model), model, lr=0.1)
            before = snapshot(model)
            model(x).square().mean().backward()
            optimizer.step()
            assert_frozen(before, model, get_engine(model).mask)
            retouch.verify_untouched(model)
            retouch.unwrap(model)
        torch.testing.assert_close(models[0].weight, models[1].weight)
    assert not models[1].weight.is_contiguous()


def test_a_gradient_set_by_hand_counts():
    model, _, optimizer = wrapped(cls=torch.optim.SGD, lr=1.0)
    before = snapshot(model)
    for p in own_weights(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    name, slot = next(iter(get_engine(model).slots.items()))
    flat = slot.selection.flat().long()
    assert torch.equal(slot.param.detach().reshape(-1)[flat], before[name].reshape(-1)[flat] - 1)


def test_gradients_of_an_unknown_kind_are_refused_by_name():
    class Sharded(torch.Tensor):
        pass

    model, _, optimizer = wrapped()
    model.up.weight.grad = torch.ones(20, 12).as_subclass(Sharded)
    with pytest.raises(LayoutError, match=r"gradient of up\.weight is a Sharded"):
        optimizer.step()


def test_gradients_from_before_the_wrap_are_kept_for_the_selected_only():
    model, plain = net(), net()
    loss_of(model, batch(0)).backward()
    loss_of(plain, batch(0)).backward()
    mask = element_mask(model)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), mask, model)
    selected = torch.cat([s.value.grad for s in get_engine(model).slots.values()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, selected.norm())
    reference = Reference(plain, mask, lambda p: torch.optim.SGD(p, lr=0.1))
    reference.train([0])  # step 0 sees batch(0)
    optimizer.step()
    assert_same(snapshot(model), snapshot(reference.model))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model():
    model, plain = net(), net()
    optimizer = wrap(torch.optim.AdamW, element_mask(model), model, lr=1e-2)
    compiled = torch.compile(model, backend="aot_eager")
    assert get_engine(compiled) is get_engine(model)
    reference = wrap(torch.optim.AdamW, element_mask(plain), plain, lr=1e-2)
    for step in range(3):
        compiled(batch(step)).square().mean().backward()
        loss_of(plain, batch(step)).backward()
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    for a, b in zip(snapshot(model).values(), snapshot(plain).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    retouch.verify_untouched(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    model = net(dtype)
    before, mask = snapshot(model), element_mask(model)
    optimizer = wrap(torch.optim.AdamW, mask, model, lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch(0))
    loss.backward()
    optimizer.step()
    assert_frozen(before, model, mask)


# --- on and off ----------------------------------------------------------------------------------


def test_unwrap_leaves_a_plain_model():
    model = net()
    model.embed.weight.requires_grad_(False)  # the user's own freeze, which the mask overrides
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    plain = copy.deepcopy(model)
    model, mask, optimizer = wrapped(model)
    assert "embed.weight" in mask and model.embed.weight.requires_grad
    train(model, optimizer, range(2))
    trained = snapshot(model)
    retouch.unwrap(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))
    assert_same(snapshot(model), trained)
    loss_of(model, batch(0)).backward()
    assert model.up.weight.grad is not None  # no hook takes it away
    with pytest.raises(EngineError, match="unwrapped"):
        optimizer.step()
    with pytest.raises(EngineError, match="not wrapped"):
        retouch.unwrap(model)
    wrapped(model)


def test_nothing_is_kept_alive():
    model, _, optimizer = wrapped()
    train(model, optimizer, [0])
    slot = get_engine(model).slots["up.weight"]
    gone = [weakref.ref(x) for x in (model, slot.value, slot.param, optimizer)]
    del model, optimizer, slot
    gc.collect()
    assert all(x() is None for x in gone)


def test_an_optimizer_alone_can_say_that_its_model_is_gone():
    model, _, optimizer = wrapped()
    del model
    gc.collect()
    with pytest.raises(EngineError, match="model of this engine is gone"):
        optimizer.step()


def test_what_wrap_refuses():
    model, mask, optimizer = wrapped()
    with pytest.raises(EngineError, match="wrapped already"):
        wrap(torch.optim.AdamW, mask, model)
    with pytest.raises(EngineError, match="submodule of the model is wrapped"):
        outer = nn.ModuleList([model])
        wrap(torch.optim.AdamW, Mask.full(outer), outer)
    with pytest.raises(EngineError, match=r"steps weights themselves \(embed\.weight"):
        get_engine(model).bind(torch.optim.SGD(own_weights(model), lr=0.1))
    train(model, optimizer, [0])

    fresh = net()
    mask = element_mask(fresh)
    with pytest.raises(HyperparameterError, match="lr"):
        wrap(torch.optim.SGD(fresh.parameters(), lr=0.1), mask, fresh, lr=0.2)
    with pytest.raises(EngineError, match=r"parameter 0 of group 0 .* not a parameter"):
        wrap(torch.optim.SGD(net().parameters(), lr=0.1), mask, fresh)
    with pytest.raises(EngineError, match=r"selects .*embed\.weight.* does not hold"):
        wrap(torch.optim.SGD(fresh.up.parameters(), lr=0.1), mask, fresh)
    with pytest.raises(EngineError, match=r"wanted a torch.optim.Optimizer, got object"):
        wrap(type("Wrapper", (), {"optimizer": object()})(), mask, fresh)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        wrap(torch.optim.AdamW, mask, fresh, lr=-1.0)
    with pytest.raises(MaskError):
        wrap(torch.optim.AdamW, mask, llama(), lr=0.1)
    with pytest.raises(BudgetError, match="selects nothing"):
        shape = tuple(fresh.up.weight.shape)
        wrap(torch.optim.AdamW, Mask({"up.weight": Selection("none", shape, None)}, fresh), fresh)
    # none of the refusals has left a trace
    assert "_retouch" not in dict(fresh.named_modules())
    assert all(p.requires_grad for p in fresh.parameters())
    loss_of(fresh, batch(0)).backward()
    assert fresh.up.weight.grad is not None


def test_a_mask_without_a_model():
    model = net()
    mask = Mask(dict(element_mask(model)))
    with pytest.raises(EngineError, match="pass model="):
        wrap(torch.optim.AdamW, mask)
    wrap(torch.optim.AdamW, mask, model=model, lr=0.1)


def test_the_mask_remembers_its_model():
    model = net()
    wrap(torch.optim.AdamW, element_mask(model), lr=0.1)
    assert get_engine(model).slots


def test_wrappers_of_the_model_and_the_optimizer():
    model, _, _ = wrapped()
    wrapper = nn.Module()
    wrapper.module = model
    assert get_engine(wrapper) is get_engine(model)
    with pytest.raises(EngineError, match="not wrapped"):
        get_engine(nn.Linear(2, 2))


def test_meta_and_integer_parameters():
    model = nn.Linear(4, 4, device="meta")
    with pytest.raises(MaskError, match="meta"):
        install(model, Mask.full(model))
    model = nn.Module()
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    model.scale = nn.Parameter(torch.ones(4))
    mask = Mask({"scale": Selection("all", (4,), None)}, model)
    optimizer = wrap(torch.optim.SGD, mask, model, lr=0.1)
    (model.scale * model.codes).sum().backward()
    optimizer.step()
    assert retouch.verify_untouched(model).parameters == 2
