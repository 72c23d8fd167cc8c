"""AdamW with a clock for each coordinate: policies P2 and P3 for coordinates that come and go."""

import contextlib
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import bits, element_mask, mixed_mask, net, train

import retouch
from retouch import ops
from retouch.errors import HyperparameterError, LayoutError
from retouch.optim import steps

PATHS = {"rust": contextlib.nullcontext, "torch": ops.force_torch}
paths = pytest.mark.parametrize("path", PATHS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# Three steps of three coordinates of which one is out at each of the first two. The numbers are those of
# float64 arithmetic by hand: lr .1, weight decay .01, betas (.9, .999).
START = (1.0, -2.0, 0.5)
GRADS = [(0.3, -4.0, 0.2), (-0.1, 1.0, 0.4), (0.2, 0.2, 0.2)]
MASKS = [(1, 1, 0), (1, 0, 1), (1, 1, 1)]
FROZEN = [(0.899, -1.898, 0.5), (0.858079, -1.898, 0.3995), (0.796912, -1.832898, 0.305883)]
RESET = [(0.899, -1.898, 0.5), (0.858079, -1.898, 0.3995), (0.796912, -1.996102, 0.305883)]
OPTIONS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def fresh(n, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    value, grad = (torch.randn(n, generator=generator, dtype=dtype) for _ in range(2))
    m = torch.randn(n, generator=generator, dtype=dtype)
    return value, grad, m, torch.rand(n, generator=generator, dtype=dtype)


@paths
@dtypes
@pytest.mark.parametrize(("reset", "want"), [(False, FROZEN), (True, RESET)], ids=["P2", "P3"])
def test_coordinates_that_come_and_go(path, dtype, reset, want):
    value = torch.tensor(START, dtype=dtype)
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    clock = torch.zeros(3, dtype=torch.int32)
    for grad, mask, row in zip(GRADS, MASKS, want, strict=True):
        here = torch.tensor(mask, dtype=torch.bool)
        parts = [t[here] for t in (value, torch.tensor(grad, dtype=dtype), m, v, clock)]
        with PATHS[path]():
            steps.adamw_(*parts[:4], None, None, "w", step=parts[4], **OPTIONS)
        for whole, part in zip((value, m, v, clock), (parts[0], *parts[2:]), strict=True):
            whole[here] = part
        if reset:
            m[~here], v[~here], clock[~here] = 0, 0, 0
        wanted = torch.tensor(row, dtype=dtype)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    assert clock.tolist() == ([3, 1, 2] if reset else [3, 2, 2])


@paths
@dtypes
@given(
    age=st.integers(0, 5000),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.95, 0.0)]),
    decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
)
def test_equal_ages_are_one_clock_bit_for_bit(path, dtype, age, betas, decay, maximize):
    options = {**OPTIONS, "beta1": betas[0], "beta2": betas[1], "weight_decay": decay}
    one, other = fresh(37, dtype), fresh(37, dtype)
    clock = torch.full((37,), age, dtype=torch.int32)
    with PATHS[path]():
        for t in range(1, 4):
            steps.adamw_(*one, None, None, "w", step=age + t, maximize=maximize, **options)
            steps.adamw_(*other, None, None, "w", step=clock, maximize=maximize, **options)
    assert clock.eq(age + 3).all()
    for a, b in zip(one, other, strict=True):
        assert torch.equal(bits(a), bits(b))


@paths
@dtypes
@pytest.mark.parametrize("spread", ["near", "far"])
def test_each_age_is_its_own_clock(path, dtype, spread):
    # "far": ages further apart than a table of them would be long.
    n = 40_000
    choices = torch.tensor([0, 1, 7, 5000] if spread == "near" else [0, 3, 2_000_000_000])
    ages = choices[torch.arange(n) % len(choices)].to(torch.int32)
    got, clock = fresh(n, dtype), ages.clone()
    with PATHS[path]():
        steps.adamw_(*got, None, None, "w", step=clock, **OPTIONS)
        for age in choices.tolist():
            here = ages == age
            want = [t[here] for t in fresh(n, dtype)]
            steps.adamw_(*want, None, None, "w", step=age + 1, **OPTIONS)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(bits(a[here]), bits(b))
    assert torch.equal(clock, ages + 1)


@paths
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_clock_of_one_coordinate_is_no_number(path, shape):
    one, other = (torch.full(shape, x) for x in (1.0, 1.0))
    m, v, n, w = (torch.zeros(shape) for _ in range(4))
    clock = torch.zeros(shape, dtype=torch.int32)
    with PATHS[path]():
        for t in (1, 2):
            grad = torch.full(shape, 0.3 * t)
            steps.adamw_(one, grad, m, v, None, None, "w", step=clock, **OPTIONS)
            steps.adamw_(other, grad, n, w, None, None, "w", step=t, **OPTIONS)
    assert int(clock) == 2 and torch.equal(bits(one), bits(other))


@paths
def test_a_late_joiner_does_not_overshoot(path):
    """Constant gradient: each step of a new coordinate is lr; under a shared clock up to 6.56 lr."""
    options = {**OPTIONS, "weight_decay": 0.0}
    longest = {}
    for shared in (False, True):
        x, m, v = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
        clock = torch.tensor([100_000, 0], dtype=torch.int32)
        lengths = []
        for k in range(1, 101):
            before = x[1].item()
            with PATHS[path]():
                step = 100_000 + k if shared else clock
                steps.adamw_(x, torch.ones(2), m, v, None, None, "w", step=step, **options)
            lengths.append((before - x[1].item()) / 0.1)
        longest[shared] = max(lengths)
        if shared:
            assert lengths[0] == pytest.approx(math.sqrt(10), rel=1e-3)
    assert longest[False] == pytest.approx(1.0, rel=1e-3)
    assert longest[True] == pytest.approx(6.56, rel=1e-2)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [element_mask, mixed_mask])
def test_clocks_survive_a_state_dict(dtype, mask):
    def start():
        model = net(dtype)
        return model, retouch.wrap(retouch.AdamW, mask(model), model, lr=1e-2)

    model, optimizer = start()
    train(model, optimizer, range(2))
    for i, value in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state[value]
        ages = torch.arange(value.numel()).reshape(value.shape) % 3 + 70_000 + i
        state["step"] = ages.to(torch.int32)
    saved = through_a_file(optimizer.state_dict())
    weights = through_a_file(model.state_dict())
    train(model, optimizer, range(2, 5))
    again, resumed = start()
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(again, resumed, range(2, 5))
    for a, b in zip(optimizer.param_groups[0]["params"], resumed.param_groups[0]["params"],
                    strict=True):  # fmt: skip
        one, other = optimizer.state[a], resumed.state[b]
        assert other["step"].dtype == torch.int32
        assert torch.equal(one["step"], other["step"])
        assert torch.equal(bits(a), bits(b)) and torch.equal(one["exp_avg"], other["exp_avg"])
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_a_clock_that_does_not_fit():
    p = nn.Parameter(torch.ones(3))
    optimizer = retouch.AdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["step"] = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(LayoutError, match="clock of parameter 0 of group 0"):
        optimizer.step()
    for path in PATHS.values():
        for bad in (-1, 2**31 - 1):
            parts, clock = fresh(3), torch.tensor([0, bad, 0], dtype=torch.int32)
            before = [t.clone() for t in (*parts, clock)]
            with path(), pytest.raises(HyperparameterError, match="2147483646"):
                steps.adamw_(*parts, None, None, "w", step=clock, **OPTIONS)
            for a, b in zip((*parts, clock), before, strict=True):
                assert torch.equal(a, b)
