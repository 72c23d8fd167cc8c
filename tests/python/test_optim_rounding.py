"""16-bit weights without float32 masters: stochastic rounding and Kahan's compensation."""

import hashlib
import io
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from training import (
    assert_frozen,
    assert_same,
    batch,
    bits,
    element_mask,
    loss_of,
    mixed_mask,
    net,
    own,
    snapshot,
    train,
)

import retouch
from retouch.engine import get_engine, wrap
from retouch.errors import HyperparameterError, LayoutError
from retouch.masks import Mask, Selection
from retouch.optim import rounding as ways
from retouch.optim.rounding import draws, stochastic

BF16, F16 = torch.bfloat16, torch.float16
OPTIMIZERS = {
    "AdamW": (retouch.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": (retouch.SGD, {"lr": 0.1, "momentum": 0.9}),
    "plain SGD": (retouch.SGD, {"lr": 0.5}),
    "Lion": (retouch.Lion, {"lr": 1e-3, "weight_decay": 0.1}),
    "Adafactor": (retouch.Adafactor, {"lr": 0.05}),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
both = pytest.mark.parametrize("rounding", ["stochastic", "kahan"])


# --- the rounding itself -----------------------------------------------------------------------


def mixed(counter, key):
    """SplitMix64's finaliser in Python's integers; its high 16 bits."""
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    x = (counter * 0x9E3779B97F4A7C15 + start) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 48


def test_draws_depend_on_key_and_counter_alone():
    counters = torch.arange(100_000)
    whole = draws(counters, "w")
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws(counters[order], "w"), whole[order])
    assert torch.equal(draws(counters[7:9].to(torch.int32), "w"), whole[7:9])
    assert not torch.equal(draws(counters, "v"), whole)
    assert int(whole.min()) >= 0 and int(whole.max()) < 65536
    assert whole[:4].tolist() == [19666, 54398, 5422, 47109]  # in any process, on any machine
    assert [mixed(i, "w") for i in range(50)] == whole[:50].tolist()


def test_draws_are_uniform_and_unrelated():
    n, bins = 1_000_000, 256
    for key in ("0 1 w", "0 2 w"):
        x = draws(torch.arange(n), key)
        for part in (x >> 8, x & 255):
            counts = torch.bincount(part, minlength=bins).double()
            chi = float(((counts - n / bins) ** 2 / (n / bins)).sum())
            assert abs(chi - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
        u = x.double() / 65536 - 0.5
        for lag in (1, 2, 64, 4096):
            assert abs(float((u[lag:] * u[:-lag]).mean()) * 12) < 5 / math.sqrt(n)
    a, b = (draws(torch.arange(n), f"0 {step} w").double() / 65536 - 0.5 for step in (1, 2))
    assert abs(float((a * b).mean()) * 12) < 5 / math.sqrt(n)


def test_the_expectation_is_the_number_itself():
    numbers = torch.tensor([1.001, -1.001, 3.14159, -1e-3, 1e30, 7e-39, -2.5e-41, 255.9, 1 / 3])
    n = 40_000
    for i, x in enumerate(numbers):
        rounded = stochastic(x.expand(n).contiguous(), torch.arange(n), f"{i}").double()
        found = rounded.unique()
        low, high = float(found.min()), float(found.max())
        assert len(found) == 2 and low < float(x) < high
        gap = high - low
        share = (float(x) - low) / gap
        sigma = gap * math.sqrt(share * (1 - share) / n)
        assert abs(float(rounded.mean()) - float(x)) < 5 * sigma
        nearest = float(x.to(BF16))
        assert nearest in (low, high)


def test_numbers_of_bfloat16_never_move():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    for key in ("a", "b"):
        same = stochastic(every.float(), torch.arange(every.numel()), key)
        number = ~every.isnan()
        assert torch.equal(bits(same[number]), bits(every[number]))
        assert same[~number].isnan().all()
    worst = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert stochastic(worst, torch.arange(2), "a").isnan().all()


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_and_threads_change_nothing(monkeypatch, block):
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)).view(4, 50)
    want = stochastic(x, torch.arange(200), "w")
    monkeypatch.setattr(ways, "_BLOCK", block)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(stochastic(x, torch.arange(200), "w"), want)
    finally:
        torch.set_num_threads(before)


def test_a_hundred_small_steps():
    """1 - 100 / 1000: rounded to the nearest it stays 1."""
    nearest = torch.ones((), dtype=BF16)
    for _ in range(100):
        nearest = nearest - 1e-3
    assert nearest == 1
    for rounding in ("stochastic", "kahan"):
        p = nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = retouch.SGD([p], lr=1e-3, rounding=rounding)
        p.grad = torch.ones_like(p)
        for _ in range(100):
            optimizer.step()
        mean = p.detach().double().mean().item()
        assert mean == pytest.approx(0.9, abs=2e-3), rounding
        if rounding == "kahan":
            assert torch.equal(p.detach(), torch.full((4096,), 0.9).to(BF16))


# --- training -----------------------------------------------------------------------------------


def run(rounding, name, mask=element_mask, dtype=BF16, steps=4, **options):
    model = net(dtype)
    cls, defaults = OPTIMIZERS[name]
    chosen = mask(model)
    optimizer = wrap(cls, chosen, model, rounding=rounding, **{**defaults, **options})
    before = snapshot(model)
    train(model, optimizer, range(steps))
    return model, chosen, optimizer, before


@both
@optimizers
@pytest.mark.parametrize("mask", [element_mask, mixed_mask])
def test_the_rest_is_frozen_and_values_have_no_masters(rounding, name, mask):
    model, chosen, optimizer, before = run(rounding, name, mask)
    assert_frozen(before, model, chosen)
    retouch.verify_untouched(model)
    for slot in get_engine(model).slots.values():
        assert slot.value.dtype == BF16 and slot.value.element_size() == 2
        assert torch.equal(slot.selection.take(slot.param), slot.value.detach())
        for key, item in optimizer.state[slot.value].items():
            want = BF16 if key == "kahan_comp" else torch.float32
            assert item.dtype == want, key


@both
@optimizers
def test_float32_weights_do_not_notice(rounding, name):
    plain, *_ = run("master", name, dtype=torch.float32)
    model, *_ = run(rounding, name, dtype=torch.float32)
    assert_same(snapshot(plain), snapshot(model))


@optimizers
def test_kahan_stays_with_the_master(name):
    """Where the nearest 16-bit number alone loses most steps."""
    steps, lr = 30, {"AdamW": 1e-4, "SGD": 3e-4, "plain SGD": 3e-3, "Lion": 1e-4,
                     "Adafactor": 1e-3}[name]  # fmt: skip
    master, _, _, before = run("master", name, steps=steps, lr=lr)
    model, _, optimizer, _ = run("kahan", name, steps=steps, lr=lr)
    far, off = 0.0, 0.0
    for n, slot in get_engine(model).slots.items():
        twin = get_engine(master).slots[n]
        comp = optimizer.state[slot.value]["kahan_comp"].float()
        value = slot.value.detach().float() + comp
        off += float((value - twin.value.detach()).square().sum())
        far += float((twin.value.detach() - twin.base.float()).square().sum())
    assert off < (0.1 if name != "Lion" else 0.3) ** 2 * far
    changed = sum(int((bits(a) != bits(before[n])).sum()) for n, a in snapshot(model).items())
    assert changed > 0


@both
def test_an_element_mask_of_all_is_the_whole(rounding):
    """Draws are by position in the weight, whatever the kind of the selection."""

    def train_with(selection):
        model = net(BF16)
        mask = Mask({"up.weight": selection}, model)
        optimizer = wrap(retouch.AdamW, mask, model, lr=1e-2, rounding=rounding)
        train(model, optimizer, range(3))
        return snapshot(model)

    shape = (20, 12)
    whole = train_with(Selection("all", shape))
    index = torch.arange(240, dtype=torch.int32)
    assert_same(whole, train_with(Selection("elements", shape, index)))
    assert_same(whole, train_with(Selection("rows", shape, index[:20])))
    assert_same(whole, train_with(Selection("columns", shape, index[:12])))


def test_seeds_differ_and_repeat():
    runs = [run("stochastic", "AdamW", rounding_seed=seed)[0] for seed in (0, 0, 1)]
    assert_same(snapshot(runs[0]), snapshot(runs[1]))
    with pytest.raises(AssertionError):
        assert_same(snapshot(runs[0]), snapshot(runs[2]))


def test_both_learn_as_with_masters():
    def learn(rounding):
        model = net(BF16)
        options = {"lr": 2e-4, "rounding": rounding}
        optimizer = wrap(retouch.AdamW, element_mask(model, 0.5), model, **options)
        for _ in range(150):
            loss_of(model, batch(0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss_of(model, batch(0)).item()

    master, chance, kahan = (learn(r) for r in ("master", "stochastic", "kahan"))
    first = loss_of(net(BF16), batch(0)).item()
    assert first - chance > 0.8 * (first - master) and first - kahan > 0.9 * (first - master)


def test_what_somebody_overwrites_is_not_compensated():
    model, _, optimizer, _ = run("kahan", "plain SGD", lr=1e-3)
    slot = get_engine(model).slots["up.weight"]
    assert optimizer.state[slot.value]["kahan_comp"].any()
    with torch.no_grad():
        slot.param.zero_()
    for p in get_engine(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not slot.param.any()
    assert not optimizer.state[slot.value]["kahan_comp"].any()


@both
def test_a_plain_parameter_without_an_engine(rounding):
    p = nn.Parameter(torch.ones(50, dtype=BF16))
    twin = nn.Parameter(torch.ones(50))
    one = retouch.AdamW([p], lr=1e-3, rounding=rounding)
    other = torch.optim.AdamW([twin], lr=1e-3)
    for t in range(50):
        grad = torch.randn(50, generator=torch.Generator().manual_seed(t)).to(BF16)
        p.grad, twin.grad = grad.clone(), grad.float()
        one.step()
        other.step()
    off = (p.detach().float() - twin.detach()).abs().max()
    assert off <= (2**-8 * 1.01 if rounding == "kahan" else 0.1)
    assert one.state[p]["exp_avg"].dtype == torch.float32


def test_half_precision():
    p = nn.Parameter(torch.ones(5, dtype=F16))
    p.grad = torch.ones_like(p)
    optimizer = retouch.SGD([p], lr=1e-4, rounding="kahan")
    for _ in range(100):
        optimizer.step()
    torch.testing.assert_close(p.detach().float(), torch.full((5,), 0.99), rtol=0, atol=1e-3)
    with pytest.raises(LayoutError, match="stochastic rounding is for bfloat16"):
        retouch.SGD([p], rounding="stochastic").step()
    with pytest.raises(LayoutError, match="rounding='kahan'"):
        retouch.SGD([p]).step()


# --- resuming -------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@both
@optimizers
def test_it_resumes_bit_for_bit_across_a_change_of_the_mask(rounding, name):
    cls, options = OPTIMIZERS[name]

    def start():
        model = net(BF16)
        mask = mixed_mask(model)
        return model, mask, wrap(cls, mask, model, rounding=rounding, **options)

    model, first, optimizer = start()
    second = Mask({n: s for n, s in element_mask(model).items() if n in first}, model)
    train(model, optimizer, range(2))
    get_engine(model).move(second)
    train(model, optimizer, range(2, 4))
    saved = through_a_file({"m": model.state_dict(), "o": optimizer.state_dict()})
    again, _, resumed = start()
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    for slot in get_engine(again).slots.values():
        for key, item in resumed.state[slot.value].items():
            assert item.dtype != BF16 or key == "kahan_comp", key
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(4, 6))
        get_engine(m).move(Mask(dict(first.items()), m))
        train(m, o, range(6, 8))
    assert_same(snapshot(model), snapshot(again))
    retouch.verify_untouched(again)


@both
@optimizers
def test_dcp_makes_the_state_without_a_step(rounding, name):
    cls, options = OPTIMIZERS[name]
    models = [net(BF16), net(BF16)]
    for i, model in enumerate(models):
        optimizer = wrap(cls, element_mask(model), model, rounding=rounding, **options)
        if i:
            get_optimizer_state_dict(model, optimizer)  # steps with zero gradients and lr 0
        train(model, optimizer, range(3))
    assert_same(*(snapshot(model) for model in models))


@both
def test_a_plain_parameter_resumes_bit_for_bit(rounding):
    def go(p, optimizer, steps):
        for t in steps:
            p.grad = torch.randn(60, generator=torch.Generator().manual_seed(t)).to(BF16)
            optimizer.step()

    p = nn.Parameter(torch.ones(60, dtype=BF16))
    optimizer = retouch.AdamW([p], lr=1e-3, rounding=rounding)
    go(p, optimizer, range(3))
    q = nn.Parameter(p.detach().clone())
    other = retouch.AdamW([q], lr=1e-3, rounding=rounding)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state[q]["exp_avg_sq"].dtype == torch.float32
    go(p, optimizer, range(3, 6))
    go(q, other, range(3, 6))
    assert torch.equal(bits(p), bits(q))


def test_what_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(
        HyperparameterError, match="rounding must be one of master, stochastic, kahan"
    ):
        retouch.AdamW([p], rounding="nearest")


def test_groups_may_differ_and_a_new_optimizer_brings_masters_back():
    model = net(BF16)
    groups = [
        {"params": [model.up.weight]},
        {"params": [model.down.weight, model.norm.weight], "rounding": "kahan"},
    ]
    mask = Mask({n: Selection("all", tuple(model.get_parameter(n).shape))
                 for n in ("up.weight", "down.weight")}, model)  # fmt: skip
    optimizer = wrap(retouch.AdamW(groups, lr=1e-3), mask, model)
    engine = get_engine(model)
    dtypes = {name: slot.value.dtype for name, slot in engine.slots.items()}
    assert dtypes == {"up.weight": torch.float32, "down.weight": BF16}
    train(model, optimizer, range(2))
    engine.bind(torch.optim.SGD(engine.values(), lr=0.1))
    assert all(value.dtype == torch.float32 for value in engine.values())
    for slot in engine.slots.values():
        assert torch.equal(slot.value.detach().to(BF16), slot.param.detach())


def test_an_optimizer_that_is_bound_later():
    model = net(BF16)
    engine = retouch.engine.install(model, element_mask(model))
    optimizer = retouch.SGD(engine.values(), lr=0.1, rounding="stochastic")
    loss_of(model, batch(0)).backward()
    engine.bind(optimizer)
    optimizer.step()
    assert all(value.dtype == BF16 for value in engine.values())
    retouch.verify_untouched(model)


@both
def test_a_pull_comes_before_the_rounding(rounding):
    """One step goes half as far with a pull of a half, to within two units of the last place."""
    moved = {}
    for pull in (0.0, 0.5):
        model = net(dtype=BF16)
        start = snapshot(model)
        options = {"lr": 0.5, "rounding": rounding, "pull": pull}
        train(model, wrap(retouch.SGD, element_mask(model), model, **options), range(1))
        moved[pull] = {n: p.detach().double() - start[n].double() for n, p in own(model)}
        weights = {n: p.detach().double().abs() for n, p in own(model)}
    assert any(way.abs().max() > 1e-3 for way in moved[0.0].values())
    for name, way in moved[0.5].items():
        slack = 2**-7 * (weights[name] + moved[0.0][name].abs()) * 2
        assert ((way - moved[0.0][name] / 2).abs() <= slack).all(), name
    assert any((moved[0.5][n] - moved[0.0][n]).abs().max() > 1e-3 for n in moved[0.0])
