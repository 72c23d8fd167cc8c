"""What code that uses torch's optimizers relies on, item by item.

For the optimizers of this package, bare and wrapped, and for wrapped ones of torch. What other files
check is not repeated here:

* weights, closures and line searches: test_engine_optimizers.test_closures_see_the_weights_that_are_tried;
* tied weights once: test_engine.test_tied_weights_have_one_slot_and_the_sum_of_their_gradients;
* meta and integer parameters: test_engine.test_meta_and_integer_parameters;
* all dtypes, a static mask and a full one against torch: test_laws;
* a state dict through a file, `weights_only`, in float32 and bfloat16, with large positions: test_resume,
  test_laws.test_resume_is_exact, test_muon;
* Accelerate's prepare: test_accelerate;
* DCP, and its first step, which is none: test_resume.test_dcp and test_the_first_step_of_dcp_is_no_step;
* the Trainer stopped and resumed: test_trainer_checkpoints, test_trainer_moving;
* draws that need no state, since they depend on seed, name and step: test_optim_gates;
* weights that are replaced in the model: test_engine_models.test_assigned_weights_are_noticed.
"""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from training import assert_frozen, assert_same, batch, bits, loss_of, net, own, snapshot, train

import retouch
from retouch.engine import get_engine, wrap
from retouch.errors import EngineError, LayoutError
from retouch.masks import Mask, Selection

OURS = {
    "retouch.AdamW": (retouch.AdamW, {"weight_decay": 0.1}),
    "retouch.SGD": (retouch.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "retouch.Lion": (retouch.Lion, {"weight_decay": 0.1}),
    "retouch.Muon": (retouch.Muon, {"weight_decay": 0.1}),
}
TORCH = {
    "torch.AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "torch.AdamW-fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "torch.SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "torch.Adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1}),
}
WRAPPED = [f"wrapped {name}" for name in OURS | TORCH]
BARE = [f"bare {name}" for name in OURS]
every = pytest.mark.parametrize("way", WRAPPED + BARE)
wrapped_ones = pytest.mark.parametrize("way", WRAPPED)


def rows(model: nn.Module, every_nth: int = 2) -> Mask:
    """Rows of all parameters: what every one of these optimizers can step."""
    return Mask(
        {
            name: Selection(
                "rows", tuple(p.shape), torch.arange(0, p.shape[0], every_nth, dtype=torch.int32)
            )
            for name, p in own(model)
        },
        model,
    )


def build(way: str, model: nn.Module, lr=0.01, groups=None, mask=None, **options):
    """The optimizer of a way to use one, over a model or over groups of its parameters."""
    how, name = way.split(" ")
    cls, own_options = (OURS | TORCH)[name]
    optimizer = cls(model.parameters() if groups is None else groups, lr, **own_options | options)
    if how == "wrapped":
        wrap(optimizer, rows(model) if mask is None else mask, model)
    return optimizer


def check_frozen(way: str, before, model: nn.Module) -> None:
    if way.startswith("wrapped"):
        assert_frozen(before, model, rows(model))
        retouch.verify_untouched(model)


@every
def test_it_is_an_optimizer_whose_step_is_a_function(way) -> None:
    optimizer = build(way, net())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert inspect.isfunction(type(optimizer).step) and inspect.isfunction(optimizer.step.__func__)
    optimizer.step = optimizer.step  # schedulers and Accelerate set it on the instance
    assert optimizer.defaults["lr"] == 0.01 and "lr=0.01" not in type(optimizer).__name__


@every
def test_a_closure_runs_with_gradients_and_its_loss_comes_back(way) -> None:
    model = net()
    optimizer = build(way, model)
    before, enabled = snapshot(model), []

    def closure():
        enabled.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == pytest.approx(loss_of(net(), batch(0)).item())
    assert enabled == [True] and optimizer.step() is None
    check_frozen(way, before, model)


@every
def test_hooks_fire_once_also_after_plain_optimizers_exist(way) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    model = net()
    optimizer = build(way, model)
    for cls in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam, torch.optim.Optimizer):
        options = {"defaults": {}} if cls is torch.optim.Optimizer else {"lr": 0.1}
        cls([nn.Parameter(torch.ones(1))], **options)
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append(("pre", a[0] is optimizer)))
    optimizer.register_step_post_hook(lambda *a: calls.append(("post", a[0] is optimizer)))
    handle = register_optimizer_step_post_hook(lambda *a: calls.append(("all", a[0] is optimizer)))
    try:
        train(model, optimizer, [0])
    finally:
        handle.remove()
    assert calls == [("pre", True), ("post", True), ("all", True)]


@every
@pytest.mark.parametrize("named", [False, True])
def test_groups_have_options_of_their_own(way, named) -> None:
    model = net()
    first = [(n, p) for n, p in own(model) if n.startswith("up")]
    rest = [(n, p) for n, p in own(model) if not n.startswith("up")]
    groups = [
        {"params": first if named else [p for _, p in first], "lr": 0.0},
        {"params": rest if named else [p for _, p in rest], "weight_decay": 0.0},
    ]
    optimizer = build(way, model, groups=groups)
    before = snapshot(model)
    train(model, optimizer, range(2))
    for name, p in own(model):
        assert torch.equal(p, before[name]) == name.startswith("up"), name
    held = optimizer.state_dict()["param_groups"]
    assert [g["lr"] for g in held] == [0.0, 0.01] and held[1]["weight_decay"] == 0.0
    assert (held[0].get("param_names") == ["up.weight", "up.bias"]) == named
    check_frozen(way, before, model)


@every
def test_schedulers(way) -> None:
    """Those that set the rate, those that also set momentum, and one that goes by the loss."""
    for make in (
        lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: OneCycleLR(o, 0.02, total_steps=6, cycle_momentum=False),
    ):
        model = net()
        optimizer = build(way, model)
        scheduler = make(optimizer)
        before = snapshot(model)
        train(model, optimizer, range(3), scheduler=scheduler)
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] != 0.01
        check_frozen(way, before, model)
    plateau = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    rate = optimizer.param_groups[0]["lr"]
    for loss in (1.0, 2.0):
        plateau.step(loss)
    assert optimizer.param_groups[0]["lr"] == rate / 2


@every
def test_a_rate_may_be_a_tensor_that_is_filled(way) -> None:
    runs = []
    for lr in (0.01, torch.tensor(0.01)):
        model = net()
        optimizer = build(way, model, lr=lr)
        train(model, optimizer, [0])
        if isinstance(lr, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is lr
            lr.fill_(0.005)
        else:
            optimizer.param_groups[0]["lr"] = 0.005
        train(model, optimizer, [1])
        runs.append(snapshot(model))
    for name, a in runs[0].items():
        torch.testing.assert_close(a, runs[1][name], rtol=1e-5, atol=1e-6)


@every
def test_a_scaler_unscales_and_skips(way) -> None:
    model, plain = net(), net()
    optimizer, other = build(way, model), build(way, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(3):
        loss = loss_of(model, batch(step * 16))
        scaler.scale(loss * float("inf") if step == 1 else loss).backward()
        before = snapshot(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1:
            assert_same(before, snapshot(model))
        else:
            train(plain, other, [step])
    for name, a in snapshot(model).items():
        torch.testing.assert_close(a, snapshot(plain)[name], rtol=1e-4, atol=1e-5)
    assert scaler.get_scale() == 128.0


@every
def test_clipping_is_of_what_is_stepped(way) -> None:
    model = net()
    optimizer = build(way, model)
    loss_of(model, batch(0)).backward()
    grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    after = torch.cat([g.reshape(-1) for g in grads]).norm()
    assert float(after) == pytest.approx(1e-3, rel=1e-3)
    before = snapshot(model)
    optimizer.step()
    check_frozen(way, before, model)
    if "SGD" in way:
        moved = torch.cat([(p - before[n]).reshape(-1) for n, p in own(model)])
        decay = 0.01 * 0.1 * torch.cat([b.reshape(-1) for b in before.values()]).norm()
        assert moved.norm() <= decay + 0.01 * 1.1e-3


@every
def test_no_gradient_is_a_skip_and_a_zero_one_is_a_step(way) -> None:
    model = net()
    optimizer = build(way, model)
    before = snapshot(model)
    optimizer.step()
    assert_same(before, snapshot(model))
    assert not any("step" in s and float(s["step"]) > 0 for s in optimizer.state.values())
    with torch.no_grad():
        model.up.weight.fill_(1.0)
    model.up.weight.grad = torch.zeros_like(model.up.weight)
    optimizer.step()
    optimizer.zero_grad()
    now = snapshot(model)
    selected = now["up.weight"][::2] if way.startswith("wrapped") else now["up.weight"]
    if "Adagrad" not in way:  # whose decay is a gradient, divided by its own root
        decayed = torch.full_like(selected, 1 - 0.01 * 0.1)
        torch.testing.assert_close(selected, decayed)
    if way.startswith("wrapped"):
        assert torch.equal(now["up.weight"][1::2], torch.ones(10, 12))
    assert all(torch.equal(now[n], before[n]) for n in now if n != "up.weight")


@every
@pytest.mark.parametrize("kind", ["strided", "expanded", "sparse"])
def test_gradients_of_other_layouts(way, kind) -> None:
    model, plain = net(), net()
    optimizer, other = build(way, model), build(way, plain)
    dense = torch.randn(23, 12, generator=torch.Generator().manual_seed(0))
    made = {
        "strided": lambda: dense.t().contiguous().t(),
        "expanded": lambda: torch.ones(1, 1).expand(23, 12),
        "sparse": lambda: dense.to_sparse(1),
    }[kind]()
    model.embed.weight.grad = made
    plain.embed.weight.grad = made.to_dense().clone() if kind == "sparse" else made.clone()
    if kind == "sparse" and way.startswith("bare"):
        with pytest.raises(LayoutError, match="wanted a dense one"):
            optimizer.step()
        return
    optimizer.step()
    other.step()
    assert_same(snapshot(model), snapshot(plain))


@every
def test_groups_may_be_added_in_mid_run_and_come_back(way) -> None:
    def start():
        model, extra = net(), nn.Parameter(torch.ones(4, 3))
        return model, extra, build(way, model)

    def step(model, extra, optimizer, i) -> None:
        (loss_of(model, batch(i)) + (extra * i).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, extra, optimizer = start()
    before = snapshot(model)
    step(model, extra, optimizer, 0)
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    assert optimizer.param_groups[1]["weight_decay"] == 0.1
    step(model, extra, optimizer, 1)
    held = io.BytesIO()
    torch.save((model.state_dict(), extra.detach(), optimizer.state_dict()), held)
    step(model, extra, optimizer, 2)
    assert not torch.equal(extra, torch.ones(4, 3))
    check_frozen(way, before, model)

    held.seek(0)
    weights, value, state = torch.load(held, weights_only=True)
    again, other, resumed = start()
    resumed.add_param_group({"params": [other]})
    again.load_state_dict(weights)
    with torch.no_grad():
        other.copy_(value)
    resumed.load_state_dict(state)
    step(again, other, resumed, 2)
    assert_same(snapshot(model), snapshot(again))
    assert torch.equal(bits(extra), bits(other))


@wrapped_ones
def test_a_parameter_of_which_nothing_is_selected_and_one_of_which_all_is(way) -> None:
    model = net()
    shapes = {n: tuple(p.shape) for n, p in own(model)}
    none = torch.empty(0, dtype=torch.int32)
    mask = Mask(
        {
            "up.weight": Selection("all", shapes["up.weight"]),
            "embed.weight": Selection("rows", shapes["embed.weight"], none),
            "down.weight": Selection("none", shapes["down.weight"]),
        },
        model,
    )
    optimizer = build(way, model, mask=mask)
    before = snapshot(model)
    train(model, optimizer, range(2))
    now = snapshot(model)
    assert [n for n in now if not torch.equal(now[n], before[n])] == ["up.weight"]
    assert (now["up.weight"] != before["up.weight"]).all()
    assert len(optimizer.state) == 1


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_has_the_state_and_leaves_the_model_alone(way, copied) -> None:
    model = net()
    optimizer = build(way, model)
    train(model, optimizer, range(2))
    twin = copied(optimizer)
    assert type(twin) is type(optimizer)
    for a, b in zip(optimizer.param_groups, twin.param_groups, strict=True):
        # torch adds "differentiable" to what it unpickles
        assert all(b[key] == value for key, value in a.items() if key != "params")
        for p, q in zip(a["params"], b["params"], strict=True):
            assert p is not q and torch.equal(p, q)
            for key, value in optimizer.state[p].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin.state[q][key]))
    before = snapshot(model)
    for group in twin.param_groups:
        for q in group["params"]:
            q.grad = torch.ones_like(q)
    twin.step()
    assert_same(before, snapshot(model))
    train(model, optimizer, [2])  # and the first goes on
    check_frozen(way, snapshot(net()), model)


@pytest.mark.parametrize("way", [w for w in WRAPPED + BARE if "Muon" not in w])
def test_maximize_is_the_way_up(way) -> None:
    """torch's Muon has no such option, and so has ours not."""
    up, down = net(), net()
    climbing = build(way, up, maximize=True, weight_decay=0.0)
    falling = build(way, down, weight_decay=0.0)
    grads = {n: torch.randn_like(p) for n, p in own(up)}
    for model, optimizer, sign in ((up, climbing, 1.0), (down, falling, -1.0)):
        for name, p in own(model):
            p.grad = sign * grads[name]
        optimizer.step()
    assert_same(snapshot(up), snapshot(down))
    check_frozen(way, snapshot(net()), up)


@wrapped_ones
def test_tensors_that_are_replaced_in_the_groups_are_noticed(way) -> None:
    """As FSDP2's preparation does: the gradients would go to values that nobody steps."""
    model = net()
    optimizer = build(way, model)
    train(model, optimizer, [0])
    group = optimizer.param_groups[0]
    group["params"][1] = nn.Parameter(group["params"][1].detach().clone())
    before = snapshot(model)
    loss_of(model, batch(1)).backward()
    with pytest.raises(EngineError, match=r"no longer holds the compact values of up\.weight"):
        optimizer.step()
    assert_same(before, snapshot(model))
    assert get_engine(model).slots["up.weight"].value.grad is not None


@every
def test_zero_grad_clears_either_way(way) -> None:
    """The Trainer calls that of the model, loops of one's own that of the optimizer."""
    model = net()
    optimizer = build(way, model)
    for clear in (optimizer.zero_grad, model.zero_grad):
        loss_of(model, batch(0)).backward()
        clear()
        params = [p for g in optimizer.param_groups for p in g["params"]]
        assert all(p.grad is None for p in [*params, *model.parameters()])
    loss_of(model, batch(0)).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
