"""The engine on a model: what it adds, what it leaves alone, what it refuses."""

import copy
import gc
import pickle
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
    own,
    positions,
    snapshot,
    train,
)
from transformers import LlamaForCausalLM

import retouch
from retouch.engine import get_engine, install, wrap
from retouch.errors import (
    BudgetError,
    EngineError,
    FrozenError,
    HyperparameterError,
    LayoutError,
    MaskError,
)
from retouch.masks import Mask, Selection


def wrapped(model=None, mask=None, cls=torch.optim.AdamW, **options):
    model = net() if model is None else model
    mask = element_mask(model) if mask is None else mask
    return model, mask, wrap(cls, mask, model, **{"lr": 1e-2, **options})


def own_weights(model):
    return [p for _, p in own(model)]


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
    optimizer = wrap(torch.optim.AdamW, mask, model, lr=1e-2)
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
    reference = Reference(plain, mask, lambda p: torch.optim.SGD(p, lr=0.1))
    reference.train([0])  # step 0 sees batch(0)
    optimizer.step()
    assert_same(snapshot(model), snapshot(reference.model))


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


# --- the optimizer's surroundings ----------------------------------------------------------------


def test_grad_scaler_unscales_and_skips():
    model, plain = net(), net()
    mask = element_mask(model)
    optimizer = wrap(torch.optim.AdamW, mask, model, lr=1e-2)
    reference = wrap(torch.optim.AdamW, element_mask(plain), plain, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        loss = loss_of(model, batch(step))
        if step == 2:
            before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 2:  # an overflow leaves weights and state alone
            assert_same(snapshot(model), before)
            for i, entries in optimizer.state_dict()["state"].items():
                assert all(torch.equal(v, state[i][k]) for k, v in entries.items())
            continue
        loss_of(plain, batch(step)).backward()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
        reference.step()
        reference.zero_grad()
    for a, b in zip(snapshot(model).values(), snapshot(plain).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    ],
    ids=["LambdaLR", "OneCycleLR", "CosineAnnealingLR"],
)
@pytest.mark.parametrize("late", [False, True], ids=["wrap-then-schedule", "schedule-then-wrap"])
def test_schedulers(make, late):
    model = net()
    mask = element_mask(model)
    reference = Reference(model, mask, lambda p: torch.optim.AdamW(p, lr=1e-2))
    theirs = make(reference.optimizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if late:
        scheduler = make(optimizer)
        wrap(optimizer, mask, model)
    else:
        wrap(optimizer, mask, model)
        scheduler = make(optimizer)
    for step in range(6):
        train(model, optimizer, [step], scheduler=scheduler)
        reference.train([step])
        theirs.step()
        assert scheduler.get_last_lr() == theirs.get_last_lr()
    assert_same(snapshot(model), snapshot(reference.model))


def test_reduce_on_plateau():
    model, _, optimizer = wrapped(lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for metric in (1.0, 2.0, 3.0):
        train(model, optimizer, [0])
        scheduler.step(metric)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_closures_see_the_weights_that_are_tried():
    model = net()
    mask = element_mask(model)
    options = {"lr": 0.5, "max_iter": 8, "line_search_fn": "strong_wolfe"}
    reference = Reference(model, mask, lambda p: torch.optim.LBFGS(p, **options))
    optimizer = wrap(torch.optim.LBFGS(model.parameters(), **options), mask, model)

    def ours():
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    def theirs():
        reference.write()
        reference.optimizer.zero_grad()
        loss = loss_of(reference.model, batch(0))
        reference.backward(loss)
        return loss

    for _ in range(2):
        assert torch.equal(optimizer.step(ours), reference.optimizer.step(closure=theirs))
        reference.write()
        assert_same(snapshot(model), snapshot(reference.model))
    assert torch.equal(optimizer.step(closure=ours), reference.optimizer.step(theirs))


def test_optimizers_that_swap_their_parameters_for_evaluation():
    class Averaged(torch.optim.SGD):
        """Keeps a mean; `eval` puts it in place of the parameters, `train` takes it out again."""

        def swap(self):
            for group in self.param_groups:
                for p in group["params"]:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    held = p.data.clone()
                    p.data.copy_(mean)
                    mean.copy_(held)

        def train(self):
            self.swap()

        def eval(self):
            self.swap()

    model, mask, optimizer = wrapped(cls=Averaged, lr=0.1)
    before = snapshot(model)
    train(model, optimizer, [0])
    trained = snapshot(model)
    optimizer.eval()
    for name, slot in get_engine(model).slots.items():
        assert not slot.param.detach().reshape(-1)[slot.selection.flat().long()].any(), name
    optimizer.train()
    assert_same(snapshot(model), trained)
    assert_frozen(before, model, mask)
    retouch.unwrap(model)
    optimizer.eval()  # the optimizer's own again: the model is plain
    assert_same(snapshot(model), trained)


def test_hooks_fire_once_a_step():
    torch.optim.AdamW([torch.ones(1, requires_grad=True)])  # patches the class
    model, _, optimizer = wrapped()
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(snapshot(model)))
    before = snapshot(model)
    train(model, optimizer, [0])
    assert len(steps) == 1
    assert any(not torch.equal(before[n], w) for n, w in steps[0].items())  # already written


def test_groups_are_edited_in_place():
    model = net()
    mask = element_mask(model)
    groups = [
        {"params": [("up.weight", model.up.weight), ("up.bias", model.up.bias)], "lr": 0.1},
        {"params": [("down.weight", model.down.weight)], "weight_decay": 0.5},
        {"params": [(n, p) for n, p in model.named_parameters() if n.split(".")[0] in
                    ("embed", "conv", "norm")]},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    held, lists = list(optimizer.param_groups), [g["params"] for g in optimizer.param_groups]
    wrap(optimizer, mask, model)
    slots = get_engine(model).slots
    assert all(a is b for a, b in zip(held, optimizer.param_groups, strict=True))
    assert all(g["params"] is x for g, x in zip(held, lists, strict=True))
    assert [g["lr"] for g in held] == [0.1, 1e-3, 1e-3]
    assert [g["weight_decay"] for g in held] == [1e-2, 0.5, 1e-2]
    assert held[0]["params"] == [slots["up.weight"].value, slots["up.bias"].value]
    assert held[0]["param_names"] == ["up.weight", "up.bias"]
    assert held[1]["params"] == [] and held[1]["param_names"] == []  # frozen by the mask
    before = snapshot(model)
    train(model, optimizer, range(3))
    assert_frozen(before, model, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_of_a_used_optimizer_is_cut_down(dtype):
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    dense = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    mask = mixed_mask(model)
    wrap(optimizer, mask, model)
    slots = get_engine(model).slots
    assert set(optimizer.state) == {slot.value for slot in slots.values()}
    for name, slot in slots.items():
        state, flat = optimizer.state[slot.value], slot.selection.flat().long()
        assert state["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == slot.value.shape
            want = dense[name][key].reshape(-1)[flat].float()
            assert torch.equal(state[key].reshape(-1), want)
    before = snapshot(model)
    train(model, optimizer, range(3, 6))
    assert_frozen(before, model, mask)


def test_factored_state_cannot_be_cut_down():
    model = net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    train(model, optimizer, [0])
    with pytest.raises(EngineError, match=r"row_var.*first step"):
        wrap(optimizer, element_mask(model), model)
    assert "_retouch" not in dict(model.named_modules())
    assert all(p.requires_grad for p in model.parameters())
    train(model, optimizer, [1])  # the optimizer is as it was


def test_a_mask_may_come_after_the_optimizer():
    model, eager = net(), net()
    engine = install(model)
    values = list(engine.parameters())
    assert len(values) == len(snapshot(model)) and not any(v.numel() for v in values)
    assert not any(p.requires_grad for p in own_weights(model))
    optimizer = torch.optim.AdamW(values, lr=1e-2)
    engine.bind(optimizer)
    before = snapshot(model)
    optimizer.step()
    mask = mixed_mask(model)
    engine.set_mask(mask)
    assert all(a is b for a, b in zip(values, engine.parameters(), strict=True))
    train(model, optimizer, range(4), clip=0.1)
    assert_frozen(before, model, mask)
    train(eager, wrap(torch.optim.AdamW, mixed_mask(eager), eager, lr=1e-2), range(4), clip=0.1)
    assert_same(snapshot(model), snapshot(eager))
    retouch.verify_untouched(model)


def test_adagrad_makes_its_state_before_the_mask_is_known():
    model, eager = net(), net()
    options = {"lr": 1e-2, "initial_accumulator_value": 0.25}
    engine = install(model)
    optimizer = torch.optim.Adagrad(engine.parameters(), **options)
    engine.bind(optimizer)
    engine.set_mask(element_mask(model))
    train(model, optimizer, range(3))
    train(eager, wrap(torch.optim.Adagrad, element_mask(eager), eager, **options), range(3))
    assert_same(snapshot(model), snapshot(eager))


def test_the_mask_may_change_until_something_has_moved():
    model, first, optimizer = wrapped()
    second = Mask({n: ~s for n, s in first.items() if (~s).count}, model)
    before = snapshot(model)
    engine = get_engine(model)
    engine.set_mask(second)
    assert engine.mask is second
    train(model, optimizer, range(2))
    assert_frozen(before, model, second)
    with pytest.raises(EngineError, match="have moved"):
        engine.set_mask(first)
    assert engine.mask is second
    train(model, optimizer, range(2, 4))
    assert_frozen(before, model, second)


def test_a_new_mask_needs_an_optimizer_that_holds_its_values():
    model, mask, _ = wrapped()
    frozen = next(n for n in snapshot(model) if n not in mask)
    other = Mask({frozen: Selection("all", tuple(snapshot(model)[frozen].shape), None)}, model)
    with pytest.raises(EngineError, match=f"built without {frozen}"):
        get_engine(model).set_mask(other)


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
    train(model, optimizer, [0])
    assert torch.equal(model.up.weight, torch.full_like(model.up.weight, 3.0))


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


def test_replaced_and_resized_parameters_are_noticed():
    model, _, optimizer = wrapped(llama(tied=False))
    model.resize_token_embeddings(120)
    loss_of(model, batch(0)).backward()
    with pytest.raises(EngineError, match=r"embed_tokens\.weight .*unwrap"):
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
