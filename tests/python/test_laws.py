"""The laws that training keeps, for every optimizer, dtype and kind of mask.

1. Frozen is frozen: a coordinate outside of the mask keeps its bits.
4. All-ones is plain torch; a static mask is torch's optimizer on the selected weights.
5. Step zero is the identity.
6. Going to the base and back is exact.
7. Resume is exact (test_resume.py has the ways to save).
8. Accumulate in float32, round once.
"""

import contextlib
import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import (
    Lion,
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
    positions,
    snapshot,
    train,
)

import retouch
from retouch import ops
from retouch.masks import Mask, Selection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "AdamW-foreach": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "foreach": True}),
    "AdamW-fused": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "AMSGrad": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    "SGD": (
        torch.optim.SGD,
        {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2, "weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 0.1}),
    "Lion": (Lion, {"lr": 1e-3, "weight_decay": 0.1}),
}
FUSED = {
    "retouch.AdamW": (retouch.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "retouch.SGD": (
        retouch.SGD,
        {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
}
OTHERS = {  # no peer in torch over single elements
    "retouch.Adafactor": (retouch.Adafactor, {"lr": 1e-2, "weight_decay": 0.1}),
    "kahan": (retouch.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "rounding": "kahan"}),
}
MASKS = {"elements": element_mask, "mixed": mixed_mask}
names = pytest.mark.parametrize("name", [*OPTIMIZERS, *FUSED])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
masks = pytest.mark.parametrize("kind", MASKS)
gradients = pytest.mark.parametrize("gradient", ["sampled", "dense"])


def make(name):
    cls, options = (OPTIMIZERS | FUSED | OTHERS)[name]
    return lambda params: cls(params, **options)


# --- law 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OPTIMIZERS, *FUSED, *OTHERS])
@dtypes
@masks
@gradients
def test_frozen_is_frozen(name, dtype, kind, gradient):
    model = net(dtype)
    before, mask = snapshot(model), MASKS[kind](model)
    optimizer = retouch.wrap(make(name), mask, model, gradient=gradient)
    train(model, optimizer, range(10), clip=1.0, micro=2)
    assert_frozen(before, model, mask)
    assert retouch.verify_untouched(model).parameters == len(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@gradients
def test_frozen_is_frozen_in_a_transformer(dtype, gradient):
    model = llama(dtype)
    before, mask = snapshot(model), element_mask(model, 0.02)
    optimizer = retouch.wrap(
        torch.optim.AdamW, mask, model, lr=1e-2, weight_decay=0.1, gradient=gradient
    )
    train(model, optimizer, range(4), clip=1.0)
    assert_frozen(before, model, mask)


@dtypes
def test_frozen_is_frozen_in_an_average_of_the_weights(dtype):
    model = net(dtype)
    before, mask = snapshot(model), mixed_mask(model)
    optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=1e-2, weight_decay=0.1)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
    for step in range(5):
        train(model, optimizer, [step])
        average.update_parameters(model)
    assert_frozen(before, average.module, mask)


@st.composite
def selections(draw, shape):
    kinds = ["none", "elements", "rows", "all"] + (["columns"] if len(shape) > 1 else [])
    kind = draw(st.sampled_from(kinds))
    if kind in ("none", "all"):
        return Selection(kind, shape, None)
    numel = 1
    for n in shape:
        numel *= n
    limit = {"elements": numel, "rows": shape[0], "columns": shape[-1]}[kind]
    chosen = draw(st.sets(st.integers(0, limit - 1), min_size=1))
    return Selection(kind, shape, torch.tensor(sorted(chosen), dtype=torch.int32))


@st.composite
def runs(draw):
    """A small network, a mask of any shape on it, an optimizer and a way to train."""
    dtype = draw(st.sampled_from(DTYPES))
    width, out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, out)).to(dtype)
    chosen = {n: draw(selections(tuple(p.shape))) for n, p in model.named_parameters()}
    if not any(s.count for s in chosen.values()):
        chosen["0.weight"] = Selection("all", (width, 4), None)
    mask = Mask({n: s for n, s in chosen.items() if s.count}, model)
    name = draw(st.sampled_from([*OPTIMIZERS, *FUSED]))
    clip = draw(st.sampled_from([None, 0.01, 1.0]))
    gradient = draw(st.sampled_from(["sampled", "dense"]))
    return model, mask, name, clip, draw(st.integers(1, 3)), gradient


@given(runs())
def test_laws_hold_for_any_mask(run):
    model, mask, name, clip, micro, gradient = run
    x = torch.randn(5, 4).to(next(model.parameters()).dtype)
    before, output = snapshot(model), model(x)
    # Sums of sampled gradients are in another order, so they are compared in a test of their own.
    exact = name in OPTIMIZERS and gradient == "dense"
    reference = Reference(model, mask, make(name)) if exact else None
    optimizer = retouch.wrap(make(name), mask, model, gradient=gradient)
    assert torch.equal(bits(model(x)), bits(output))  # law 5
    for _ in range(3):
        for _ in range(micro):
            (model(x).float().square().sum() / micro).backward()
            if reference is not None:
                reference.backward(reference.model(x).float().square().sum() / micro)
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            if reference is not None:
                assert torch.equal(norm, nn.utils.clip_grad_norm_(reference.theta.values(), clip))
        optimizer.step()
        optimizer.zero_grad()
        if reference is not None:  # law 4
            reference.optimizer.step()
            reference.write()
            reference.optimizer.zero_grad()
            assert_same(snapshot(model), snapshot(reference.model))
    for n, now in snapshot(model).items():  # law 1
        kept = torch.ones(now.numel(), dtype=torch.bool)
        if n in mask:
            kept[mask[n].flat().long()] = False
        assert torch.equal(bits(now).reshape(-1)[kept], bits(before[n]).reshape(-1)[kept])
    retouch.verify_untouched(model)
    after = snapshot(model)
    with retouch.get_engine(model).base_weights():  # law 6
        assert_same(snapshot(model), before)
    assert_same(snapshot(model), after)
    retouch.unwrap(model)
    assert_same(snapshot(model), after)


# --- law 4 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_ones_is_plain_torch(name):
    plain, model = net(), net()
    one = make(name)(plain.parameters())
    other = retouch.wrap(make(name), Mask.full(model), model)
    norms = train(plain, one, range(10), clip=0.5, micro=2)
    assert train(model, other, range(10), clip=0.5, micro=2) == norms
    assert_same(snapshot(model), snapshot(plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
@dtypes
@masks
def test_a_static_mask_is_torch_on_the_selected(name, dtype, kind):
    model = net(dtype)
    mask = MASKS[kind](model)
    reference = Reference(model, mask, make(name))
    optimizer = retouch.wrap(make(name), mask, model, gradient="dense")
    for step in range(10):
        ours = train(model, optimizer, [step], clip=0.5, micro=2)
        assert ours == reference.train([step], clip=0.5, micro=2)
        assert_same(snapshot(model), snapshot(reference.model))


@pytest.mark.parametrize("name", FUSED)
@masks
def test_fused_optimizers_are_within_an_ulp_a_step(name, kind):
    steps = 10
    model = net()
    mask = MASKS[kind](model)
    reference = Reference(model, mask, make(name.split(".")[1]))
    optimizer = retouch.wrap(make(name), mask, model, gradient="dense")
    train(model, optimizer, range(steps), clip=0.5)
    reference.train(range(steps), clip=0.5)
    for n, want in snapshot(reference.model).items():
        got = snapshot(model)[n]
        # An ulp of the weight or of its step, whichever is larger, for each step.
        ulp = torch.finfo(torch.float32).eps * want.abs().clamp(min=0.1)
        assert ((got - want).abs() <= steps * ulp).all(), n


@dtypes
@masks
def test_sampled_gradients_train_as_dense_ones_do(dtype, kind):
    runs = {}
    for gradient in ("sampled", "dense"):
        model = net(dtype)
        optimizer = retouch.wrap(
            torch.optim.SGD, MASKS[kind](model), model, lr=1e-2, momentum=0.9, gradient=gradient
        )
        paths = {n: s.path.gradient for n, s in retouch.get_engine(model).slots.items()}
        assert (paths["up.weight"] == "sampled") == (gradient == "sampled")
        norms = train(model, optimizer, range(10), clip=0.5, micro=2)
        runs[gradient] = norms, [s.value for s in retouch.get_engine(model).slots.values()]
    # A product of bfloat16 matrices is rounded to it by torch, and not by the sampled kernel.
    rtol = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for a, b in zip(*(values for _, values in runs.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 100)
    torch.testing.assert_close(*(norms for norms, _ in runs.values()), rtol=rtol, atol=0)


@names
@masks
@gradients
def test_wrapping_an_instance_equals_wrapping_its_class(name, kind, gradient):
    one, other = net(), net()
    by_class = retouch.wrap(make(name), MASKS[kind](one), one, gradient=gradient)
    plain = make(name)(list(other.parameters()))
    by_instance = retouch.wrap(plain, MASKS[kind](other), other, gradient=gradient)
    assert by_instance is plain
    train(one, by_class, range(5), clip=0.5)
    train(other, by_instance, range(5), clip=0.5)
    assert_same(snapshot(one), snapshot(other))


# --- law 5 ---------------------------------------------------------------------------------------


@dtypes
@masks
@gradients
def test_step_zero_is_the_identity(dtype, kind, gradient):
    model = net(dtype)
    before, output = snapshot(model), model(batch(0))
    optimizer = retouch.wrap(torch.optim.AdamW, MASKS[kind](model), model, gradient=gradient)
    assert torch.equal(bits(model(batch(0))), bits(output))
    optimizer.step()  # without gradients
    assert_same(snapshot(model), before)


# --- law 6 ---------------------------------------------------------------------------------------


@dtypes
@masks
def test_to_the_base_and_back(dtype, kind):
    model = net(dtype)
    with torch.no_grad():  # numbers whose bits arithmetic would lose
        model.up.weight[0, :4] = torch.tensor([-0.0, float("inf"), 1e-40, float("nan")])
    mask = MASKS[kind](model)
    before = snapshot(model)
    optimizer = retouch.wrap(Lion, mask, model, lr=1e-2)
    for p in retouch.get_engine(model).slots.values():
        p.value.grad = torch.ones_like(p.value)
    optimizer.step()
    after = snapshot(model)
    assert any(not torch.equal(bits(after[n]), bits(before[n])) for n in after)
    with retouch.get_engine(model).base_weights():
        assert_same(snapshot(model), before)
    assert_same(snapshot(model), after)


# --- law 7 ---------------------------------------------------------------------------------------


@names
@dtypes
@gradients
def test_resume_is_exact(name, dtype, gradient):
    model = net(dtype)
    optimizer = retouch.wrap(make(name), mixed_mask(model), model, gradient=gradient)
    train(model, optimizer, range(3), clip=1.0)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6), clip=1.0)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(dtype, seed=1)
    again.load_state_dict(saved["model"])
    resumed = retouch.wrap(make(name), mixed_mask(again), again, gradient=gradient)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(3, 6), clip=1.0)
    assert_same(snapshot(again), snapshot(model))
    for a, b in zip(
        retouch.get_engine(again).slots.values(),
        retouch.get_engine(model).slots.values(),
        strict=True,
    ):
        assert torch.equal(a.value, b.value)


# --- law 8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_micro_batches_are_added_in_float32(dtype):
    model, plain = net(dtype), net(dtype)
    mask = element_mask(model)
    retouch.wrap(torch.optim.SGD, mask, model, lr=1e-3, gradient="dense")
    want = {name: 0.0 for name in mask}
    for i in range(16):
        loss_of(model, batch(i)).backward()
        loss_of(plain, batch(i)).backward()
        for name, p in plain.named_parameters():
            if name in mask:
                want[name] = want[name] + p.grad.reshape(-1)[mask[name].flat().long()].float()
        plain.zero_grad()
    for name, slot in retouch.get_engine(model).slots.items():
        assert slot.value.grad.dtype == torch.float32
        assert torch.equal(slot.value.grad, want[name])


def test_small_updates_are_not_lost_in_bfloat16():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = retouch.wrap(torch.optim.SGD, Mask.full(model), model, lr=1e-3)
    for _ in range(100):  # each is less than half an ulp of 1 in bfloat16
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(model.weight.item() - 0.9) < 0.004


@dtypes
@gradients
def test_weights_are_the_rounded_values(dtype, gradient):
    model = net(dtype)
    optimizer = retouch.wrap(
        torch.optim.AdamW, mixed_mask(model), model, lr=1e-2, gradient=gradient
    )
    train(model, optimizer, range(5))
    for slot in retouch.get_engine(model).slots.values():
        weight = slot.param.detach().reshape(-1)[slot.selection.flat().long()]
        assert torch.equal(bits(weight), bits(slot.value.detach().reshape(-1).to(dtype)))


@gradients
def test_accumulation_equals_the_large_batch(gradient):
    one, other = net(), net()
    a = retouch.wrap(torch.optim.AdamW, element_mask(one), one, lr=1e-3, gradient=gradient)
    b = retouch.wrap(torch.optim.AdamW, element_mask(other), other, lr=1e-3, gradient=gradient)
    for step in range(4):
        rows = batch(step, rows=16)
        loss_of(one, rows).backward()
        for part in rows.split(4):
            (loss_of(other, part) / 4).backward()
        for s, t in zip(
            retouch.get_engine(one).slots.values(),
            retouch.get_engine(other).slots.values(),
            strict=True,
        ):
            torch.testing.assert_close(s.value.grad, t.value.grad, rtol=1e-5, atol=1e-7)
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
    for x, y in zip(snapshot(one).values(), snapshot(other).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- law 3, and the path of other devices --------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", *FUSED])
@dtypes
@masks
def test_the_torch_path_gives_the_same_trajectory(name, dtype, kind):
    model = net(dtype)
    other = copy.deepcopy(model)
    for one, context in ((model, contextlib.nullcontext()), (other, ops.force_torch())):
        with context:
            optimizer = retouch.wrap(make(name), MASKS[kind](one), one, gradient="dense")
            train(one, optimizer, range(6), clip=0.5)
    if name == "AdamW":
        assert_same(snapshot(other), snapshot(model))
    for slot, twin in zip(
        retouch.get_engine(model).slots.values(),
        retouch.get_engine(other).slots.values(),
        strict=True,
    ):
        torch.testing.assert_close(slot.value, twin.value, rtol=1e-5, atol=1e-6)


def test_the_same_run_gives_the_same_bits_with_any_number_of_threads():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = nn.Linear(700, 300, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 210_000).view(300, 700))
        index = positions(210_000, 70_000, 0)
        mask = Mask({"weight": Selection("elements", (300, 700), index)}, model)
        optimizer = retouch.wrap(retouch.AdamW, mask, model, lr=1e-2, gradient="sampled")
        x = torch.linspace(-1, 2, 5 * 700).view(5, 700)
        for _ in range(3):
            # A gradient of the output that does not depend on torch's own sums.
            model(x).backward(torch.linspace(-1, 1, 5 * 300).view(5, 300))
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(model))
    assert_same(*results)
