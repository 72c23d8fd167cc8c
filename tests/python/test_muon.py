"""Muon: torch's own on whole matrices, on the submatrix of rows or columns, and after AdamW."""

import io

import pytest
import torch
from tiny_hf import llama as tiny_llama
from tiny_hf import same, trainer, weights
from torch import nn
from training import (
    Reference,
    assert_frozen,
    assert_same,
    batch,
    bits,
    element_mask,
    loss_of,
    net,
    own,
    positions,
    snapshot,
    train,
)

import retouch
from retouch import Muon, SelectConfig, get_engine, wrap
from retouch.errors import HyperparameterError
from retouch.masks import Mask, Selection
from retouch.optim.muon import orthogonal

OPTIONS = [
    {},
    {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    {"momentum": 0.8, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
]
options_of = pytest.mark.parametrize("options", OPTIONS, ids=["default", "rms", "other"])


def matrices(model, kind="all"):
    """Selections of the matrices alone, every second row or column of them."""
    chosen = {}
    for name, p in own(model):
        if p.dim() != 2:
            continue
        n = {"rows": p.shape[0], "columns": p.shape[1]}.get(kind)
        index = None if n is None else torch.arange(0, n, 2, dtype=torch.int32)
        chosen[name] = Selection(kind, tuple(p.shape), index)
    return Mask(chosen, model)


@pytest.mark.parametrize("kind", ["all", "rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@options_of
def test_it_is_that_of_torch_on_what_is_selected_bit_for_bit(kind, dtype, options) -> None:
    model = net(dtype)
    mask, before = matrices(model, kind), snapshot(model)
    reference = Reference(model, mask, lambda p: torch.optim.Muon(p, lr=0.02, **options))
    optimizer = wrap(Muon, mask, model, gradient="dense", lr=0.02, **options)
    train(model, optimizer, range(4))
    reference.train(range(4))
    assert_same(snapshot(model), snapshot(reference.model))
    assert_frozen(before, model, mask)


@options_of
def test_without_a_mask_it_is_that_of_torch(options) -> None:
    a, b = net(), net()
    chosen = [[p for _, p in own(m) if p.dim() == 2] for m in (a, b)]
    ours, theirs = Muon(chosen[0], lr=0.02, **options), torch.optim.Muon(chosen[1], 0.02, **options)
    for step in range(4):
        for model, optimizer in ((a, ours), (b, theirs)):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            model.zero_grad()
    assert_same(snapshot(a), snapshot(b))
    # and state dicts go both ways
    theirs.load_state_dict(ours.state_dict())
    fresh = Muon(chosen[0])
    fresh.load_state_dict(theirs.state_dict())
    for p, q in zip(*chosen, strict=True):
        assert torch.equal(fresh.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
    assert fresh.param_groups[0]["lr"] == 0.02 and fresh.param_groups[0]["use_muon"] is True


def test_golden_values() -> None:
    """The exact map of the singular values gives .9177 and .8781; the difference is bfloat16."""
    p = nn.Parameter(torch.eye(2))
    p.grad = torch.diag(torch.tensor([3.0, 4.0]))
    Muon([p], lr=0.1, weight_decay=0.1).step()
    wanted = torch.diag(torch.tensor([0.9205, 0.8806]))
    torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=1e-4)
    q = nn.Parameter(torch.zeros(1, 1))
    q.grad = torch.ones(1, 1)
    Muon([q], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert q.item() == pytest.approx(-0.01375, abs=2e-5)


def test_singular_values_come_near_1_and_the_input_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(24, 12, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    for matrix in ((u * torch.linspace(0.05, 1, 12)) @ v.T, torch.randn(8, 20).to(torch.bfloat16)):
        held = matrix.clone()
        made = orthogonal(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert torch.equal(held, matrix) and made.shape == matrix.shape
        sizes = torch.linalg.svdvals(made.float())
        assert 0.6 < sizes.min() and sizes.max() < 1.25
    assert not orthogonal(torch.zeros(3, 2), (3.4445, -4.7750, 2.0315), 5, 1e-7).any()


def test_what_is_no_matrix_is_stepped_by_adamw() -> None:
    a, b = net(), net()
    masks = []
    for model in (a, b):
        chosen = {n: Selection("all", tuple(p.shape)) for n, p in own(model)}
        chosen["up.bias"] = Selection("elements", (20,), positions(20, 7, 0))
        masks.append(Mask(chosen, model))
    ours = wrap(Muon, masks[0], a, lr=0.01, weight_decay=0.1)
    theirs = wrap(retouch.AdamW, masks[1], b, lr=0.01, weight_decay=0.1)
    before = snapshot(b)
    for model, optimizer in ((a, ours), (b, theirs)):
        for slot in get_engine(model).slots.values():
            slot.value.grad = torch.ones_like(slot.value)
        optimizer.step()
    now, other = snapshot(a), snapshot(b)
    for name, p in own(a):
        assert torch.equal(bits(now[name]), bits(other[name])) == (p.dim() != 2), name
        assert not torch.equal(now[name], before[name])
    assert int((now["up.bias"] != before["up.bias"]).sum()) == 7


def test_a_group_of_adamw() -> None:
    model = net()
    mask = element_mask(model)
    groups = [{"params": [p for _, p in own(model)], "use_muon": False}]
    optimizer = wrap(Muon(groups, lr=0.01), mask, model)
    other = net()
    adamw = wrap(retouch.AdamW, element_mask(other), other, lr=0.01, weight_decay=0.1)
    train(model, optimizer, range(3))
    train(other, adamw, range(3))
    assert_same(snapshot(model), snapshot(other))


def test_single_elements_are_refused_by_name() -> None:
    model = net()
    with pytest.raises(
        HyperparameterError, match=r"selected of embed\.weight: .*granularity='row'"
    ):
        wrap(Muon, element_mask(model), model, lr=0.01)
    assert not hasattr(model, "_retouch")
    # an instance, and a mask that comes later: before anything has moved
    optimizer = wrap(Muon(model.parameters(), lr=0.01), element_mask(model), model)
    before = snapshot(model)
    loss_of(model, batch(0)).backward()
    with pytest.raises(HyperparameterError, match=r"embed\.weight"):
        optimizer.step()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"momentum": 1.5}, "momentum must be in"),
        ({"ns_steps": 100}, "fewer than 100"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms'; wanted"),
        ({"adamw_steps": -1}, "adamw_steps must be at least 0"),
        ({"adamw_betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    with pytest.raises(HyperparameterError, match=message):
        Muon([nn.Parameter(torch.ones(2, 2))], **options)


# --- the switch from AdamW -------------------------------------------------------------------------------

SWITCH = {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "adamw_steps": 3}


def full(model):
    return Mask.full(model)


@pytest.mark.parametrize("kind", ["all", "rows", "columns"])
def test_the_switch(kind) -> None:
    """AdamW up to the switch, and then a Muon that starts from nothing; vectors go on with AdamW."""
    model, other = net(), net()
    masks = [
        matrices(m, kind) | Mask.from_indices({"up.bias": range(20)}, m) for m in (model, other)
    ]
    optimizer = wrap(Muon, masks[0], model, **SWITCH)
    adamw = wrap(retouch.AdamW, masks[1], other, lr=0.01, weight_decay=0.1)
    train(model, optimizer, range(3))
    train(other, adamw, range(3))
    assert_same(snapshot(model), snapshot(other))
    start = {n: s.value.detach().clone() for n, s in get_engine(model).slots.items()}

    loss_of(model, batch(4 * 16)).backward()
    loss_of(other, batch(4 * 16)).backward()
    grads = {n: s.value.grad.clone() for n, s in get_engine(model).slots.items()}
    optimizer.step()
    adamw.step()
    for name, slot in get_engine(model).slots.items():
        if name == "up.bias":
            assert torch.equal(slot.value, get_engine(other).slots[name].value)
            assert optimizer.state[slot.value]["step"] == 4
            continue
        fresh = nn.Parameter(start[name])
        fresh.grad = grads[name]
        torch.optim.Muon([fresh], lr=0.01, adjust_lr_fn="match_rms_adamw").step()
        assert torch.equal(bits(slot.value), bits(fresh)), name
        assert optimizer.state[slot.value].keys() == {"momentum_buffer"}


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_switches_at_the_same_step(stop, dtype) -> None:
    whole = net(dtype)
    optimizer = wrap(Muon, full(whole), whole, **SWITCH)
    train(whole, optimizer, range(stop))
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), file)
    train(whole, optimizer, range(stop, 6))
    file.seek(0)
    state, saved = torch.load(file, weights_only=True)
    again = net(dtype)
    resumed = wrap(Muon, full(again), again, lr=1.0)  # options come with the state
    again.load_state_dict(state)
    resumed.load_state_dict(saved)
    train(again, resumed, range(stop, 6))
    assert_same(snapshot(whole), snapshot(again))
    assert resumed.param_groups[0]["taken"] == 6


def test_the_trial_step_of_a_distributed_checkpoint_does_not_count() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    optimizer = wrap(Muon, full(model), model, **SWITCH)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["taken"] == 0
    other = net()
    plain = wrap(Muon, full(other), other, **SWITCH)
    train(model, optimizer, range(5))
    train(other, plain, range(5))
    assert_same(snapshot(model), snapshot(other))


# --- masks that move -------------------------------------------------------------------------------------


def test_momentum_goes_along_when_rows_change() -> None:
    model = nn.Linear(6, 4, bias=False)

    def rows(*which):
        chosen = Selection("rows", (4, 6), torch.tensor(which, dtype=torch.int32))
        return Mask({"weight": chosen}, model)

    optimizer = wrap(Muon, rows(0, 2), model, lr=0.01)
    grads = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    buffer = torch.zeros(4, 6)
    for grad, now, then in zip(
        grads, ([0, 2], [1, 2], [0, 1, 2]), ([1, 2], [0, 1, 2], []), strict=True
    ):
        model.weight.grad = grad.clone()
        before = model.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        buffer[now] = buffer[now].lerp(grad[now], 0.05)
        step = orthogonal(grad[now].lerp(buffer[now], 0.95), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        wanted = before.clone()
        wanted[now] = before[now] * (1 - 0.01 * 0.1) - 0.01 * step.float()
        torch.testing.assert_close(model.weight.detach(), wanted)
        frozen = [i for i in range(4) if i not in now]
        assert torch.equal(bits(model.weight)[frozen], bits(before)[frozen])
        if then:
            get_engine(model).move(rows(*then))
            gone = [i for i in range(4) if i not in then]
            buffer[gone] = 0


def test_a_schedule_of_rows() -> None:
    model = net()
    config = SelectConfig(
        direction="random", density=0.5, granularity="row", target_modules=None, norms="full",
        biases="full", convs="frozen", schedule=retouch.Schedule(every=2),
    )  # fmt: skip
    optimizer = wrap(Muon, config, model, **SWITCH)
    start = loss_of(model, batch(0)).item()
    train(model, optimizer, range(8))
    assert loss_of(model, batch(0)).item() < start
    retouch.verify_untouched(model)


# --- what stands around an optimizer ----------------------------------------------------------------------


def test_schedulers_and_tensor_rates() -> None:
    runs = []
    for lr in (0.02, torch.tensor(0.02)):
        model = net()
        optimizer = wrap(Muon, matrices(model), model, lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        train(model, optimizer, range(3), scheduler=scheduler)
        runs.append(snapshot(model))
    for name, a in runs[0].items():
        torch.testing.assert_close(a, runs[1][name])


def test_in_the_trainer_and_resumed(tmp_path) -> None:
    def start(out):
        run = trainer(tmp_path / out, max_steps=4, save_strategy="steps", save_steps=2)
        muon = (Muon, {"adamw_steps": 1, "adjust_lr_fn": "match_rms_adamw"})
        config = SelectConfig(score="magnitude", density=0.3, granularity="row", norms="full")
        return retouch.attach(run, config, optimizer=muon)

    run = start("a")
    run.train()
    inner = get_engine(run.model).bindings()[0].optimizer
    assert isinstance(inner, Muon) and inner.param_groups[0]["eps"] == 1e-7
    assert all(group["taken"] == 4 for group in inner.param_groups)
    again = start("b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(weights(run.model), weights(again.model))
    assert not same(weights(run.model), weights(tiny_llama()))
    retouch.verify_untouched(run.model)
