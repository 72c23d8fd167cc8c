"""Adafactor over selected entries: torch's on whole tensors, rows and columns; means that a mask keeps."""

import contextlib
import io
import math

import pytest
import torch
import transformers.optimization
from torch import nn
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
    positions,
    snapshot,
    train,
)

import retouch
from retouch import _core, ops
from retouch.engine import get_engine, wrap
from retouch.errors import HyperparameterError
from retouch.masks import Mask, Selection

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fresh(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class One(nn.Module):
    """A weight of any shape, whose gradient is set by hand."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def masked(weight, kind, index=None, **options):
    model = One(weight)
    index = None if index is None else torch.as_tensor(index, dtype=torch.int32)
    mask = Mask({"weight": Selection(kind, tuple(weight.shape), index)}, model)
    return model, wrap(retouch.Adafactor, mask, model, **options)


def step(model, optimizer, grad):
    model.weight.grad = grad.to(model.weight.dtype).clone()
    optimizer.step()
    optimizer.zero_grad()


def test_golden_values():
    """By hand: R = (2.5, 12.5), C = (5, 10), V = R Cᵀ / 7.5."""
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = retouch.Adafactor([p], lr=1e-2)
    p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizer.step()
    want = torch.tensor([[0.992254, 0.989046], [0.989608, 0.990202]])
    torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-6)
    state = optimizer.state[p]
    torch.testing.assert_close(state["row_var"].flatten(), torch.tensor([2.5, 12.5]))
    torch.testing.assert_close(state["col_var"].flatten(), torch.tensor([5.0, 10.0]))


OPTIONS = [
    {},
    {"lr": 0.3, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.02, "d": 1.5, "beta2_decay": -0.5, "eps": (1e-4, 1e-2)},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whole_tensors_are_torch_bit_for_bit(options, dtype):
    shapes = [(7,), (6, 5), (3, 4, 2, 3), (4, 1), ()]
    ours = [nn.Parameter(fresh(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one, other = retouch.Adafactor(ours, **options), torch.optim.Adafactor(theirs, **options)
    for t in range(6):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = fresh(*a.shape, seed=10 * t + i, dtype=dtype)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a), bits(b))
        for key, item in other.state[b].items():
            assert torch.equal(one.state[a][key], item), key


@pytest.mark.parametrize("kind", ["all", "rows", "columns", "elements"])
@pytest.mark.parametrize("shape", [(8, 6), (5, 4, 3, 2), (9,)])
def test_wrapped_it_is_torch_on_the_selected_slice(kind, shape):
    """Also for elements where they are all of them: the all-ones mask is plain torch."""
    if kind == "columns" and len(shape) < 2:
        kind = "rows"
    weight = fresh(*shape)
    index = {"rows": [1, 2, 4], "columns": [0, 3]}.get(kind)
    if kind == "elements":
        index = torch.arange(weight.numel())
    model, optimizer = masked(weight, kind, index, lr=0.1)
    dim = {"rows": 0, "columns": 1}.get(kind)

    def part(x):
        return x if dim is None else x.index_select(dim, torch.tensor(index))

    twin = nn.Parameter(part(weight).clone())
    theirs = torch.optim.Adafactor([twin], lr=0.1)
    for t in range(5):
        grad = fresh(*shape, seed=t + 1)
        step(model, optimizer, grad)
        twin.grad = part(grad).clone()
        theirs.step()
    assert torch.equal(part(model.weight.detach()), twin.detach())


def test_it_is_that_of_transformers_where_the_step_is_the_rate():
    """What `TrainingArguments(optim="adafactor")` runs; that adds 1e-30 where torch has a floor."""
    options = {"scale_parameter": False, "relative_step": False}
    ours = [nn.Parameter(fresh(6, 5)), nn.Parameter(fresh(4))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one = retouch.Adafactor(ours, lr=1e-3, **options)
    other = transformers.optimization.Adafactor(theirs, lr=1e-3, **options)
    for t in range(5):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = fresh(*a.shape, seed=10 * t + i)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.1])
def test_a_mask_does_not_inflate_the_step(density):
    """Zeroed gradients would: by 1 / sqrt(density), 3.14 at a tenth."""
    n, k = 200, int(density * 200 * 200)
    index = positions(n * n, k, 3)
    weight = fresh(n, n)
    model, optimizer = masked(weight, "elements", index, lr=1e-2, d=100.0, scale_parameter=False)
    zeroed = nn.Parameter(weight.clone())
    stock = torch.optim.Adafactor([zeroed], lr=1e-2, d=100.0, eps=(None, 1.0))
    before = weight.flatten()[index.long()]
    for t in range(3):
        grad = fresh(n, n, seed=t + 1)
        step(model, optimizer, grad)
        zeroed.grad = torch.zeros_like(weight)
        zeroed.grad.view(-1)[index.long()] = grad.flatten()[index.long()]
        stock.step()
    far = (model.weight.detach().flatten()[index.long()] - before).square().mean().sqrt()
    dense, twin = masked(weight, "all", lr=1e-2, d=100.0, scale_parameter=False)
    for t in range(3):
        step(dense, twin, fresh(n, n, seed=t + 1))
    want = (dense.weight.detach() - weight).square().mean().sqrt()
    assert float(far / want) == pytest.approx(1.0, abs=0.06)
    if density == 0.1:
        leaky = (zeroed.detach().flatten()[index.long()] - before).square().mean().sqrt()
        assert float(leaky / want) > 2.5


def test_elements_against_the_definition_written_out():
    """Loops over rows and columns, in float64."""
    m, n, lr, wd = 7, 5, 0.05, 0.1
    index = torch.tensor([0, 1, 3, 5, 6, 7, 9, 11, 12, 14, 20, 22, 23, 24, 25, 26, 28, 30, 31, 34])
    weight = fresh(m, n)
    model, optimizer = masked(weight, "elements", index, lr=lr, weight_decay=wd)
    x, mask = weight.double(), torch.zeros(m * n, dtype=torch.bool)
    mask[index] = True
    mask = mask.view(m, n)
    rows, columns = [0.0] * m, [0.0] * n
    for t in range(1, 5):
        grad = fresh(m, n, seed=t)
        step(model, optimizer, grad)
        g, b = grad.double(), t**-0.8
        for i in range(m):
            mine = g[i][mask[i]]
            rows[i] += b * (float(mine.square().mean()) - rows[i]) if len(mine) else 0.0
        for j in range(n):
            mine = g[:, j][mask[:, j]]
            columns[j] += b * (float(mine.square().mean()) - columns[j]) if len(mine) else 0.0
        # Columns that add up given the rows, then rows that add up given these columns.
        across = [columns[j] * int(mask[:, j].sum()) / sum(rows[i] for i in range(m) if mask[i, j])
                  for j in range(n)]  # fmt: skip
        update = torch.zeros(m, n, dtype=torch.float64)
        for i, j in mask.nonzero().tolist():
            down = rows[i] * int(mask[i].sum()) / sum(across[k] for k in range(n) if mask[i, k])
            update[i, j] = g[i, j] / (down * across[j]) ** 0.5
        clip = max(1.0, float(update[mask].square().mean().sqrt()))
        alpha = max(1e-3, float(x[mask].square().mean().sqrt())) * min(lr, t**-0.5)
        x = torch.where(mask, x * (1 - lr * wd) - alpha * update / clip, x)
    torch.testing.assert_close(model.weight.detach(), x.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(bits(model.weight[~mask]), bits(weight[~mask]))
    state = optimizer.state[get_engine(model).slots["weight"].value]
    assert state["row_var"].shape == (m, 1) and state["col_var"].shape == (1, n)


def test_state_is_never_larger_than_the_selection():
    weight = fresh(40, 30)
    for k in (1, 70, 71, 600):
        model, optimizer = masked(weight, "elements", positions(1200, k, 0))
        step(model, optimizer, fresh(40, 30, seed=1))
        state = optimizer.state[get_engine(model).slots["weight"].value]
        have = sum(state[key].numel() for key in state if key != "step")
        assert have == min(k, 70), k


def test_batches_of_matrices_are_factored_each_by_itself():
    weight, grad = fresh(3, 6, 5), fresh(3, 6, 5, seed=1)
    index = positions(30, 24, 0)
    whole = torch.cat([index + 30 * b for b in range(3)])
    model, optimizer = masked(weight, "elements", whole, scale_parameter=False, d=1e6)
    step(model, optimizer, grad)
    for b in range(3):
        one, alone = masked(weight[b], "elements", index, scale_parameter=False, d=1e6)
        step(one, alone, grad[b])
        torch.testing.assert_close(model.weight[b], one.weight, rtol=1e-6, atol=1e-7)


@dtypes
@pytest.mark.parametrize("kind", [element_mask, mixed_mask])
def test_the_rest_is_frozen(dtype, kind):
    model = net(dtype)
    mask = kind(model)
    optimizer = wrap(retouch.Adafactor, mask, model, lr=0.1, weight_decay=0.3)
    before = snapshot(model)
    train(model, optimizer, range(3))
    assert_frozen(before, model, mask)
    retouch.verify_untouched(model)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def other_mask(model, first):
    """Over the parameters of `first`, with other coordinates and kinds."""
    chosen = {}
    for i, (name, p) in enumerate(own(model)):
        shape = tuple(p.shape)
        if name not in first:
            continue
        if i % 2:
            index = positions(p.numel(), max(1, p.numel() // 2), 50 + i)
            chosen[name] = Selection("elements", shape, index)
        else:
            chosen[name] = Selection("rows", shape, positions(shape[0], shape[0] // 2, 60 + i))
    return Mask(chosen, model)


@dtypes
@pytest.mark.parametrize("policy", ["intersect", "keep", "reset"])
def test_it_resumes_bit_for_bit_across_a_change_of_the_mask(dtype, policy):
    def start():
        model = net(dtype)
        first = mixed_mask(model)
        optimizer = wrap(retouch.Adafactor, first, model, lr=0.05)
        return model, first, other_mask(model, first), optimizer

    model, first, second, optimizer = start()
    train(model, optimizer, range(2))
    get_engine(model).move(second, state=policy)
    train(model, optimizer, range(2, 4))
    saved = through_a_file({"m": model.state_dict(), "o": optimizer.state_dict()})
    again, *_, resumed = start()
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(4, 6))
        get_engine(m).move(Mask(dict(first.items()), m), state=policy)
        train(m, o, range(6, 8))
    assert_same(snapshot(model), snapshot(again))
    retouch.verify_untouched(again)


@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_survivors_keep_their_second_moments_when_the_mask_moves(kind):
    """A row with large gradients leaves; what stays must not feel that."""
    m, n = 6, 8
    rows = lambda *which: torch.tensor(which, dtype=torch.int32)  # noqa: E731
    selection = lambda *which: Selection("rows", (m, n), rows(*which))  # noqa: E731
    if kind == "elements":
        gap = Selection("elements", (m, n), torch.tensor([3], dtype=torch.int32))
        plain = selection
        selection = lambda *w: Selection("elements", (m, n), plain(*w).flat()) - gap  # noqa: E731
    model = One(fresh(m, n))
    old = selection(0, 1, 2, 3)
    optimizer = wrap(retouch.Adafactor, Mask({"weight": old}, model), model)
    size = torch.tensor([1.0, 100.0, 2.0, 3.0, 5.0, 5.0])[:, None]
    across = torch.linspace(1, 2, n)
    for t in range(1, 4):
        step(model, optimizer, size * across * fresh(m, n, seed=t).sign())
    engine = get_engine(model)
    (binding,) = engine.bindings()
    close = 1e-5 if kind == "rows" else 0.12  # with a gap factors are no exact fit
    before = binding.state_of(engine.slots["weight"].value)["variance"]
    new = selection(0, 2, 3, 4)
    engine.move(Mask({"weight": new}, model))
    value = engine.slots["weight"].value
    now = binding.state_of(value)
    square = (size * across).square()
    torch.testing.assert_close(before.view(-1), old.gather(square).view(-1), rtol=close, atol=0)
    known = [i for i, f in enumerate(new.flat().tolist()) if f // n != 4]
    torch.testing.assert_close(
        now["variance"].flatten()[known], new.gather(square).flatten()[known], rtol=close, atol=0
    )
    # The newcomer's row has a clock of its own: its first second moment is its first square.
    state = optimizer.state[value]
    assert state["row_step"].max() == 3 and state["row_step"].min() == 0
    step(model, optimizer, size * across)
    later = binding.state_of(value)["variance"]
    torch.testing.assert_close(later.view(-1), new.gather(square).view(-1), rtol=close, atol=0)


def test_a_mask_may_move_between_factors_and_none():
    model = One(fresh(20, 10))
    many = Selection("elements", (20, 10), positions(200, 120, 0))
    few = Selection("elements", (20, 10), many.index[:20].clone())
    optimizer = wrap(retouch.Adafactor, Mask({"weight": many}, model), model)
    engine = get_engine(model)
    for t, (selection, key) in enumerate([(many, "row_var"), (few, "variance"), (many, "row_var")]):
        engine.move(Mask({"weight": selection}, model))
        for i in range(2):
            step(model, optimizer, fresh(20, 10, seed=5 * t + i))
        state = optimizer.state[engine.slots["weight"].value]
        assert key in state
    assert state["step"] == 6 and state["row_step"].max() == 6 and state["row_step"].min() == 2


def test_an_optimizer_that_has_stepped_is_cut_down_to_the_mask():
    model = net()
    optimizer = retouch.Adafactor(model.parameters(), lr=0.01)
    train(model, optimizer, range(2))
    mask = mixed_mask(model)
    before = snapshot(model)
    wrap(optimizer, mask, model)
    train(model, optimizer, range(2, 4))
    assert_frozen(before, model, mask)


def test_decay_to_the_base_and_multipliers():
    weight = fresh(6, 5)
    model, optimizer = masked(weight, "elements", range(0, 30, 2), lr=0.1, weight_decay=0.5,
                              decay="base")  # fmt: skip
    slot = get_engine(model).slots["weight"]
    with torch.no_grad():
        slot.value.add_(1.0)
    slot.write()
    step(model, optimizer, torch.zeros(6, 5))
    torch.testing.assert_close(slot.value.detach() - slot.base, torch.full((15,), 0.95))
    a, b = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    one = retouch.Adafactor([{"params": [a], "lr_mult": 0.25}], lr=0.04)
    other = retouch.Adafactor([b], lr=0.01)
    for p, optimizer in ((a, one), (b, other)):
        p.grad = fresh(6, 5, seed=1)
        optimizer.step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["all", "elements"])
def test_the_number_of_threads_changes_nothing(kind):
    weight, grad = fresh(700, 900), fresh(700, 900, seed=1)
    index = positions(weight.numel(), 400_000, 0) if kind == "elements" else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model, optimizer = masked(weight, kind, index)
            for _ in range(2):
                step(model, optimizer, grad)
            found.append(model.weight.detach())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@dtypes
@pytest.mark.parametrize("shape", [(40, 30), (2, 30, 40), (3, 2, 16, 17), (300, 2000)], ids=str)
def test_rust_and_torch_give_the_same_bits(shape, dtype, monkeypatch):
    """Steps, factors and what a move of the mask makes of them, where lines have gaps or nothing."""
    numel, width = math.prod(shape), shape[-1]
    used = []
    for name in ("line_means_", "line_estimate_"):
        plain = getattr(_core, name)
        monkeypatch.setattr(
            _core, name, lambda *a, plain=plain, name=name: (used.append(name), plain(*a))
        )

    def chosen(density, seed):
        index = positions(numel, int(density * numel), seed)
        return index[(index % width != 3) & (index // width != 5)]  # a column and a row of none

    found = []
    for path in (contextlib.nullcontext, ops.force_torch):
        with path():
            weight = fresh(*shape, dtype=torch.float32).to(dtype)
            model, optimizer = masked(weight, "elements", chosen(0.4, 1), lr=0.1, weight_decay=0.01)
            for t in range(6):
                if t == 3:
                    where = Selection("elements", shape, chosen(0.3, 2))
                    get_engine(model).move(Mask({"weight": where}, model))
                scale = torch.logspace(-4, 2, width)
                step(model, optimizer, fresh(*shape, seed=t) * scale * (t != 1))
        (state,) = optimizer.state.values()
        assert state["row_var"].shape == (*shape[:-1], 1)
        found.append({**state, "weight": model.weight.detach()})
        assert {"line_means_", "line_estimate_"} == set(used)
        used[:] = ["line_means_", "line_estimate_"] if len(found) == 1 else used
    assert len(used) == 2  # torch alone used none of them
    assert_same(*found)


def test_a_gradient_that_is_not_a_number_is_alike_on_both_paths():
    found = []
    for path in (contextlib.nullcontext, ops.force_torch):
        with path():
            model, optimizer = masked(fresh(30, 40), "elements", range(0, 1200, 2))
            grad = fresh(30, 40, seed=1)
            grad[4, 6] = float("nan")
            step(model, optimizer, grad)
        found.append(model.weight.detach().isnan())
    assert torch.equal(*found) and found[0].any()


def test_what_is_refused():
    p = [nn.Parameter(torch.ones(2))]
    for options in ({"lr": -1.0}, {"d": 0.5}, {"eps": (-1.0, 1e-3)}, {"eps": (1e-3,)},
                    {"beta2_decay": 0.8}, {"weight_decay": -0.1}):  # fmt: skip
        with pytest.raises(HyperparameterError):
            retouch.Adafactor(p, **options)


def test_it_learns():
    model = net()
    optimizer = wrap(retouch.Adafactor, element_mask(model, 0.5), model, lr=0.05)
    first = loss_of(model, batch(0)).item()
    for _ in range(40):
        loss_of(model, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model, batch(0)).item() < 0.3 * first
