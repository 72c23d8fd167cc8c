"""The properties that every recipe has, whatever it scores (the catalogue's universal tests).

Budgets, learning and frozen weights in float32 are in test_recipes_learn.py, oracles beside each family.
"""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from test_recipes_learn import BUDGETS, MOVING, OTHERS, SHORT, model_for
from tiny_hf import llama, tokens
from torch import Tensor, nn
from training import assert_frozen, assert_same, bits, own, snapshot

import retouch
from retouch import Mask, SelectConfig, recipes, select
from retouch.eligible import candidates
from retouch.errors import BudgetError, ScoreError
from retouch.gates import LearnedGates
from retouch.scores import Constant, Difference, GradStat, HardExamples, Moved, Stripes, as_score

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NAMES = [row.id for row in recipes.list()]
SAMPLES = tokens(16)
DATA = [
    {k: torch.stack([s[k] for s in SAMPLES[i : i + 8]]) for k in SAMPLES[0]}
    for i in range(0, 16, 8)
]
ONE_PAIR = 2  # one coordinate for another, whose scores are the same but for rounding
Masks = dict[str, set[int]]


def config_of(name: str) -> SelectConfig:
    changes = dict(BUDGETS.get(name, (None, {}))[1])
    if isinstance(recipes.info(name).config.get("score"), Difference | Moved):
        changes["score"] = Difference(_tuned())
    return SelectConfig.named(name, **changes)


@functools.cache
def _tuned() -> nn.Module:
    model = llama()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            p.view(-1)[::2] += 0.1 * (torch.rand(p.view(-1)[::2].shape, generator=generator) + 0.1)
    return model


def made(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, data = model_for(name, DATA)
    return model, data[:2]


@functools.cache
def mask_of(name: str) -> Mask:
    model, data = made(name)
    return select(model, config_of(name), data)


def ranked(name: str) -> bool:
    """Whether anything is chosen by the order of scores."""
    config = config_of(name)
    by_order = config.direction in ("top", "bottom") and config.anything_competes()
    return by_order and config.score is not None


def by_gates(name: str) -> bool:
    return isinstance(config_of(name).score, LearnedGates)


def breaks_ties(name: str) -> bool:
    config = config_of(name)
    in_order = config.threshold is None and config.quantile is None and config.quota == "size"
    return ranked(name) and in_order


def by_values(name: str) -> bool:
    """Whether a selection follows the values of scores alone, and not where they are."""
    config = config_of(name)
    by_place = isinstance(as_score(config.score or "random"), Constant | Stripes)
    return ranked(name) and config.granularity != "block" and not by_place and not by_gates(name)


def flat(mask: Mask) -> Masks:
    return {n: set(s.flat().tolist()) for n, s in mask.items()}


def count_apart(a: Masks, b: Masks) -> int:
    return sum(len(a.get(n, set()) ^ b.get(n, set())) for n in a | b)


def given(values: Callable[[str, Tensor], Tensor]):
    """A score with given values for each parameter."""

    def score(model, eligible, data, loss_fn):
        return {n: values(n, c.param).float() for n, c in eligible.items()}

    return score


# --- deterministic --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_same_mask_from_the_same_inputs(name: str) -> None:
    """With other threads, another random state, another mode, and gradients in the way."""
    model, data = made(name)
    torch.manual_seed(123)
    model.train(not model.training)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = select(model, config_of(name), data)
    finally:
        torch.set_num_threads(threads)
    assert again == mask_of(name)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


def reordered(model: nn.Module) -> nn.Module:
    """The same model, in which the parts of each layer come in another order."""
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) and len(module._modules) > 1:
            for key in list(module._modules)[::-1]:
                module._modules[key] = module._modules.pop(key)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_parameters_does_not_matter_where_scores_differ(name: str) -> None:
    model, data = made(name)
    config, other = config_of(name), reordered(model)
    names = [n for n, _ in other.named_parameters()]
    assert names != [n for n, _ in made(name)[0].named_parameters()]
    apart = count_apart(flat(select(other, config, data)), flat(mask_of(name)))
    # gates are trained with a penalty, whose sum in another order has other roundings
    assert apart <= (ONE_PAIR if by_gates(name) else 0)


# --- ties, permutations, batches ------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if breaks_ties(n)])
def test_equal_scores_go_to_the_lowest_positions(name: str) -> None:
    config = config_of(name)
    model, data = made(name)
    at, start = {}, 0
    for n, p in model.named_parameters():
        at[n], start = start, start + p.numel()
    sign = 1.0 if config.direction == "bottom" else -1.0

    def place(n: str, p: Tensor) -> Tensor:
        return 2.0**20 + sign * (at[n] + torch.arange(p.numel())).view(p.shape)

    masks = [
        flat(select(model, SelectConfig.named(name, **_but_score(config), score=score), data))
        for score in (Constant(), given(place))
    ]
    assert masks[0] == masks[1]


def _but_score(config: SelectConfig) -> dict[str, object]:
    names = ("k", "lora_rank", "block_size", "exclude_modules")
    return {n: getattr(config, n) for n in names if getattr(config, n) is not None}


@pytest.mark.parametrize(
    "name", [n for n in NAMES if ranked(n) and config_of(n).granularity != "block"]
)
def test_scores_that_are_permuted_permute_the_mask(name: str) -> None:
    config = config_of(name)
    model, data = made(name)
    values, order = {}, {}
    for i, (n, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(i)
        values[n] = torch.rand(p.shape, generator=generator)
        order[n] = torch.randperm(p.shape[0], generator=generator)
    fields = _but_score(config) | {"score": given(lambda n, p: values[n])}
    if config.threshold is not None:
        fields["threshold"] = 0.5
    one = select(model, SelectConfig.named(name, **fields), data)
    fields["score"] = given(lambda n, p: values[n][order[n]])
    other = select(model, SelectConfig.named(name, **fields), data)
    competing = {n for n, c in candidates(model, config).items() if c.state == "masked"}
    assert competing & set(one) or config.polarity == "freeze"
    for n, p in model.named_parameters():
        masks = []
        for mask in (one, other):
            chosen = torch.zeros(p.numel(), dtype=torch.bool)
            if n in mask:
                chosen[mask[n].flat().long()] = True
            masks.append(chosen.view(p.shape))
        assert torch.equal(masks[1], masks[0][order[n]]), n


def swapped(model: nn.Module, order: Tensor) -> nn.Module:
    """The same function with the neurons of each MLP in another order."""
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight.data = part.weight.data[order].clone()
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order].clone()
    return model


@pytest.mark.parametrize("name", [n for n in NAMES if by_values(n) and n not in OTHERS])
def test_neurons_in_another_order_are_selected_all_the_same(name: str) -> None:
    """Up to scores that are equal but for the rounding of sums in another order."""
    config = config_of(name)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    if isinstance(config.score, Difference):
        config = SelectConfig.named(name, score=Difference(swapped(copy.deepcopy(_tuned()), order)))
    model, data = made(name)
    other = select(swapped(model, order), config, data)
    apart = 0
    for n, p in model.named_parameters():
        masks = []
        for mask in (mask_of(name), other):
            chosen = torch.zeros(p.numel(), dtype=torch.bool)
            if n in mask:
                chosen[mask[n].flat().long()] = True
            masks.append(chosen.view(p.shape))
        if n.endswith(("gate_proj.weight", "up_proj.weight")):
            masks[0] = masks[0][order]
        elif n.endswith("down_proj.weight"):
            masks[0] = masks[0][:, order]
        apart += int((masks[0] != masks[1]).sum())
    assert apart <= ONE_PAIR


def by_sample(score: object) -> bool:
    if isinstance(score, HardExamples):
        return by_sample(score.score)
    return isinstance(score, GradStat) and score.level == "sample" and not score.training


@pytest.mark.parametrize("name", [n for n in NAMES if by_sample(config_of(n).score)])
def test_how_samples_are_cut_into_batches_does_not_matter(name: str) -> None:
    """Nor their order; up to roundings, as above."""
    model, data = made(name)
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in data for i in range(8)]
    config = config_of(name)
    for batches in (singles, singles[::-1]):
        other = flat(select(model, config, batches))
        assert count_apart(other, flat(mask_of(name))) <= ONE_PAIR


def test_there_are_scores_of_samples() -> None:
    found = {n for n in NAMES if by_sample(config_of(n).score)}
    assert {"fish", "fish-epochs", "fishdip", "tr-pts"} <= found


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if "score" in recipes.info(n).config])
def test_a_score_that_is_nan_is_named(name: str) -> None:
    model, data = made(name)
    config = config_of(name)
    bad = [n for n, c in candidates(model, config).items() if c.state == "masked"][-1]

    def values(n: str, p: Tensor) -> Tensor:
        score = torch.rand(p.shape, generator=torch.Generator().manual_seed(0))
        if n == bad:
            score.view(-1)[-1] = float("nan")
        return score

    layer = candidates(model, config)[bad].layer
    with pytest.raises(ScoreError, match=f"{bad}|{layer}"):
        select(model, SelectConfig.named(name, **_but_score(config), score=given(values)), data)


@pytest.mark.parametrize("name", [n for n in NAMES if "density" in recipes.info(n).config])
def test_a_budget_of_nothing_is_an_error_or_only_what_is_whole(name: str) -> None:
    model, data = made(name)
    fields = {"density": 1e-9}
    config = config_of(name)
    found = candidates(model, config)
    whole = {n for n, c in found.items() if c.state == "full"}
    if config.score is not None:
        fields["score"] = Constant()
    tiny_budget = SelectConfig.named(name, **fields)
    if config.polarity == "freeze":
        mask = select(model, tiny_budget, data)  # freezes nothing
        assert set(mask) == {n for n, c in found.items() if c.state != "frozen"}
    elif whole and config.counted_in_budget is not True:
        mask = select(model, tiny_budget, data)
        assert set(mask) == whole and all(s.kind == "all" for s in mask.values())
    else:
        with pytest.raises(BudgetError, match=r"selects nothing|is used up"):
            select(model, tiny_budget, data)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_frozen_bits_and_files_in_bfloat16(name: str, tmp_path) -> None:
    """Off the mask nothing moves under momentum and decay; a saved delta gives the tuned bits again."""
    model, data = made(name)
    mask = mask_of(name)
    model.to(torch.bfloat16)
    data = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in data]
    base = copy.deepcopy(model)
    before = snapshot(model)
    model.eval()
    with torch.no_grad():
        first = model(**data[0]).logits
    optimizer = retouch.wrap(torch.optim.SGD, mask, model, lr=0.5, momentum=0.9, weight_decay=0.1)
    with torch.no_grad():
        assert torch.equal(bits(model(**data[0]).logits), bits(first))  # step 0 is the identity
    for _ in range(5):
        for batch in data:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_frozen(before, model, mask)
    delta = retouch.Delta.from_model(model)
    retouch.unwrap(model)
    tuned = snapshot(model)
    delta.save_pretrained(tmp_path / "delta")
    saved = retouch.Delta.load(tmp_path / "delta")
    saved.apply_(base)
    assert_same(snapshot(base), tuned)
    delta.revert_(base)
    assert_same(snapshot(base), before)


@pytest.mark.parametrize("name", MOVING)
def test_a_change_never_moves_what_is_off_in_both_masks(name: str) -> None:
    model, data = made(name)
    config = SelectConfig.named(name, **BUDGETS[name][1], schedule=SHORT[name])
    reads = getattr(config.score, "needs_data", False) and not config.schedule.collect
    reads = {"data": data} if reads else {}
    model.eval()
    with torch.no_grad():
        first = model(**data[0]).logits
    optimizer = retouch.wrap(
        retouch.SGD if config.schedule.state != "seeded" else retouch.AdamW,
        config, model, lr=1e-2, weight_decay=0.1, **reads,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(bits(model(**data[0]).logits), bits(first))
    engine = retouch.get_engine(model)
    for step in range(10):
        if engine.mover.finished:
            break
        held, mask = snapshot(model), flat(engine.mask)
        model(**data[step % 2]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            engine.mover.new_epoch()
        after = flat(engine.mask)
        for n, p in own(model):
            changed = (bits(p) != bits(held[n])).flatten().nonzero().flatten().tolist()
            assert set(changed) <= mask.get(n, set()) | after.get(n, set()), (n, step)
    retouch.verify_untouched(model)
