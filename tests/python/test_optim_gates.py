"""Gates of AdamW: which coordinates move in a step, and what becomes of the others."""

import contextlib
import copy
import math

import pytest
import torch
from test_optim_clocks import FROZEN, GRADS, MASKS, OPTIONS, RESET, START, through_a_file
from torch import nn
from training import assert_frozen, bits, element_mask, mixed_mask, net, own, snapshot, train

import retouch
from retouch import ops
from retouch.errors import HyperparameterError, LayoutError, ScoreError
from retouch.optim import gates, steps
from retouch.optim.gates import (
    AlphaAdam,
    Bernoulli,
    Cautious,
    Magma,
    Moment,
    Percentile,
    SkipUpdate,
    TopK,
)

PATHS = {"rust": contextlib.nullcontext, "torch": ops.force_torch}
paths = pytest.mark.parametrize("path", PATHS)

# The rows after three steps of each policy, worked out in float64.
LEAKED = [(0.899, -1.898, 0.4995), (0.858079, -1.829096, 0.424587), (0.796912, -1.778729, 0.344138)]
UPDATED = [(0.899, -1.898, 0.5), (0.858079, -1.898, 0.402982), (0.796912, -1.862953, 0.308385)]
SHARED = [(0.899, -1.898, 0.5), (0.858079, -1.898, 0.425086), (0.796912, -1.841844, 0.344637)]
GOLDEN = {"P0": LEAKED, "P1": UPDATED, "P2": FROZEN, "P2s": SHARED, "P3": RESET}

ALL = {
    "cautious": Cautious(),
    "cautious-paper": Cautious("paper", decay_closed=False),
    "alphaadam": AlphaAdam(),
    "alphaadam-count": AlphaAdam(history=False, alpha="count", decay_closed=False),
    "gmt": TopK(0.5),
    "gmt-frozen": TopK(0.5, policy="P2"),
    "gmt-shared": TopK(0.5, policy="P2s"),
    "gmt-reset": TopK(0.5, policy="P3"),
    "gmt-leaky": TopK(0.5, policy="P0", leaky=True),
    "percentile": Percentile(0.3),
    "child-f": Bernoulli(0.5, policy="P0", leaky=True),
    "bernoulli": Bernoulli(0.5),
    "skipupdate": SkipUpdate(0.5),
    "magma": Magma(),
}
every = pytest.mark.parametrize("gate", ALL.values(), ids=ALL.keys())
OPEN = [Cautious("none"), TopK(1.0, policy="P2"), TopK(1.0, policy="P3"), Bernoulli(1.0),
        Percentile(0.0), SkipUpdate(1.0), TopK(1.0, policy="P0", leaky=True),
        AlphaAdam(alpha="none")]  # fmt: skip


@paths
@pytest.mark.parametrize("policy", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_values_of_the_policies(path, policy, dtype):
    value = torch.tensor(START, dtype=dtype)
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    own_clocks = policy in ("P2", "P3")
    clock = torch.zeros(3, dtype=torch.int32) if own_clocks else 0
    closed = {"P2": "frozen", "P2s": "frozen", "P3": "reset"}.get(policy, "updated")
    for grad, mask, row in zip(GRADS, MASKS, GOLDEN[policy], strict=True):
        gate, grad = torch.tensor(mask, dtype=torch.bool), torch.tensor(grad, dtype=dtype)
        if policy == "P0":
            gate, grad = None, grad * gate
        before = value.clone()
        clock = clock if own_clocks else clock + 1
        with PATHS[path]():
            steps.adamw_(value, grad, m, v, None, None, "w", step=clock, gate=gate, closed=closed,
                         **OPTIONS)  # fmt: skip
        wanted = torch.tensor(row, dtype=dtype)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
        if gate is not None:
            assert torch.equal(bits(value)[~gate], bits(before)[~gate])


@pytest.mark.parametrize("policy", GOLDEN)
def test_topk_follows_its_policy(policy):
    # Gradients whose largest two are those that the masks open.
    p = nn.Parameter(torch.tensor(START))
    gate = TopK(0.67, policy=policy, leaky=policy == "P0")
    optimizer = retouch.AdamW([p], lr=0.1, weight_decay=0.01, gate=gate)
    for grad, mask in zip([(0.3, -4.0, 0.2), (-0.3, 0.1, 0.4)], MASKS, strict=False):
        p.grad = torch.tensor(grad)
        before = p.detach().clone()
        optimizer.step()
        closed = ~torch.tensor(mask, dtype=torch.bool)
        assert torch.equal(bits(p)[closed], bits(before)[closed]) == (policy != "P0")
    clock = optimizer.state[p]["step"]
    assert clock.tolist() == {"P2": [2, 1, 1], "P3": [2, 0, 1]}.get(policy, 2.0)
    if policy == "P3":
        assert optimizer.state[p]["exp_avg"][1] == 0 and optimizer.state[p]["exp_avg_sq"][1] == 0


@pytest.mark.parametrize("kind", [element_mask, mixed_mask])
@pytest.mark.parametrize("gate", OPEN, ids=lambda g: f"{g.kind}-{getattr(g, 'policy', '')}")
def test_an_open_gate_is_no_gate(gate, kind):
    runs = []
    for chosen in (None, gate):
        model = net(torch.bfloat16)
        optimizer = retouch.wrap(retouch.AdamW, kind(model), model, lr=1e-2, gate=chosen)
        if gate.kind in ("cautious", "alphaadam"):  # these are open where the gradient never turns
            for value in optimizer.param_groups[0]["params"]:
                value.grad = torch.ones_like(value)
            optimizer.step()
        else:
            train(model, optimizer, range(3))
        runs.append((snapshot(model), optimizer.param_groups[0]["params"]))
    for a, b in zip(*(values for _, values in runs), strict=True):
        assert torch.equal(bits(a), bits(b))


@paths
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closed_coordinates_keep_their_bits(path, gate, dtype):
    model = net(dtype)
    mask = mixed_mask(model)
    start = snapshot(model)
    optimizer = retouch.wrap(retouch.AdamW, mask, model, lr=0.1, weight_decay=0.1, gate=gate)
    closed = 0
    with PATHS[path]():
        for step in range(6):
            before = [v.detach().clone() for v in optimizer.param_groups[0]["params"]]
            train(model, optimizer, [step])
            for old, value in zip(before, optimizer.param_groups[0]["params"], strict=True):
                closed += int((bits(old) == bits(value)).sum())
    if gate.closes != "leaky" and not gate.decays:
        assert closed > 100
    assert_frozen(start, model, mask)
    for slot in retouch.get_engine(model).slots.values():
        now = slot.selection.take(slot.param)
        assert torch.equal(bits(now), bits(slot.value.detach().to(dtype)))


@every
def test_both_paths_and_a_resumed_run_agree(gate):
    def start():
        model = net()
        return model, retouch.wrap(retouch.AdamW, mixed_mask(model), model, lr=1e-2, gate=gate)

    model, optimizer = start()
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    weights = through_a_file(model.state_dict())
    train(model, optimizer, range(3, 6))

    again = net()
    resumed = retouch.wrap(retouch.AdamW, mixed_mask(again), again, lr=1e-2)
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)  # the gate comes with it
    assert resumed.param_groups[0]["gate"] == gates.plain(gate)
    train(again, resumed, range(3, 6))
    for (name, a), (_, b) in zip(own(model), own(again), strict=True):
        assert torch.equal(bits(a), bits(b)), name

    other, optimizer = start()
    with ops.force_torch():
        train(other, optimizer, range(3))
    for name, a in own(other):
        torch.testing.assert_close(a.detach(), weights[name], rtol=1e-5, atol=1e-6)


def moment(m, g, v=None, step=2, beta1=0.9):
    m, g = torch.tensor(m), torch.tensor(g)
    v = torch.ones_like(m) if v is None else torch.tensor(v)
    return Moment("w", g, {"exp_avg": m, "exp_avg_sq": v}, step, beta1, 0.999, 1e-8)


def test_cautious():
    # With beta1 -> m as it is: m (.1, -.2, .3), g (1, 1, 2) opens the first and the last.
    at = moment((0.1, -0.2, 0.3), (1.0, 1.0, 2.0), beta1=1.0)
    for scale, want in (("released", 1.5), ("paper", 1.0), ("none", 1.0)):
        opened, factor = Cautious(scale).choose(at)
        assert opened.tolist() == [True, False, True] and factor == pytest.approx(want)
    opened, factor = Cautious().choose(moment((-1.0, 1.0), (0.1, -0.1)))
    assert not opened.any() and factor == pytest.approx(1e3)


def test_alphaadam():
    at = moment((0.1, -0.2, 0.3), (1.0, 1.0, 2.0))
    assert AlphaAdam(alpha="none").choose(at).open.tolist() == [True, False, True]
    assert AlphaAdam(alpha="count").choose(at).scale == pytest.approx(1.5)
    # |u| = (.5, .5, .5): the l2 factor is sqrt(3/2).
    at.direction = lambda: torch.tensor([0.5, -0.5, 0.5])
    assert AlphaAdam().choose(at).scale == pytest.approx(1.2247, abs=1e-4)
    assert AlphaAdam(alpha_max=1.1).choose(at).scale == 1.1
    # A gradient that turns the momentum's sign: history says closed, the mixed momentum open.
    turn = moment((0.01,), (-1.0,))
    assert AlphaAdam(alpha="none").choose(turn).open.tolist() == [False]
    assert AlphaAdam(alpha="none", history=False).choose(turn).open.tolist() == [True]
    assert AlphaAdam(alpha="none").choose(moment((0.0,), (1.0,), step=1)).open.tolist() == [True]
    ages = torch.tensor([1, 4], dtype=torch.int32)
    first = AlphaAdam(alpha="none").choose(moment((0.0, 0.0), (1.0, 1.0), step=ages))
    assert first.open.tolist() == [True, False]


def test_the_direction_is_that_of_the_step():
    p = nn.Parameter(torch.tensor(START))
    optimizer = retouch.AdamW([p], lr=0.1, weight_decay=0.0)
    for grad in GRADS[:2]:
        p.grad = torch.tensor(grad)
        optimizer.step()
    state = {k: t.clone() for k, t in optimizer.state[p].items()}
    u = Moment("w", torch.tensor(GRADS[2]), state, 3, 0.9, 0.999, 1e-8).direction()
    before = p.detach().clone()
    p.grad = torch.tensor(GRADS[2])
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 0.1 * u)


def test_topk_is_gradient_mask_tuning():
    opened = TopK(0.67).choose(moment((0.0,) * 3, (0.3, -4.0, 0.2))).open
    assert opened.tolist() == [True, True, False]
    # Ties go to the lowest position; one at least moves; digits of the density are taken as written.
    assert TopK(0.5).choose(moment((0.0,) * 4, (1.0, 1.0, -1.0, 1.0))).open.tolist() == [1, 1, 0, 0]
    assert TopK(0.01).choose(moment((0.0,) * 3, (1.0, 2.0, 1.0))).open.tolist() == [0, 1, 0]
    assert TopK(0.7).choose(moment((0.0,) * 10, tuple(range(10)))).open.sum() == 7
    # The mean gradient of the step decides: micro-batches (3, 2, 0) and (0, 2, 0) open the second.
    p = nn.Parameter(torch.zeros(3))
    optimizer = retouch.AdamW([p], lr=0.1, gate=TopK(0.34, policy="P0", leaky=True))
    for part in ((3.0, 2.0, 0.0), (0.0, 2.0, 0.0)):
        (p * torch.tensor(part) / 2).sum().backward()
    optimizer.step()
    assert (p != 0).tolist() == [False, True, False]
    with pytest.raises(ScoreError, match="gradient of w is NaN"):
        TopK(0.5).choose(moment((0.0,) * 2, (1.0, math.nan)))


def test_leaky_topk_is_the_stock_optimizer_on_masked_gradients():
    p, q = (nn.Parameter(torch.tensor(START)) for _ in range(2))
    gate = TopK(0.67, policy="P0", leaky=True)
    ours = retouch.AdamW([p], lr=0.1, weight_decay=0.01, gate=gate)
    theirs = torch.optim.AdamW([q], lr=0.1, weight_decay=0.01, foreach=False)
    for grad in GRADS:
        p.grad = torch.tensor(grad)
        size = p.grad.abs()
        q.grad = p.grad * TopK(0.67).choose(moment(START, grad)).open
        assert (q.grad != 0).sum() == 2 and size.numel() == 3
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_percentile_is_that_of_numpy():
    import numpy as np

    grad = torch.randn(101, generator=torch.Generator().manual_seed(3))
    for p in (0.0, 0.25, 0.3, 0.333, 0.99):
        bound = np.percentile(grad.abs().double().numpy(), 100 * p)
        opened = Percentile(p).choose(moment([0.0] * 101, grad.tolist())).open
        assert torch.equal(opened, grad.abs().double() >= bound - 1e-7)
    cure = Percentile(1 / 3).choose(moment((0.0,) * 3, (1.0, -3.0, 2.0))).open
    assert cure.tolist() == [False, True, True]
    with pytest.raises(ScoreError, match="gradient of w is NaN"):
        Percentile(0.5).choose(moment((0.0,) * 2, (1.0, math.nan)))


def test_draws_depend_on_seed_name_and_step_alone():
    def draw(seed=0, name="w", step=1):
        at = Moment(name, torch.ones(2000), {}, step, 0.9, 0.999, 1e-8)
        return Bernoulli(0.3, seed=seed).choose(at)

    first = draw()
    assert torch.equal(first.open, draw().open) and first.scale == pytest.approx(1 / 0.3)
    for other in (draw(seed=1), draw(name="v"), draw(step=2)):
        assert not torch.equal(first.open, other.open)
    assert abs(first.open.float().mean() - 0.3) < 0.05
    opened = [SkipUpdate(0.25).choose(Moment("w", torch.ones(2), {}, t, 0.9, 0.999, 1e-8))
              for t in range(400)]  # fmt: skip
    moved = [o for o in opened if o.open is None]
    assert 60 < len(moved) < 140 and all(o.scale == 4 for o in moved)


def test_bernoulli_leaky_is_child_tuning_f():
    p, q = (nn.Parameter(torch.tensor(START)) for _ in range(2))
    gate = Bernoulli(0.5, seed=2, policy="P0", leaky=True)
    ours = retouch.AdamW([p], lr=0.1, gate=gate)
    theirs = torch.optim.AdamW([q], lr=0.1, foreach=False)
    for step, grad in enumerate(GRADS, 1):
        p.grad = torch.tensor(grad)
        name = f"parameter 0 of group 0 at step {step}"
        q.grad = p.grad * (ops.uniform((3,), 2, name, "cpu") < 0.5) / 0.5
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_magma():
    # cos(m, g) = .5455: the target is sigmoid(.5455 / 2) = .5678.
    g = torch.tensor([1.0, 0.0])
    m = torch.tensor([0.5455, math.sqrt(1 - 0.5455**2)])
    for start, want in ((1.0, 0.9568), (0.0, 0.0568)):
        state = {"exp_avg": m.clone(), "exp_avg_sq": torch.ones(2)}
        at = Moment("w", g, state, 5, 1.0, 0.999, 1e-8)
        Magma(start=start).choose(at)
        assert float(state["gate_scale"]) == pytest.approx(want, abs=1e-4)
        at.grad = torch.zeros(2)
        Magma().choose(at)
        assert float(state["gate_scale"]) == pytest.approx(want, abs=1e-4)


def test_a_gate_of_one_group_and_maximize():
    p, q, r = (nn.Parameter(torch.tensor(START)) for _ in range(3))
    groups = [{"params": [p], "gate": TopK(0.34)}, {"params": [q]}]
    optimizer = retouch.AdamW(groups, lr=0.1, maximize=True)
    optimizer.add_param_group({"params": [r], "gate": {"kind": "cautious", "scale": "paper"}})
    for x in (p, q, r):
        x.grad = torch.tensor([0.3, -4.0, 0.2])
    optimizer.step()
    assert (p.detach() != torch.tensor(START)).tolist() == [False, True, False]
    assert (q.detach() != torch.tensor(START)).all() and p[1] == q[1]
    assert (r.detach() != torch.tensor(START)).all()  # the first step always goes downhill
    assert copy.deepcopy(optimizer).param_groups[0]["gate"] == gates.plain(TopK(0.34))
    with pytest.raises(HyperparameterError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "gate": "cautious"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(0.0),
        lambda: TopK(1.1),
        lambda: TopK(0.5, policy="P4"),
        lambda: TopK(0.5, policy="P0"),
        lambda: TopK(0.5, policy="P2", leaky=True),
        lambda: TopK(0.5, per="micro"),
        lambda: TopK(0.5, per="backward"),
        lambda: Percentile(1.0),
        lambda: Bernoulli(0.0),
        lambda: Bernoulli(0.5, policy="P2"),
        lambda: Cautious("mean"),
        lambda: AlphaAdam(alpha="l1"),
        lambda: AlphaAdam(alpha_max=0.5),
        lambda: Magma(tau=0.0),
        lambda: SkipUpdate(2.0),
        lambda: gates.parse({"kind": "dropout"}),
        lambda: gates.parse({"kind": "topk", "ratio": 0.5}),
    ],
)
def test_what_is_refused(make):
    with pytest.raises(HyperparameterError):
        make()


@paths
def test_a_gate_that_does_not_fit(path):
    parts = [torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)]
    for bad in (torch.ones(2, dtype=torch.bool), torch.ones(3)):
        with PATHS[path](), pytest.raises(LayoutError, match="gate of w"):
            steps.adamw_(*parts, None, None, "w", step=1, gate=bad, **OPTIONS)
