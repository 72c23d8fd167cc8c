"""Stop, save, load, go on: the same bits as without the stop, by every way of saving."""

import copy
import io
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from training import (
    assert_frozen,
    assert_same,
    bits,
    element_mask,
    mixed_mask,
    net,
    snapshot,
    train,
)

import retouch
from retouch.engine import get_engine, install, wrap
from retouch.errors import EngineError, FormatError, MaskError
from retouch.masks import Mask, Selection

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CLASSES = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "retouch.AdamW": lambda p: retouch.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "retouch.Adafactor": lambda p: retouch.Adafactor(p, lr=1e-2),
    "kahan": lambda p: retouch.Lion(p, lr=1e-2, rounding="kahan"),
    "stochastic": lambda p: retouch.AdamW(p, lr=1e-2, rounding="stochastic"),
}
classes = pytest.mark.parametrize("name", CLASSES)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(model, optimizer):
    return through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def assert_same_run(model, other):
    assert_same(snapshot(model), snapshot(other))
    one, two = get_engine(model), get_engine(other)
    assert one.slots.keys() == two.slots.keys()
    for name, slot in one.slots.items():
        twin = two.slots[name]
        assert torch.equal(slot.value, twin.value), name
        assert torch.equal(bits(slot.base), bits(twin.base)), name
        assert slot.base_hash == twin.base_hash, name
        assert torch.equal(slot.selection.flat(), twin.selection.flat()), name


# --- plain torch ---------------------------------------------------------------------------------


@classes
@dtypes
@pytest.mark.parametrize("order", ["weights-optimizer", "optimizer-weights", "optimizer"])
def test_every_order_of_loading(name, dtype, order):
    model = net(dtype)
    base = snapshot(model)
    optimizer = wrap(CLASSES[name], mixed_mask(model), model)
    train(model, optimizer, range(4), clip=1.0)
    state = saved(model, optimizer)
    train(model, optimizer, range(4, 8), clip=1.0)

    # Loading the optimizer alone needs the frozen weights of the run, here the same base.
    again = net(dtype, seed=0 if order == "optimizer" else 9)
    resumed = wrap(CLASSES[name], mixed_mask(again), again)
    for part in order.split("-"):
        if part == "weights":
            again.load_state_dict(state["model"])
        else:
            resumed.load_state_dict(state["optimizer"])
    train(again, resumed, range(4, 8), clip=1.0)
    assert_same_run(again, model)
    assert_frozen(base, again, mixed_mask(model))
    retouch.verify_untouched(again)


@dtypes
def test_weights_loaded_before_the_wrap(dtype):
    """As a Trainer does it: the base of the run is then known from the optimizer's state alone."""
    model = net(dtype)
    base = snapshot(model)
    optimizer = wrap(CLASSES["AdamW"], element_mask(model), model)
    train(model, optimizer, range(4))
    state = saved(model, optimizer)
    train(model, optimizer, range(4, 8))

    again = net(dtype, seed=9)
    again.load_state_dict(state["model"])
    resumed = wrap(CLASSES["AdamW"], element_mask(again), again)
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, range(4, 8))
    assert_same_run(again, model)
    retouch.verify_untouched(again)
    with get_engine(again).base_weights():
        assert_same(snapshot(again), base)


@pytest.mark.parametrize("lazy", [False, True])
@classes
def test_the_saved_mask_wins(lazy, name):
    model = net()
    optimizer = wrap(CLASSES[name], mixed_mask(model), model)
    get_engine(model).mask.metadata["seed"] = 7
    train(model, optimizer, range(3))
    state = saved(model, optimizer)
    train(model, optimizer, range(3, 6))

    again = net()
    if lazy:
        engine = install(again)
        resumed = CLASSES[name](list(engine.parameters()))
        engine.bind(resumed)
    else:
        resumed = wrap(CLASSES[name], element_mask(again, seed=5), again)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert get_engine(again).mask.metadata["seed"] == 7
    assert dict(get_engine(again).mask).keys() == dict(mixed_mask(model)).keys()
    train(again, resumed, range(3, 6))
    assert_same_run(again, model)
    retouch.verify_untouched(again)


def test_what_was_trained_by_another_mask_goes_back_to_its_base():
    model, other = net(), net()
    optimizer = wrap(CLASSES["AdamW"], element_mask(model, seed=0), model)
    train(model, optimizer, range(3))
    state = saved(model, optimizer)
    wrong = wrap(CLASSES["AdamW"], element_mask(other, seed=50), other)
    train(other, wrong, range(3))
    wrong.load_state_dict(state["optimizer"])
    assert_same_run(other, model)
    retouch.verify_untouched(other)


def test_a_state_that_was_loaded_before_the_optimizer_was_bound():
    """A callback sees the Trainer's optimizer only after its state has been loaded."""
    model = net()
    engine = install(model)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-2)
    engine.bind(optimizer)
    engine.set_mask(mixed_mask(model))
    train(model, optimizer, range(3))
    state = saved(model, optimizer)
    train(model, optimizer, range(3, 6))

    again = net()
    again.load_state_dict(state["model"])
    engine = install(again)
    resumed = torch.optim.AdamW(engine.parameters(), lr=1e-2)
    resumed.load_state_dict(state["optimizer"])
    engine.bind(resumed)
    assert "retouch" not in resumed.param_groups[0]
    train(again, resumed, range(3, 6))
    assert_same_run(again, model)


def test_the_positions_of_parameters_must_fit_if_bound_late():
    model, again = net(), net()
    optimizer = wrap(CLASSES["AdamW"], element_mask(model), model)
    state = saved(model, optimizer)["optimizer"]
    engine = install(again, element_mask(again))
    values = [s.value for s in engine.slots.values()]
    resumed = torch.optim.AdamW(values[::-1], lr=1e-2)
    resumed.load_state_dict(state)
    with pytest.raises(EngineError, match="other parameters"):
        engine.bind(resumed)


@dtypes
@pytest.mark.parametrize("numel", [70_000, 2**24 + 5])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, retouch.AdamW])
def test_large_positions_survive(dtype, numel, cls):
    """An index in the optimizer's state would be cast to the parameter's dtype, and rounded."""

    def run():
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(numel, dtype=dtype))
        index = torch.cat([torch.arange(3), torch.arange(numel - 4, numel)]).to(torch.int32)
        mask = Mask({"weight": Selection("elements", (numel,), index)}, model)
        return model, wrap(cls, mask, model, lr=1e-3)

    def step(model, optimizer):
        value = get_engine(model).slots["weight"].value
        value.grad = torch.linspace(-1, 1, 7)
        optimizer.step()

    model, optimizer = run()
    step(model, optimizer)
    state = through_a_file(optimizer.state_dict())
    entry = state["param_groups"][0]["retouch"]
    assert entry["index"][0].dtype == torch.int32 and int(entry["index"][0][-1]) == numel - 1
    assert entry["value"][0].dtype == torch.float32 and entry["base"][0].dtype == dtype
    step(model, optimizer)
    again, resumed = run()
    resumed.load_state_dict(state)
    step(again, resumed)
    assert torch.equal(bits(again.weight), bits(model.weight))
    assert torch.equal(again._retouch.weight, model._retouch.weight)


def test_the_state_of_groups_and_schedulers():
    def run():
        model = net()
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = wrap(torch.optim.AdamW(groups, lr=1e-2), mixed_mask(model), model)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)

    model, optimizer, scheduler = run()
    train(model, optimizer, range(4), scheduler=scheduler)
    state = saved(model, optimizer)
    position = through_a_file(scheduler.state_dict())
    train(model, optimizer, range(4, 8), scheduler=scheduler)
    again, resumed, schedule = run()
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    schedule.load_state_dict(position)
    train(again, resumed, range(4, 8), scheduler=schedule)
    assert_same_run(again, model)


def test_parameters_of_somebody_else_in_the_same_optimizer():
    def run():
        torch.manual_seed(0)
        model, head = net(), nn.Linear(5, 5)
        engine = install(model, element_mask(model))
        optimizer = torch.optim.AdamW(
            [*(s.value for s in engine.slots.values()), *head.parameters()], lr=1e-2
        )
        engine.bind(optimizer)
        return model, head, optimizer

    def step(model, head, optimizer, i):
        head(model(torch.full((2, 3), i))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, head, optimizer = run()
    step(model, head, optimizer, 0)
    state = through_a_file(optimizer.state_dict())
    weights = copy.deepcopy((model.state_dict(), head.state_dict()))
    step(model, head, optimizer, 1)
    again, other, resumed = run()
    again.load_state_dict(weights[0])
    other.load_state_dict(weights[1])
    resumed.load_state_dict(state)
    step(again, other, resumed, 1)
    assert_same_run(again, model)
    assert torch.equal(other.weight, head.weight)
    del resumed.param_groups[0]["params"][-1]
    with pytest.raises(EngineError, match="other parameters beside"):
        resumed.load_state_dict(state)


def test_loading_does_not_change_the_state_dict():
    model = net()
    optimizer = wrap(CLASSES["AdamW"], element_mask(model), model)
    train(model, optimizer, [0])
    state = saved(model, optimizer)["optimizer"]
    held = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    assert state["param_groups"][0].keys() == held["param_groups"][0].keys()
    train(model, optimizer, [1])  # and does not share its tensors
    for name in ("value", "base"):
        pairs = zip(
            state["param_groups"][0]["retouch"][name],
            held["param_groups"][0]["retouch"][name],
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert "retouch" not in optimizer.param_groups[0]


def test_states_that_do_not_fit():
    model = net()
    optimizer = wrap(CLASSES["AdamW"], element_mask(model), model)
    state = optimizer.state_dict()
    before = snapshot(model)

    def broken(**changes):
        other = copy.deepcopy(state)
        other["param_groups"][0]["retouch"].update(changes)
        return other

    plain = torch.optim.AdamW(net().parameters(), lr=1.0).state_dict()
    plain["param_groups"][0]["params"] = state["param_groups"][0]["params"]
    with pytest.raises(EngineError, match="no retouch entry"):
        optimizer.load_state_dict(plain)
    with pytest.raises(FormatError, match="version 3"):
        optimizer.load_state_dict(broken(version=3))
    entry = state["param_groups"][0]["retouch"]
    names = list(entry["names"])
    with pytest.raises(MaskError, match=r"no parameter .*ghost"):
        optimizer.load_state_dict(broken(names=["ghost", *names[1:]]))
    with pytest.raises(MaskError, match=r"embed\.weight has shape \(24, 12\)"):
        optimizer.load_state_dict(broken(shapes=[[24, 12], *entry["shapes"][1:]]))
    with pytest.raises(MaskError, match=r"embed\.weight is torch.bfloat16"):
        base = [entry["base"][0].bfloat16(), *entry["base"][1:]]
        optimizer.load_state_dict(broken(base=base))
    with pytest.raises(FormatError, match=r"embed\.weight: .* selected"):
        value = [entry["value"][0][1:], *entry["value"][1:]]
        optimizer.load_state_dict(broken(value=value))
    with pytest.raises(FormatError, match="damaged"):
        optimizer.load_state_dict(broken(value=entry["value"][1:]))
    with pytest.raises(FormatError, match="damaged"):
        optimizer.load_state_dict(broken(kinds=["nonsense", *entry["kinds"][1:]]))
    with pytest.raises(ValueError, match="number of parameter groups"):
        other = copy.deepcopy(state)
        other["param_groups"] *= 2
        optimizer.load_state_dict(other)
    assert_same(snapshot(model), before)
    train(model, optimizer, range(2))  # still in order
    assert_frozen(before, model, get_engine(model).mask)


def test_the_entry_is_plain_data():
    model = net(torch.bfloat16)
    optimizer = wrap(CLASSES["AdamW"], mixed_mask(model), model)
    entry = optimizer.state_dict()["param_groups"][0]["retouch"]
    assert json.loads(entry["run"])["hashes"].keys() == snapshot(model).keys()
    count = len(entry["names"])
    for key in ("kinds", "shapes", "index", "value", "base", "base_hash"):
        assert len(entry[key]) == count, key


# --- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@classes
@dtypes
def test_dcp(name, dtype, tmp_path):
    model = net(dtype)
    optimizer = wrap(CLASSES[name], mixed_mask(model), model)
    train(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    assert list(weights) == list(net().state_dict())
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, range(4, 8))

    again = net(dtype)
    resumed = wrap(CLASSES[name], mixed_mask(again), again)
    weights, state = get_state_dict(again, resumed)
    into = {"model": weights, "optimizer": state}
    dcp.load(into, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        again, resumed, model_state_dict=into["model"], optim_state_dict=into["optimizer"]
    )
    train(again, resumed, range(4, 8))
    assert_same_run(again, model)
    retouch.verify_untouched(again)


@pytest.mark.parametrize("full", [False, True])
@dtypes
def test_dcp_in_memory(full, dtype):
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model = net(dtype)
    optimizer = wrap(CLASSES["AdamW"], mixed_mask(model), model)
    train(model, optimizer, range(4))
    weights = copy.deepcopy(get_model_state_dict(model, options=options))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    train(model, optimizer, range(4, 8))
    again = net(dtype, seed=4)
    resumed = wrap(CLASSES["AdamW"], mixed_mask(again), again)
    set_model_state_dict(again, weights, options=options)
    set_optimizer_state_dict(again, resumed, state, options=options)
    train(again, resumed, range(4, 8))
    assert_same_run(again, model)


@classes
def test_the_first_step_of_dcp_is_no_step(name):
    model, plain = net(), net()
    before = snapshot(model)
    optimizer = wrap(CLASSES[name], element_mask(model), model)
    get_optimizer_state_dict(model, optimizer)  # steps with zero gradients and lr 0
    assert_same(snapshot(model), before)
    for state in optimizer.state.values():
        assert float(state.get("step", 0)) == 0
    assert optimizer.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, range(4))
    train(plain, wrap(CLASSES[name], element_mask(plain), plain), range(4))
    assert_same(snapshot(model), snapshot(plain))


def test_a_warm_up_step_with_lr_zero_is_a_step():
    model = net()
    optimizer = wrap(torch.optim.AdamW, element_mask(model), model, lr=0.0)
    train(model, optimizer, [0])
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_flattened_states_are_refused():
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = net()
    optimizer = wrap(CLASSES["AdamW"], element_mask(model), model)
    train(model, optimizer, [0])
    state = get_optimizer_state_dict(model, optimizer, options=options)
    with pytest.raises(EngineError, match="flatten_optimizer_state_dict=False"):
        set_optimizer_state_dict(model, optimizer, state, options=options)
