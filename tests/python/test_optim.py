"""The fused optimizers against torch's, as ordinary optimizers and over compact values."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import batch, element_mask, loss_of, mixed_mask, net, snapshot, train

import retouch
from retouch import ops
from retouch.errors import HyperparameterError, LayoutError

# Of PyTorch's AdamW: θ, then the weights after two steps (lr .1, weight decay .01).
START, GRADS = (1.0, -2.0, 0.5), [(0.3, -4.0, 0.0), (-0.1, 1.0, 0.2)]
GOLDEN = [(0.899, -1.898, 0.4995), (0.858079, -1.849155, 0.424587)]

PAIRS = {
    "AdamW": (retouch.AdamW, torch.optim.AdamW),
    "SGD": (retouch.SGD, torch.optim.SGD),
}


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def ulps(a, b):
    """Distance in representable float32 numbers."""
    a, b = (x.detach().contiguous().view(torch.int32).long() for x in (a, b))
    a, b = (torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (a, b))
    return (a - b).abs()


@pytest.mark.parametrize("native", [True, False], ids=["rust", "torch"])
def test_golden_values(native):
    p = nn.Parameter(torch.tensor(START))
    optimizer = retouch.AdamW([p], lr=0.1, weight_decay=0.01)
    for grad, want in zip(GRADS, GOLDEN, strict=True):
        p.grad = torch.tensor(grad)
        if native:
            optimizer.step()
        else:
            with ops.force_torch():
                optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor(want), rtol=0, atol=1e-6)


adamw_options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-4, 1e-2, 0.3]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.0)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "maximize": st.booleans(),
    }
)
sgd_options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    },
    optional={"dampening": st.sampled_from([0.0, 0.3]), "nesterov": st.booleans()},
)


@given(st.sampled_from(sorted(PAIRS)), st.data())
def test_each_step_is_within_an_ulp_of_torch(name, data):
    options = data.draw(adamw_options if name == "AdamW" else sgd_options)
    if options.get("nesterov") and (options["momentum"] == 0 or options.get("dampening")):
        options["nesterov"] = False
    ours, theirs = PAIRS[name]
    params = parameters((17,), (3, 5), (1,), (2, 3, 4))
    optimizer = ours(params, **options)
    for step in range(4):
        # Both take the step from the same state, so that each step is judged by itself.
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        reference = theirs(twins, **options, foreach=False)
        reference.load_state_dict(torch_state(reference, optimizer))
        set_grads(params, step)
        set_grads(twins, step)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        reference.step()
        for p, t, old in zip(params, twins, before, strict=True):
            # Torch's square root may err by an ulp, which grows to a few ulps of what is added; it
            # shows where that is about as large as the weight itself.
            decay = 1 - options["lr"] * options["weight_decay"] * (name == "AdamW")
            added = (t.detach() - decay * old).abs()
            unit = torch.finfo(torch.float32).eps * added
            assert ((ulps(p, t) <= 1) | ((p - t).abs() <= 4 * unit)).all()
            for key, item in reference.state[t].items():
                if item is not None and key != "step":
                    mine = optimizer.state[p][key]
                    scale = torch.finfo(torch.float32).eps * item.abs().max()
                    assert ((ulps(mine, item) <= 1) | ((mine - item).abs() <= scale)).all(), key


def torch_state(reference, optimizer):
    """Our state in a state dict of torch's class: keys and dtypes are the same."""
    packed, mine = reference.state_dict(), copy.deepcopy(optimizer.state_dict()["state"])
    return {"state": mine, "param_groups": packed["param_groups"]}


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_are_interchangeable_with_torch(name):
    options = {"lr": 0.1, "weight_decay": 0.1}
    if name == "SGD":
        options["momentum"] = 0.9
    for source, target in (PAIRS[name], PAIRS[name][::-1]):
        params = parameters((5,), (2, 3))
        a = source(params, **options)
        for step in range(2):
            set_grads(params, step)
            a.step()
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        b = target(twins, lr=7.0)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        set_grads(params, 2)
        set_grads(twins, 2)
        a.step()
        b.step()
        for p, t in zip(params, twins, strict=True):
            torch.testing.assert_close(p, t, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_float64(name):
    ours, theirs = PAIRS[name]
    a, b = parameters((9,), dtype=torch.float64), parameters((9,), dtype=torch.float64)
    one, other = ours(a, lr=0.1), theirs(b, lr=0.1)
    for step in range(3):
        set_grads(a, step)
        set_grads(b, step)
        one.step()
        other.step()
    assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("name", PAIRS)
def test_options_are_read_at_each_step_and_lr_may_be_a_tensor(name):
    ours, theirs = PAIRS[name]
    a, b = parameters((9,), (4,)), parameters((9,), (4,))
    groups = lambda p: [{"params": p[:1]}, {"params": p[1:], "lr": 0.5}]  # noqa: E731
    one = ours(groups(a), lr=torch.tensor(0.1))
    other = theirs(groups(b), lr=torch.tensor(0.1), foreach=False)
    for optimizer, params in ((one, a), (other, b)):
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(0.01)
                group["weight_decay"] = 0.3
    for p, t in zip(a, b, strict=True):
        torch.testing.assert_close(p, t, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_what_has_no_gradient_stays(name):
    p, q = parameters((3,), (3,))
    optimizer = PAIRS[name][0]([p, q], lr=0.1, weight_decay=0.5)
    q.grad = torch.ones(3)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and p not in optimizer.state
    assert not torch.equal(q, torch.ones(3))


@pytest.mark.parametrize("name", PAIRS)
def test_strided_gradients_and_parameters(name):
    ours, theirs = PAIRS[name]
    grad = torch.arange(24.0).view(4, 6)[:, ::2]
    for grads in (grad, torch.ones(1, 3).expand(4, 3)):
        a, b = nn.Parameter(torch.ones(3, 4).t()), nn.Parameter(torch.ones(3, 4).t())
        a.grad, b.grad = grads, grads
        ours([a], lr=0.1).step()
        theirs([b], lr=0.1).step()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PAIRS)
def test_closures_return_the_loss_and_schedulers_and_hooks_work(name):
    model = nn.Linear(3, 2)
    optimizer = PAIRS[name][0](model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    torch.optim.AdamW(nn.Linear(1, 1).parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    scheduler.step()
    assert losses == sorted(losses, reverse=True) and len(calls) == 3
    assert scheduler.get_last_lr() == [0.005]


def test_writes_are_seen_by_autograd():
    model = net()
    optimizer = retouch.wrap(retouch.AdamW, element_mask(model), model, lr=0.1)
    loss_of(model, batch(0)).backward()
    stale = loss_of(model, batch(1))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_writes_weights_of_every_kind_of_selection(name):
    model = net(torch.bfloat16)
    optimizer = retouch.wrap(PAIRS[name][0], mixed_mask(model), model, lr=0.1)
    before = snapshot(model)
    train(model, optimizer, range(2))
    for n, slot in retouch.get_engine(model).slots.items():
        flat = slot.selection.flat().long()
        now = slot.param.detach().reshape(-1)[flat]
        assert torch.equal(now, slot.value.detach().reshape(-1).to(torch.bfloat16)), n
        assert not slot.is_stale(), n  # the engine knows that it was its own optimizer
        assert not torch.equal(now, before[n].reshape(-1)[flat]), n


def test_the_amp_contract():
    assert not getattr(retouch.AdamW(parameters((1,))), "_step_supports_amp_scaling", False)


def test_what_is_refused():
    params = parameters((2,))
    for cls, options in [
        (retouch.AdamW, {"lr": -1.0}),
        (retouch.AdamW, {"lr": float("nan")}),
        (retouch.AdamW, {"betas": (1.0, 0.9)}),
        (retouch.AdamW, {"betas": (0.9, -0.1)}),
        (retouch.AdamW, {"betas": (0.9,)}),
        (retouch.AdamW, {"eps": -1e-8}),
        (retouch.AdamW, {"weight_decay": -0.1}),
        (retouch.SGD, {"lr": -1.0}),
        (retouch.SGD, {"momentum": -0.5}),
        (retouch.SGD, {"weight_decay": -0.1}),
        (retouch.SGD, {"nesterov": True}),
        (retouch.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ]:
        with pytest.raises(HyperparameterError):
            cls(params, **options)
    for option in ("capturable", "differentiable", "amsgrad", "foreach", "fused"):
        with pytest.raises(TypeError, match=option):
            retouch.AdamW(params, **{option: True})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_16_bit_parameters_are_refused_by_name(name, dtype):
    p = parameters((2,))[0]
    q = nn.Parameter(torch.ones(3, dtype=dtype))
    q.grad = torch.ones_like(q)
    optimizer = PAIRS[name][0]([p, q], lr=0.1)
    with pytest.raises(LayoutError, match=r"parameter 1 of group 0 is .*retouch.wrap"):
        optimizer.step()


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = retouch.AdamW(model.parameters())
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(LayoutError, match="gradient of parameter 0 of group 0"):
        optimizer.step()


def test_amsgrad_state_is_refused():
    params = parameters((2,))
    theirs = torch.optim.AdamW(params, amsgrad=True)
    set_grads(params, 0)
    theirs.step()
    ours = retouch.AdamW(params)
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(HyperparameterError, match="amsgrad"):
        ours.step()


@pytest.mark.parametrize("native", [True, False], ids=["rust", "torch"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lion_is_its_formula(native, maximize, dtype):
    a, b = parameters((17,), (3, 5), dtype=dtype), parameters((17,), (3, 5), dtype=dtype)
    momenta = [torch.zeros_like(p) for p in b]
    optimizer = retouch.Lion(a, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, maximize=maximize)
    for step in range(4):
        set_grads(a, step)
        a[0].grad[3] = 0
        if native:
            optimizer.step()
        else:
            with ops.force_torch():
                optimizer.step()
        with torch.no_grad():
            for p, m, q in zip(b, momenta, a, strict=True):
                g = -q.grad if maximize else q.grad
                p.mul_(1 - 0.01 * 0.1)
                p.add_(m.clone().mul_(0.9).add(g, alpha=1 - 0.9).sign_(), alpha=-0.01)
                m.mul_(0.99).add_(g, alpha=1 - 0.99)
    for p, q, m in zip(a, b, momenta, strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["exp_avg"], m)


OURS = {"AdamW": retouch.AdamW, "SGD": retouch.SGD, "Lion": retouch.Lion}


@pytest.mark.parametrize("name", OURS)
def test_multipliers_hold_whatever_a_scheduler_writes(name):
    a, b = parameters((9,)), parameters((9,))
    one = OURS[name]([{"params": a, "lr_mult": 0.25, "wd_mult": 4.0}], lr=0.1, weight_decay=0.05)
    other = OURS[name](b, lr=0.025, weight_decay=0.2)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (one, other)]
    for step in range(3):
        set_grads(a, step)
        set_grads(b, step)
        one.step()
        other.step()
        for scheduler in schedulers:
            scheduler.step()
    assert one.param_groups[0]["lr"] == 0.0125 and torch.equal(a[0], b[0])
    with pytest.raises(HyperparameterError, match="lr_mult"):
        OURS[name]([{"params": a, "lr_mult": -1.0}])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", [element_mask, mixed_mask])
def test_decay_to_the_base(name, kind):
    """With zero gradients the distance to the base shrinks by 1 - lr * weight_decay a step."""
    model = net()
    options = {"lr": 0.1, "weight_decay": 0.5, "decay": "base"}
    optimizer = retouch.wrap(OURS[name], kind(model), model, **options)
    slots = list(retouch.get_engine(model).slots.values())
    for slot in slots:
        with torch.no_grad():
            slot.value.add_(1.0)
        slot.write()
        slot.value.grad = torch.zeros_like(slot.value)
    optimizer.step()
    for slot in slots:
        far = slot.value.detach() - slot.base
        torch.testing.assert_close(far, torch.full_like(far, 0.95), rtol=0, atol=1e-5)
        assert torch.equal(slot.selection.take(slot.param), slot.value.detach())
    p = parameters((2,))
    plain = OURS[name](p, **options)
    set_grads(p, 0)
    with pytest.raises(HyperparameterError, match="parameter 0 of group 0 has no base"):
        plain.step()
    with pytest.raises(HyperparameterError, match="decay must be"):
        OURS[name](p, decay="none")
