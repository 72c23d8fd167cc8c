"""AdamW with moments of 8 bits in blocks of 256."""

import contextlib
import io

import pytest
import torch
from torch import nn
from training import assert_frozen, assert_same, bits, positions, snapshot

import retouch
from retouch import ops
from retouch.engine import get_engine, wrap
from retouch.errors import HyperparameterError, LayoutError, ShapeError
from retouch.masks import Mask, Selection
from retouch.optim import gates, steps
from retouch.optim.lowbit import BLOCK, dequantise, expand, levels, nearest, quantise

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fresh(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- quantisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_those_of_the_paper(signed):
    """Seven decades; each has half as many levels as the next larger; 0 and 1 beside them."""
    table = levels(signed)
    assert table.shape == (256,) and table.unique().numel() == 256
    assert table[-1] == 1 and (table == 0).sum() == 1
    for d in range(7):
        inside = (table.abs() > 10.0 ** (-d - 1)) & (table.abs() < 10.0**-d)
        assert int(inside.sum()) == 128 >> d
    # By hand: the largest is the middle of the last of equal parts of [0.1, 1].
    assert float(table[-2]) == pytest.approx(1 - 0.9 / (128 if signed else 256))
    assert float(table.min()) == pytest.approx(-(1 - 0.9 / 128) if signed else 0.0)
    smallest = table[table > 0][0]
    assert float(smallest) == pytest.approx(0.55e-6 if signed else 0.325e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_gets_the_nearest_level(signed):
    x = fresh(3, 500) * torch.logspace(-6, 0, 500)
    x = x if signed else x.square()
    codes, scale = quantise(x, signed)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    assert scale.shape == (-(-x.numel() // BLOCK),)
    table = levels(signed).double()
    for i, (number, code) in enumerate(zip(x.flatten().tolist(), codes.flatten().tolist(),
                                           strict=True)):  # fmt: skip
        block = x.flatten()[i // BLOCK * BLOCK : (i // BLOCK + 1) * BLOCK]
        top = float(block.abs().max())
        assert float(scale[i // BLOCK]) == top
        share = number / top
        off = (table - share).abs()
        if not signed and number > 0:
            assert code > 0
            off = off[1:]
        assert float((table[code] - share).abs()) <= float(off.min()) + 1e-7
    back = dequantise(codes, scale, signed)
    assert back.shape == x.shape


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_finds_what_a_search_finds(signed):
    table = levels(signed).double()
    bounds = ((table[1:] + table[:-1]) / 2).float()
    edges = torch.cat([bounds, table.float(), fresh(200_000).clamp(-1, 1), fresh(9) * 1e-9])
    if not signed:
        edges = edges.abs()
    near = [edges.nextafter(torch.tensor(x)) for x in (-2.0, 2.0)]
    x = torch.cat([edges, *near]).clamp_(-1, 1)
    assert torch.equal(nearest(x, signed), torch.bucketize(x, bounds, out_int32=True))


def test_a_second_moment_never_becomes_zero():
    x = torch.zeros(BLOCK * 2)
    x[0], x[1], x[BLOCK] = 1.0, 1e-12, 0.0
    codes, scale = quantise(x, signed=False)
    back = dequantise(codes, scale, signed=False)
    assert back[0] == 1 and back[1] > 0 and not back[2:].any()


def test_nan_and_infinity_are_not_hidden():
    x = torch.ones(3 * BLOCK)
    x[5], x[BLOCK] = float("nan"), float("inf")
    back = dequantise(*quantise(x, signed=True), signed=True)
    assert back[:BLOCK].isnan().all() and not back[BLOCK : BLOCK + 1].isfinite().any()
    assert torch.equal(back[2 * BLOCK :], x[2 * BLOCK :])


# --- both paths ---------------------------------------------------------------------------------

SIZES = [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7, 70_001]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("signed", [True, False])
def test_rust_and_torch_give_the_same_codes(n, signed):
    x = fresh(n) * torch.logspace(-9, 0, n)
    x = x if signed else x.square()
    x[: n // 3] = 0
    ours = quantise(x, signed)
    with ops.force_torch():
        theirs = quantise(x, signed)
        wide = dequantise(*theirs, signed)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(bits(dequantise(*ours, signed)), bits(wide))


def codes_of(m, v):
    first, second = quantise(m, True), quantise(v, False)
    return {"exp_avg_codes": first[0], "exp_avg_scale": first[1],
            "exp_avg_sq_codes": second[0], "exp_avg_sq_scale": second[1]}  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("clocks", [False, True], ids=["shared", "each"])
@dtypes
def test_one_pass_is_to_widen_to_step_and_to_round(n, clocks, dtype):
    """Bit for bit with the kernels one by one; in torch but for its square root in the values."""
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    index = positions(2 * n, n, 0)
    found = {}
    for way in ("one pass", "kernels", "torch"):
        value, grad = fresh(n), fresh(n, seed=1) * torch.logspace(-6, 0, n)
        target, state = (
            torch.zeros(2 * n, dtype=dtype),
            codes_of(fresh(n, seed=2), fresh(n).square()),
        )
        step = torch.arange(n, dtype=torch.int32) % 3 if clocks else 3
        if way == "kernels":
            wide = expand(state, torch.float32)
            steps.adamw_(value, grad, wide["exp_avg"], wide["exp_avg_sq"], target, index, "w",
                         step=step, **options)  # fmt: skip
            state = codes_of(wide["exp_avg"], wide["exp_avg_sq"])
        else:
            with ops.force_torch() if way == "torch" else contextlib.nullcontext():
                steps.adamw_coded_(value, grad, state, target, index, "w", step=step, **options)
        found[way] = (value, target, state, step)
    value, target, state, step = found["one pass"]
    assert torch.equal(bits(target), bits(found["kernels"][1]))
    assert torch.equal(bits(value), bits(found["kernels"][0]))
    torch.testing.assert_close(value, found["torch"][0], rtol=1e-6, atol=1e-6)
    for other in ("kernels", "torch"):
        assert_same(state, found[other][2])
        assert not clocks or torch.equal(step, found[other][3])
    assert clocks is isinstance(step, torch.Tensor) and target.count_nonzero() == n


def test_the_state_is_the_same_in_torch_and_in_two_threads():
    found = []
    for threads, path in ((1, contextlib.nullcontext), (2, contextlib.nullcontext),
                          (1, ops.force_torch)):  # fmt: skip
        p = nn.Parameter(fresh(70_001).clone())
        optimizer = retouch.AdamW([p], state_bits=8, lr=0.01)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with path():
                for t in range(5):
                    p.grad = fresh(70_001, seed=t)
                    optimizer.step()
        finally:
            torch.set_num_threads(before)
        state = {k: x for k, x in optimizer.state[p].items() if k != "step"}
        assert state.keys() == codes_of(fresh(1), fresh(1)).keys()
        found.append((state, p.detach()))
    for state, value in found[1:]:
        assert_same(found[0][0], state)
        torch.testing.assert_close(value, found[0][1], rtol=1e-6, atol=1e-8)
    assert torch.equal(bits(found[0][1]), bits(found[1][1]))


def test_what_does_not_fit_is_refused():
    n = 300
    state, options = codes_of(fresh(n), fresh(n).square()), {"lr": 0.1, "beta1": 0.9, "beta2": 0.9,
                                                             "eps": 1e-8, "weight_decay": 0.0}  # fmt: skip
    with pytest.raises(LayoutError, match="clock of w"):
        steps.adamw_coded_(fresh(n), fresh(n), state, None, None, "w",
                           step=torch.zeros(2, dtype=torch.int32), **options)  # fmt: skip
    state["exp_avg_scale"] = torch.ones(1)
    with pytest.raises(ShapeError, match="exp_avg scale"):
        steps.adamw_coded_(fresh(n), fresh(n), state, None, None, "w", step=1, **options)


# --- training -----------------------------------------------------------------------------------


class Wide(nn.Module):
    """Two layers large enough for 8 bits, one that is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def wide(dtype=torch.float32):
    torch.manual_seed(0)
    return Wide().to(dtype)


def some(model, seed=0, density=0.7):
    chosen = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if name != "second.bias" and not name.startswith("_retouch"):
            index = positions(p.numel(), max(1, int(density * p.numel())), seed + i)
            chosen[name] = Selection("elements", tuple(p.shape), index)
    return Mask(chosen, model)


def loss_of(model, step):
    dtype = model.head.weight.dtype
    x = fresh(32, 64, seed=step)
    y = torch.stack([x[:, :20].sum(1), x[:, 20:40].prod(1).sign(), x[:, 5] * x[:, 6]], 1)
    return (model(x.to(dtype)).float() - y / 4).square().mean()


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_bytes(optimizer, value):
    return sum(x.numel() * x.element_size() for k, x in optimizer.state[value].items()
               if k != "step")  # fmt: skip


def test_two_bytes_for_each_coordinate():
    model = wide()
    optimizer = wrap(retouch.AdamW, some(model), model, state_bits=8)
    train(model, optimizer, range(2))
    for name, slot in get_engine(model).slots.items():
        n = slot.selection.count
        if n >= 4096:
            assert state_bytes(optimizer, slot.value) == 2 * n + 2 * 4 * -(-n // BLOCK), name
            assert optimizer.state[slot.value]["exp_avg_codes"].dtype == torch.uint8
        else:
            assert state_bytes(optimizer, slot.value) == 8 * n, name
    (binding,) = get_engine(model).bindings()
    whole = sum(slot.selection.count for slot in get_engine(model).slots.values())
    assert binding.state_bytes() < 0.3 * 8 * whole


@dtypes
def test_it_follows_the_trajectory_of_32_bits(dtype):
    runs = {}
    for state_bits in (32, 8):
        model = wide(dtype)
        optimizer = wrap(retouch.AdamW, some(model), model, lr=2e-3, state_bits=state_bits)
        before = snapshot(model)
        losses = train(model, optimizer, range(120))
        slots = get_engine(model).slots.values()
        runs[state_bits] = (losses, {s.name: s.value.detach() - s.base.float() for s in slots})
        assert_frozen(before, model, get_engine(model).mask)
    (exact, far), (coarse, other) = runs[32], runs[8]
    assert sum(coarse[-20:]) / 20 < 0.2 * sum(coarse[:5]) / 5
    assert sum(coarse[-20:]) == pytest.approx(sum(exact[-20:]), rel=0.01)
    for name, way in far.items():
        assert float((other[name] - way).norm() / way.norm()) < 0.06, name


def test_the_first_step_is_that_of_32_bits():
    """Steps are computed from moments before they are rounded."""
    models = [wide(), wide()]
    for model, state_bits in zip(models, (8, 32), strict=True):
        train(model, wrap(retouch.AdamW, some(model), model, state_bits=state_bits), range(1))
    assert_same(snapshot(models[0]), snapshot(models[1]))


def test_small_values_are_torchs():
    p, q = (nn.Parameter(fresh(4095).clone()) for _ in range(2))
    one = retouch.AdamW([p], state_bits=8)
    other = retouch.AdamW([q])
    for t in range(3):
        p.grad = fresh(4095, seed=t + 1)
        q.grad = p.grad.clone()
        one.step()
        other.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "gate", [gates.Cautious(), gates.TopK(0.3, policy="P2"), gates.Magma()], ids=lambda g: g.kind
)
def test_gates_and_clocks_work_on_codes(gate):
    p = nn.Parameter(fresh(5000).clone())
    optimizer = retouch.AdamW([p], state_bits=8, gate=gate, lr=0.01)
    before = p.detach().clone()
    for t in range(4):
        p.grad = fresh(5000, seed=t)
        optimizer.step()
    assert not torch.equal(before, p) and "exp_avg" not in optimizer.state[p]
    if gate.kind == "topk":
        assert optimizer.state[p]["step"].dtype == torch.int32
    if gate.kind == "magma":
        assert "gate_scale" in optimizer.state[p]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@dtypes
@pytest.mark.parametrize("policy", ["intersect", "keep", "reset"])
@pytest.mark.parametrize("rounding", ["master", "kahan", "stochastic"])
def test_it_resumes_bit_for_bit_across_a_change_of_the_mask(dtype, policy, rounding):
    def start():
        model = wide(dtype)
        options = {"lr": 1e-3, "state_bits": 8, "rounding": rounding}
        return model, wrap(retouch.AdamW, some(model), model, **options)

    model, optimizer = start()
    train(model, optimizer, range(2))
    get_engine(model).move(some(model, seed=9), state=policy)
    train(model, optimizer, range(2, 4))
    saved = through_a_file({"m": model.state_dict(), "o": optimizer.state_dict()})
    again, resumed = start()
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    for slot in get_engine(again).slots.values():
        if slot.selection.count >= 4096:
            assert resumed.state[slot.value]["exp_avg_codes"].dtype == torch.uint8
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(4, 6))
        get_engine(m).move(some(m), state=policy)
        train(m, o, range(6, 8))
    assert_same(snapshot(model), snapshot(again))
    retouch.verify_untouched(again)


def test_survivors_carry_their_moments_when_the_mask_moves():
    model = wide()
    optimizer = wrap(retouch.AdamW, some(model), model, lr=1e-3, state_bits=8)
    train(model, optimizer, range(5))
    engine = get_engine(model)
    (binding,) = engine.bindings()
    old = engine.slots["first.weight"]
    before, where = binding.state_of(old.value), old.selection.flat().tolist()
    held = {k: dict(zip(where, before[k].tolist(), strict=True)) for k in ("exp_avg", "exp_avg_sq")}
    engine.move(some(model, seed=5))
    slot = engine.slots["first.weight"]
    state = optimizer.state[slot.value]
    assert "exp_avg_codes" in state and state["step"].dtype == torch.int32
    after, ages = binding.state_of(slot.value), state["step"].tolist()
    scale = {"exp_avg": state["exp_avg_scale"].max(), "exp_avg_sq": state["exp_avg_sq_scale"].max()}
    for key in held:
        for i, f in enumerate(slot.selection.flat().tolist()):
            was, now = held[key].get(f, 0.0), float(after[key][i])
            assert abs(was - now) <= 0.008 * float(scale[key])
            assert ages[i] == (5 if f in held[key] else 0)


def test_an_optimizer_that_has_stepped_is_cut_down_to_the_mask():
    model = wide()
    optimizer = retouch.AdamW(model.parameters(), state_bits=8)
    train(model, optimizer, range(2))
    mask, before = some(model), snapshot(model)
    wrap(optimizer, mask, model)
    train(model, optimizer, range(2, 4))
    assert_frozen(before, model, mask)
    value = get_engine(model).slots["first.weight"].value
    assert optimizer.state[value]["exp_avg_codes"].numel() == value.numel()


def test_a_state_of_32_bits_goes_on_in_8_and_back():
    p = nn.Parameter(fresh(5000).clone())
    first = retouch.AdamW([p])
    for t in range(3):
        p.grad = fresh(5000, seed=t)
        first.step()
    small = retouch.AdamW([p], state_bits=8)
    small.load_state_dict(through_a_file(first.state_dict()))
    small.param_groups[0]["state_bits"] = 8  # a state dict brings its own options
    small.step()
    assert small.state[p]["exp_avg_codes"].dtype == torch.uint8 and int(small.state[p]["step"]) == 4
    large = retouch.AdamW([p])
    large.load_state_dict(through_a_file(small.state_dict()))
    large.param_groups[0]["state_bits"] = 32
    large.step()
    assert large.state[p]["exp_avg"].dtype == torch.float32
    assert not bits(large.state[p]["exp_avg"]).eq(0).all()


def test_torchs_class_does_not_take_codes_for_moments():
    p = nn.Parameter(fresh(5000).clone())
    ours = retouch.AdamW([p], state_bits=8)
    p.grad = fresh(5000, seed=1)
    ours.step()
    theirs = torch.optim.AdamW([p])
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(KeyError):
        theirs.step()


def test_what_is_refused():
    with pytest.raises(HyperparameterError, match="state_bits must be 8 or 32, got 4"):
        retouch.AdamW([nn.Parameter(torch.ones(2))], state_bits=4)
