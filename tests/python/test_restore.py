"""Restoring, following and rewinding at the coordinates of a mask; where tasks go (PAR)."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from tiny_hf import llama, tokens
from torch import nn
from training import assert_frozen, assert_same, bits, snapshot

import retouch
from retouch import errors
from retouch.experts import Decision, choose_expert, task_distance
from retouch.masks import Mask
from retouch.restore import ema_, low_quantile, restore_
from retouch.scores import Difference


def noisy(model: nn.Module, seed: int) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return other


def data():
    samples = tokens(8)
    return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}


# --- the quantile ----------------------------------------------------------------------------------------


def test_psmt_oracle() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(1, 1, bias=False))
    scores = {
        "0.weight": torch.arange(100.0).flip(0).view(10, 10),
        "1.weight": torch.full((1, 1), 100.0),
    }
    mask = low_quantile(scores, 0.03, model)  # 0 to 100: q = 3, strictly below
    assert mask.count == 3 and mask["0.weight"].flat().tolist() == [97, 98, 99]
    assert low_quantile(scores, 0.035, model).count == 4  # q = 3.5
    assert low_quantile(scores, 0.0, model).count == 0
    assert low_quantile(scores, 1.0, model).count == 100


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_quantiles_are_numpys(fraction: float, ties: bool) -> None:
    model = tiny.llama()
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    if ties:
        scores = {n: (s * 7).floor() for n, s in scores.items()}
    flat = torch.cat([s.flatten() for s in scores.values()]).double().numpy()
    bound = np.quantile(flat, fraction)
    mask = low_quantile(scores, fraction, model)
    for name, score in scores.items():
        want = (score.double() < bound).flatten().nonzero().squeeze(1)
        got = mask[name].flat().long() if name in mask else want.new_empty(0)
        assert torch.equal(got, want), name


def test_quantile_mistakes() -> None:
    model = tiny.llama()
    with pytest.raises(errors.HyperparameterError, match=r"fraction=1\.5"):
        low_quantile({"lm_head.weight": torch.zeros(31, 16)}, 1.5, model)
    with pytest.raises(errors.ScoreError, match=r"lm_head\.weight is NaN"):
        low_quantile({"lm_head.weight": torch.full((31, 16), math.nan)}, 0.1, model)
    with pytest.raises(errors.BudgetError, match="no scores"):
        low_quantile({}, 0.1, model)
    infinite = {"lm_head.weight": torch.full((31, 16), -math.inf)}
    assert low_quantile(infinite, 0.5, model).count == 0


# --- restoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_psmt(dtype) -> None:
    source = llama(dtype)
    student, teacher = noisy(source, 1), noisy(source, 2)
    s, t, base = snapshot(student), snapshot(teacher), snapshot(source)
    student(**data()).loss.backward()
    squares = {n: p.grad.float().square() for n, p in student.named_parameters() if "layers" in n}
    low = low_quantile(squares, 0.03, student)
    assert 0 < low.count <= math.floor(0.03 * (low.numel - 1)) + 1
    ema_(teacher, student, 0.999)
    restore_(student, low, source)
    restore_(teacher, low, student)
    ema_(teacher, student, 0.999, ~low)
    for name, p in teacher.named_parameters():
        where = torch.zeros(p.shape, dtype=torch.bool)
        if name in low:
            where.view(-1)[low[name].flat().long()] = True
        mine = dict(student.named_parameters())[name]
        assert torch.equal(bits(p)[where], bits(base[name])[where])
        assert torch.equal(bits(mine)[where], bits(base[name])[where])
        assert torch.equal(bits(mine)[~where], bits(s[name])[~where])
        want = 0.999**2 * t[name].double() + (1 - 0.999**2) * s[name].double()
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            p.detach().double()[~where], want[~where], rtol=tolerance, atol=tolerance / 10
        )


def test_restoring_what_a_wrapped_model_has_moved() -> None:
    model = llama(torch.bfloat16)
    before = snapshot(model)
    mask = retouch.select(model, "magnitude", density=0.1)
    optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=1e-2)

    def step() -> None:
        model(**data()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    moved = snapshot(model)
    part = mask & retouch.select(copy.deepcopy(model), "random", density=0.5)
    assert 0 < part.count < mask.count
    restore_(model, part)
    for name, p in snapshot(model).items():
        back = torch.zeros(p.shape, dtype=torch.bool)
        if name in part:
            back.view(-1)[part[name].flat().long()] = True
        want = torch.where(back, before[name], moved[name])
        assert torch.equal(bits(p), bits(want)), name
    for slot in retouch.get_engine(model).slots.values():  # the masters have followed
        assert torch.equal(slot.value.detach().to(torch.bfloat16), slot.selection.take(slot.param))
    step()
    retouch.verify_untouched(model)
    restore_(model, mask)
    assert_same(before, snapshot(model))
    with pytest.raises(errors.MaskError, match="keeps frozen; use mask & model"):
        restore_(model, Mask.full(model), before)
    ema_(model, noisy(llama(torch.bfloat16), 3), 0.5, mask)
    retouch.verify_untouched(model)
    assert_frozen(before, model, mask)


def test_restoring_mistakes() -> None:
    model = llama()
    before, mask = snapshot(model), Mask.full(model)
    with pytest.raises(errors.EngineError, match="has no base of its own: pass a source"):
        restore_(model, mask)
    other = dict(noisy(model, 1).named_parameters())
    last = list(other)[-1]
    with pytest.raises(errors.MaskError, match=f"the source has no tensor '{last}'"):
        restore_(model, mask, {n: p for n, p in other.items() if n != last})
    with pytest.raises(errors.MaskError, match=r"is torch\.bfloat16 of shape"):
        restore_(model, mask, other | {last: other[last].to(torch.bfloat16)})
    with pytest.raises(errors.HyperparameterError, match="decay=2"):
        ema_(model, model, 2)
    assert_same(before, snapshot(model))  # nothing is half done


@pytest.mark.parametrize("recipe", ["lt-sft", "lota"])
def test_the_rewind_of_a_lottery_ticket(recipe: str) -> None:
    model = llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(**data()).loss.backward()
        whole.step()
        whole.zero_grad()
    mask = retouch.select(model, recipe, score=Difference(start))
    tuned = snapshot(model)
    restore_(model, Mask.full(model), start)
    assert_same(start, snapshot(model))
    name = "model.layers.0.mlp.down_proj.weight"
    change = (tuned[name] - start[name]).abs().flatten()
    inside = mask[name].flat().long()
    outside = torch.ones(change.shape, dtype=torch.bool)
    outside[inside] = False
    assert change[inside].min() >= change[outside].max()
    optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=1e-2)
    first = model(**data()).loss
    first.backward()
    optimizer.step()
    assert model(**data()).loss < first
    assert_frozen(start, model, mask)


# --- experts ----------------------------------------------------------------------------------------------


def test_par_oracle() -> None:
    features, labels = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([7, 7])
    # in 1 and 1, out sqrt(10) twice: D = ln sqrt(10) = 1.1513, 1 - exp(-2 D) = 0.9
    assert task_distance(features, labels, torch.tensor([[1.0, 3.0]])) == pytest.approx(0.9)
    # the nearest prototype counts; a far one changes nothing
    assert task_distance(
        features, labels, torch.tensor([[99.0, 0.0], [1.0, 3.0]])
    ) == pytest.approx(0.9)
    # ln of sqrt(2) = 0.3466: below 1 - exp(-2 D) = 0.5
    near = task_distance(features, labels, torch.tensor([[1.0, 1.0]]))
    assert near == pytest.approx(0.5 * math.log(2))
    # classes add up
    two = torch.cat([features, features + 100])
    prototypes = torch.tensor([[1.0, 1.0], [101.0, 101.0]])
    both = task_distance(two, torch.tensor([0, 0, 1, 1]), prototypes)
    assert both == pytest.approx(min(1 - math.exp(-2 * math.log(2)), math.log(2)))


def test_par_corners_of_the_released_code() -> None:
    features, labels = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0])
    assert task_distance(features, labels, features.mean(0)[None]) == 1.0  # 0 becomes 1
    assert task_distance(features, torch.tensor([0, 1]), torch.tensor([[1.0, 3.0]])) == 1.0
    with pytest.raises(errors.ShapeError, match="wanted"):
        task_distance(features, labels, torch.zeros(1, 3))
    with pytest.raises(errors.HyperparameterError, match="features hold"):
        task_distance(features / 0, labels, torch.zeros(1, 2))


def test_par_decides() -> None:
    sizes = [[100], [500, 60]]
    assert choose_expert([[0.9], [0.2, 0.6]], sizes, 300) == Decision("tune", 1, 0.4)
    assert choose_expert([[0.9], [0.2, 0.6]], sizes, 249) == Decision("head", 1, 0.4)
    assert choose_expert([[0.9], [0.2, 0.6]], sizes, 250).action == "tune"
    assert choose_expert([[0.9], [0.2, 0.6]], sizes, 300, over="max") == Decision("copy", 1, 0.6)
    assert choose_expert([[0.5], [0.9, 0.9]], sizes, 300) == Decision("tune", 0, 0.5)
    assert choose_expert([[0.75], [0.9, 0.9]], sizes, 300) == Decision("copy", 0, 0.75)
    assert choose_expert([[0.9], [0.9, 0.91]], sizes, 300) == Decision("search", None, 0.9)
    # 25 samples: the nearest of those with 250, whatever the distance
    few = choose_expert([[0.1], [0.9, 0.95]], sizes, 25)
    assert (few.action, few.expert) == ("head", 1)
    assert choose_expert([[0.1], [0.9, 0.95]], sizes, 26).expert == 0
    assert choose_expert([[0.1]], [[100]], 11) == Decision("head", 0, 0.1)  # none is large enough
    assert choose_expert([], [], 11).action == "search"
    with pytest.raises(errors.ShapeError, match="for every task"):
        choose_expert([[0.1, 0.2]], [[5]], 10)
    with pytest.raises(errors.HyperparameterError, match="median"):
        choose_expert([[0.1]], [[5]], 10, over="median")
