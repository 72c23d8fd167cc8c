"""Any optimizer, and all that stands around one: scalers, schedulers, closures, groups."""

import copy

import pytest
import torch
from torch import nn
from training import (
    Reference,
    assert_frozen,
    assert_same,
    batch,
    element_mask,
    loss_of,
    mixed_mask,
    net,
    own_weights,
    snapshot,
    train,
    wrapped,
)

import retouch
from retouch.engine import get_engine, install, wrap
from retouch.errors import (
    EngineError,
)
from retouch.masks import Mask, Selection


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


def test_weights_may_not_join_an_optimizer_later():
    model, _, optimizer = wrapped()
    optimizer.add_param_group({"params": [model.up.weight]})
    with pytest.raises(EngineError, match=r"steps weights themselves \(up\.weight\)"):
        optimizer.step()


def test_two_optimizers_share_a_model():
    model, other = net(), net()
    engine = install(model, mixed_mask(model))
    before = snapshot(model)
    values = [slot.value for slot in engine.slots.values()]
    pair = (torch.optim.SGD(values[::2], lr=0.1), torch.optim.AdamW(values[1::2], lr=1e-2))
    for optimizer in pair:
        engine.bind(optimizer)
        engine.bind(optimizer)  # once is enough

    def step(model, pair):
        loss_of(model, batch(0)).backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()

    step(model, pair)
    engine.measure = True
    held = torch.cat([v.detach().reshape(-1) for v in values])
    saved = copy.deepcopy([o.state_dict() for o in pair]), copy.deepcopy(model.state_dict())
    step(model, pair)
    moved = torch.cat([v.detach().reshape(-1) for v in values]) - held
    assert engine.metrics()["update_norm"] == pytest.approx(float(moved.norm()), rel=1e-5)
    assert_frozen(before, model, engine.mask)
    twin = install(other, mixed_mask(other))
    values = [slot.value for slot in twin.slots.values()]
    again = (torch.optim.SGD(values[::2], lr=9.0), torch.optim.AdamW(values[1::2], lr=9.0))
    for optimizer in again:
        twin.bind(optimizer)
    other.load_state_dict(saved[1])
    for optimizer, state in zip(again, saved[0], strict=True):
        optimizer.load_state_dict(state)
    step(other, again)
    assert_same(snapshot(other), snapshot(model))


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
