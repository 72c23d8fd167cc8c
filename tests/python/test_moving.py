"""Masks that move: what becomes of values, bases and state, and the schedules that move them."""

import io
import itertools

import pytest
import torch
import training
from torch import nn
from training import assert_same, batch, bits, loss_of, net, snapshot

import retouch
from retouch import Schedule, SelectConfig
from retouch.eligible import candidates
from retouch.engine import get_engine, verify_untouched, wrap
from retouch.errors import EngineError, HyperparameterError, ScoreError
from retouch.masks import Mask, Selection
from retouch.optim import lowbit

# Three steps over three coordinates (optimizers.md 0.2), float64.
START, GRADS = (1.0, -2.0, 0.5), [(0.3, -4.0, 0.2), (-0.1, 1.0, 0.4), (0.2, 0.2, 0.2)]
MASKS = [(0, 1), (0, 2), (0, 1, 2)]
GOLDEN = {
    ("keep", "coordinate"): [(0.899, -1.898, 0.5), (0.858079, -1.898, 0.3995),
                             (0.796912, -1.832898, 0.305883)],
    ("keep", "shared"): [(0.899, -1.898, 0.5), (0.858079, -1.898, 0.425086),
                         (0.796912, -1.841844, 0.344637)],
    ("intersect", "coordinate"): [(0.899, -1.898, 0.5), (0.858079, -1.898, 0.3995),
                                  (0.796912, -1.996102, 0.305883)],
}  # fmt: skip


def of(model, index):
    shape = tuple(model.weight.shape)
    chosen = Selection("elements", shape, torch.tensor(index, dtype=torch.int32))
    return Mask({"weight": chosen}, model)


def three():
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([START]))
    return model


@pytest.mark.parametrize("policy", GOLDEN, ids="-".join)
def test_golden_values_of_the_state_policies(policy):
    state, clock = policy
    model = three()
    optimizer = wrap(retouch.AdamW, of(model, MASKS[0]), lr=0.1, weight_decay=0.01)
    engine = get_engine(model)
    for mask, grad, want in zip(MASKS, GRADS, GOLDEN[policy], strict=True):
        engine.move(of(model, mask), state=state, clock=clock)
        model.weight.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(
            model.weight.detach()[0], torch.tensor(want, dtype=torch.float64), rtol=0, atol=5e-7
        )


def test_reset_starts_everything_afresh():
    model = three()
    optimizer = wrap(torch.optim.AdamW, of(model, MASKS[0]), lr=0.1, weight_decay=0.0)
    for mask in MASKS:
        get_engine(model).move(of(model, mask), state="reset")
        before = model.weight.detach().clone()[0, list(mask)]
        model.weight.grad = torch.tensor([GRADS[0]], dtype=torch.float64)
        optimizer.step()
        step = (model.weight.detach()[0, list(mask)] - before).abs()
        torch.testing.assert_close(step, torch.full_like(step, 0.1), rtol=0, atol=1e-6)


def test_optimizers_with_one_clock_say_so():
    model = three()
    optimizer = wrap(torch.optim.AdamW, of(model, MASKS[0]), lr=0.1)
    model.weight.grad = torch.ones(1, 3, dtype=torch.float64)
    optimizer.step()
    engine = get_engine(model)
    with pytest.raises(EngineError, match=r"weight: .* retouch\.AdamW"):
        engine.move(of(model, MASKS[1]))
    engine.move(of(model, MASKS[1]), clock="shared")
    assert float(next(iter(optimizer.state.values()))["step"]) == 1


def random_mask(model, seed, kind="mixed"):
    """Another kind of selection for each parameter at each seed."""
    chosen = {}
    kinds = ("elements", "rows", "none", "all", "columns", "elements")
    for i, (name, p) in enumerate(training.own(model)):
        shape = tuple(p.shape)
        word = kinds[(i + seed) % len(kinds)] if kind == "mixed" else kind
        if word == "columns" and len(shape) < 2:
            word = "rows"
        if word in ("all", "none"):
            chosen[name] = Selection(word, shape)
            continue
        length = {"elements": p.numel(), "rows": shape[0]}.get(word, shape[-1])
        if word == "columns":
            length = shape[1]
        count = max(1, length // 3)
        chosen[name] = Selection(word, shape, training.positions(length, count, seed * 31 + i))
    return Mask(chosen, model)


@pytest.mark.parametrize("state", ["intersect", "keep", "reset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_coordinate_outside_of_the_mask_never_moves(dtype, state):
    model = net(dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = wrap(retouch.AdamW, None, model, lr=0.05, weight_decay=0.5)
    engine = get_engine(model)
    engine.set_mask(random_mask(model, 0))
    ever = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in start.items()}
    for step in range(8):
        if step:
            engine.move(random_mask(model, step), state=state)
        before = {n: p.detach().clone() for n, p in training.own(model)}
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in training.own(model):
            inside = torch.zeros(p.numel(), dtype=torch.bool)
            if name in engine.slots:
                inside[engine.slots[name].selection.flat().long()] = True
            inside = inside.view(p.shape)
            same = bits(p.detach()) == bits(before[name])
            assert bool(same[~inside].all()), name
            ever[name] |= inside
    verify_untouched(model)
    delta = retouch.Delta.from_model(model)
    trained = {n: p.detach().clone() for n, p in training.own(model)}
    with engine.base_weights():
        assert_same({n: p.detach() for n, p in training.own(model)}, start)
    assert_same({n: p.detach() for n, p in training.own(model)}, trained)
    for name, entry in delta.items():
        assert bool(ever[name].view(-1)[entry.index.long()].all())
    retouch.unwrap(model)
    delta.revert_(model)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, start)


def test_survivors_go_on_as_if_nothing_had_happened():
    """Coordinates in all masks take the path of a run with a static mask."""
    runs = []
    for moving in (False, True):
        model = net()
        mask = random_mask(model, 0, "elements")
        optimizer = wrap(retouch.AdamW, mask, lr=0.01, weight_decay=0.1)
        for step in range(4):
            if moving and step:
                get_engine(model).move(mask | random_mask(model, step, "elements"))
            for name, p in training.own(model):
                generator = torch.Generator().manual_seed(len(name) + step)
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
        runs.append({n: s.take(dict(training.own(model))[n]) for n, s in mask.items()})
    assert_same(*runs)


# --- schedules -------------------------------------------------------------------------------------

MATRICES = {"target_modules": ["up", "down"], "modules_to_save": ["norm"]}


def config(schedule, **fields):
    return SelectConfig(**(MATRICES | fields), schedule=schedule)


SCHEDULES = {
    "random": config(Schedule(every=2), direction="random", density=0.1),
    "layers": config(
        Schedule(every=2, change="cycle", state="reset"), granularity="tensor", score="magnitude",
        k=1,
    ),
    "windows": config(
        Schedule(every=2, change="cycle", state="reset"), direction="random", density=0.3
    ),
    "collected": config(Schedule(every=3, collect=2), score="gradient", density=0.1),
    "fisher": config(
        Schedule(every=3, collect="all"), score={"name": "gradstat", "map": "square"}, density=0.1
    ),
    "now": config(Schedule(every=1, collect=1, now=True), score="gradient", density=0.1),
    "grow": config(
        Schedule(every=1, collect=1, now=True, change="grow", ramp="linear", rounds=4),
        score="gradient", density=0.1,
    ),
    "shrink": config(
        Schedule(every=2, change="shrink", ramp="cubic", rounds=3, initial="all"),
        score="magnitude", density=0.1,
    ),
    "drop_grow": config(
        Schedule(
            every=2, collect=2, change="drop_grow", initial="random", rewind="dropped",
            drop_first=1.0, ramp="linear", rounds=5, state="seeded",
        ),
        score="gradient", density=0.1, scope="tensor",
    ),
    "rewound": config(
        Schedule(start=3, initial="all", rewind="all"), score={"name": "moved"}, density=0.1
    ),
    "freeze": config(
        Schedule(every=2, change="freeze", signal="weight_change_mean", threshold=2e-3),
        granularity="tensor", density=1.0, score="magnitude",
    ),
    "put aside": config(Schedule(every=1, state="keep"), direction="random", density=0.2),
}  # fmt: skip
schedules = pytest.mark.parametrize("name", SCHEDULES)


def started(name, dtype=torch.float32, cls=retouch.AdamW, **options):
    model = net(dtype)
    optimizer = wrap(cls, SCHEDULES[name], model, lr=0.01, weight_decay=0.1, **options)
    return model, optimizer


def train(model, optimizer, steps, seen=None):
    for step in steps:
        for half in range(2):  # two micro-batches
            (loss_of(model, batch(2 * step + half)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if seen is not None:
            seen.append(dict(get_engine(model).mask))


@schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_schedule_resumes_bit_for_bit(name, dtype):
    resumes(name, dtype)


@schedules
@pytest.mark.parametrize("kind", ["codes", "kahan", "stochastic", "factors"])
def test_so_do_other_kinds_of_state(name, kind, monkeypatch):
    monkeypatch.setattr(lowbit, "SMALLEST", 1)
    if kind != "factors":
        options = {"state_bits": 8} if kind == "codes" else {"rounding": kind}
        resumes(name, torch.bfloat16, **options)
    elif SCHEDULES[name].schedule.state == "seeded":
        with pytest.raises(EngineError, match="sets the moments of"):
            resumes(name, torch.bfloat16, cls=retouch.Adafactor)
    else:
        resumes(name, torch.bfloat16, cls=retouch.Adafactor)


def resumes(name, dtype, **options):
    whole, optimizer = started(name, dtype, **options)
    masks = []
    train(whole, optimizer, range(9), masks)
    for cut in (2, 5):
        model, first = started(name, dtype, **options)
        train(model, first, range(cut))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, second = started(name, dtype, **options)
        other.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
        again = []
        train(other, second, range(cut, 9), again)
        assert_same(snapshot(other), snapshot(whole))
        for one, two in zip(again, masks[cut:], strict=True):
            assert one == two
        with get_engine(other).base_weights():
            start = net(dtype)
            for n, p in training.own(other):
                assert torch.equal(bits(p.detach()), bits(dict(start.named_parameters())[n]))


@schedules
def test_every_schedule_leaves_the_rest_untouched_and_learns(name):
    model, optimizer = started(name)
    loss = float(loss_of(model, batch(0)).detach())
    masks = []
    train(model, optimizer, [0] * 12, masks)
    verify_untouched(model)
    assert float(loss_of(model, batch(0)).detach()) < loss
    outside = [n for n, _ in training.own(model) if not n.startswith(("up.w", "down", "norm"))]
    assert outside and not any(n in mask for n in outside for mask in masks)
    assert all("norm.weight" in mask for mask in masks)
    if name not in ("rewound", "freeze"):  # those change once, or when they have converged
        assert len({str(sorted((n, s.flat().tolist()) for n, s in m.items())) for m in masks}) > 1


def counts(masks):
    return [sum(s.count for n, s in m.items() if not n.startswith("norm")) for m in masks]


def test_budgets():
    total = 12 * 20 + 6 * 5
    k = total // 10
    for name, want in {
        "random": [k] * 6, "collected": [0, k, k, k, k, k], "now": [k] * 6,
        "grow": [7, 14, 21, 27, 27, 27], "rewound": [total] * 2 + [k] * 4,
        "drop_grow": [24 + 3] * 6,
    }.items():  # fmt: skip
        model, optimizer = started(name)
        masks = []
        train(model, optimizer, range(6), masks)
        assert counts(masks) == want, name
    # B=10, T=4 of ID3's sheet
    increments = Schedule(every=1, collect=1, now=True, change="grow", ramp="linear", rounds=4)
    model = net()
    optimizer = wrap(retouch.AdamW, config(increments, score="gradient", k=10), model, lr=0.01)
    masks = []
    train(model, optimizer, range(5), masks)
    assert counts(masks) == [3, 6, 8, 10, 10]
    for one, two in itertools.pairwise(masks):
        assert all((s & two[n]) == s for n, s in one.items())


def test_the_score_of_id3():
    """Numbers of optimizers.md 3."""
    weight, grad = torch.tensor([[0.5, -0.01, 2.0]]), torch.tensor([[0.2, -0.1, 0.4]])
    for exponent, want in {
        0: (0.2, 0.1, 0.4), 1: (0.3992, 9.0909, 0.1999), -1: (0.1002, 0.0011, 0.8004),
        2: (0.797, 826.4, 0.0999),
    }.items():  # fmt: skip
        model = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(weight)
        score = retouch.scores.D3(exponent=float(exponent))
        found = score(
            model, {"weight": next(iter(_eligible(model).values()))}, [grad],
            lambda model, batch: (model.weight * batch).sum(),
        )["weight"]  # fmt: skip
        torch.testing.assert_close(found, torch.tensor([want]), rtol=2e-3, atol=6e-5)


def _eligible(model):
    return candidates(model, SelectConfig(score="d3", k=1, target_modules=None))


def test_selected_now_is_the_top_of_this_very_gradient():
    model, optimizer = started("now")
    for half in range(2):
        (loss_of(model, batch(half)) / 2).backward()
    grads = {n: dict(training.own(model))[n].grad.clone() for n in ("up.weight", "down.weight")}
    start = {n: p.detach().clone() for n, p in training.own(model)}
    optimizer.step()
    flat = torch.cat([grads[n].abs().flatten() for n in grads])
    top = torch.zeros_like(flat, dtype=torch.bool)
    top[flat.topk(27).indices] = True
    moved = torch.cat([(dict(training.own(model))[n] != start[n]).flatten() for n in grads])
    assert torch.equal(moved, top)


def test_memory_of_dropped_coordinates_is_freed():
    model, optimizer = started("layers")
    for step in range(6):
        train(model, optimizer, [step])
        engine = get_engine(model)
        active = sum(s.selection.count for s in engine.slots.values())
        assert engine.metrics()["state_bytes"] <= 8 * active + 4 * len(engine.slots)


def test_freezing_stops_when_all_is_frozen():
    model = net()
    schedule = Schedule(every=1, start=2, change="freeze", signal="grad_l1", threshold=1e9)
    every = SelectConfig(
        target_modules=["up", "down"], granularity="tensor", density=1.0, score="magnitude",
        schedule=schedule,
    )  # fmt: skip
    optimizer = wrap(retouch.AdamW, every, model, lr=0.01)
    engine = get_engine(model)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert engine.slots and not engine.mover.finished
    optimizer.zero_grad()
    loss_of(model, batch(1)).backward()
    optimizer.step()
    assert not engine.slots and engine.mover.finished
    assert not optimizer.state


def test_steps_that_overflow_are_not_collected():
    found = []
    for poison in (False, True):
        model, optimizer = started("collected")
        engine = get_engine(model)
        for step in range(3):
            if poison and step == 0:
                loss_of(model, batch(5)).backward(torch.tensor(float("inf")))
                engine.mover.before_step()  # of a step that is then skipped
                model.zero_grad()
            train(model, optimizer, [step])
        found.append(dict(engine.mask))
    assert found[0] == found[1]
    model, optimizer = started("collected")
    for _ in range(2):
        loss_of(model, batch(0)).backward(torch.tensor(float("nan")))
        if _:
            with pytest.raises(ScoreError, match="finite"):
                optimizer.step()
        else:
            optimizer.step()


def test_a_start_in_which_nothing_trains_is_an_error():
    late = SelectConfig(score="gradient", density=0.1, schedule=Schedule(start=5, collect=2))
    with pytest.raises(HyperparameterError, match=r"nothing is trained .* initial='all'"):
        wrap(retouch.AdamW, late, net(), lr=0.1)
    wrap(
        retouch.AdamW,
        config(Schedule(start=5, collect=2, initial="all"), score="gradient", density=0.1),
        net(),
        lr=0.1,
    )


def test_epochs():
    model = net()
    schedule = Schedule(every=1, unit="epoch")
    by_epoch = SelectConfig(**MATRICES, direction="random", density=0.1, schedule=schedule)
    optimizer = wrap(retouch.AdamW, by_epoch, model, lr=0.01)
    engine, masks = get_engine(model), []
    for _ in range(3):
        train(model, optimizer, range(2), masks)
        engine.mover.new_epoch()
    assert masks[0] == masks[1] and masks[2] == masks[3] and masks[1] != masks[2] != masks[4]


def test_wrong_schedules_say_what_to_do():
    for fields, message in (
        ({"every": 0}, "every=0"), ({"change": "grow"}, "needs every"),
        ({"chnge": 1}, "did you mean 'change'"), ({"state": "intersct"}, "did you mean 'intersect'"),
        ({"every": 2, "collect": 3}, "do not fit"), ({"now": True}, "collect=1"),
        ({"every": 1, "change": "freeze"}, "threshold"), ({"ramp": "linear"}, "rounds"),
        ({"state": "seeded"}, "collect"),
    ):  # fmt: skip
        with pytest.raises(HyperparameterError, match=message):
            Schedule.from_dict(fields)
    model = net()
    with pytest.raises(HyperparameterError, match="no part that is a gradient"):
        wrap(
            retouch.AdamW, config(Schedule(every=2, collect=1), score="magnitude", density=0.1),
            model, lr=0.1,
        )  # fmt: skip
    with pytest.raises(EngineError, match="not wrapped"):
        get_engine(model)  # nothing is left behind
