"""Freezing instead of training, quantiles, ties, draws, experts, siblings: ways to choose beyond the top."""

import math
from fractions import Fraction

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import retouch
from retouch import SelectConfig, ops, order, select
from retouch.errors import BudgetError, HyperparameterError, ScoreError
from retouch.quotas import shares


def scored(*values: Tensor):
    """A model of one weight per tensor, and a score that has these values."""
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.Linear(v.shape[-1], v.reshape(-1, v.shape[-1]).shape[0], bias=False) for v in values
    )
    model.head = nn.Linear(1, 1)

    def score(model, eligible, data, loss_fn):
        found = [v.reshape(-1, v.shape[-1]).float() for v in values]
        return dict(zip(eligible, found, strict=True))

    return model, score


def chosen(mask: retouch.Mask, layer: int = 0) -> list[int]:
    name = f"layers.{layer}.weight"
    return mask[name].flat().tolist() if name in mask else []


# --- polarity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"density": 0.3}, {"k": 7, "granularity": "row", "scope": "tensor"}, {"k_per_row": 2},
        {"density": 0.4, "granularity": "column"}, {"threshold": 0.5},
        {"density": 0.5, "granularity": "tensor"}, {"k": 2, "scope": "group", "group_size": 4},
        {"density": 0.2, "direction": "random"}, {"k": 1, "granularity": "layer"},
    ],
)  # fmt: skip
def test_freeze_is_the_rest_of_what_competes(fields) -> None:
    model = tiny.llama()
    settings = {"score": "magnitude", "norms": "full"} | fields
    if settings.get("direction") == "random":
        del settings["score"]
    if "threshold" in settings:
        settings["threshold"] = 0.02
    trained, frozen = (
        select(model, SelectConfig(**settings, polarity=p)) for p in ("train", "freeze")
    )
    every = select(model, SelectConfig(direction="random", density=1.0, norms="full"))
    norms = select(model, SelectConfig(target_modules=[], norms="full"))
    assert (trained & frozen) == norms and (trained | frozen) == every
    assert trained.count + frozen.count == every.count + norms.count


def test_freezing_everything_is_an_error() -> None:
    with pytest.raises(BudgetError, match="freezes all of"):
        select(tiny.llama(), "magnitude", density=1.0, polarity="freeze")


# --- quantiles and ties ----------------------------------------------------------------------------------


def test_psmt_quantile_oracle() -> None:
    model, score = scored(torch.arange(60.0)[None], torch.arange(60.0, 101)[None])
    low = {"score": score, "direction": "bottom"}
    mask = select(model, SelectConfig(**low, quantile=0.03))  # q = 3.0: strictly below are 0, 1, 2
    assert chosen(mask, 0) == [0, 1, 2] and chosen(mask, 1) == []
    assert chosen(select(model, SelectConfig(**low, quantile=0.035))) == [0, 1, 2, 3]  # q = 3.5
    rest = select(model, SelectConfig(**low, quantile=0.03, polarity="freeze"))
    assert rest.count == 101 - 3
    top = select(model, SelectConfig(score=score, quantile=0.97))  # q = 97.0: above are 98, 99, 100
    assert chosen(top, 0) == [] and chosen(top, 1) == [38, 39, 40]
    each = select(model, SelectConfig(**low, quantile=0.5, scope="tensor"))
    assert chosen(each, 0) == list(range(30)) and chosen(each, 1) == list(range(20))
    assert select(model, SelectConfig(**low, quantile=0.0, polarity="freeze")).count == 101
    with pytest.raises(BudgetError, match=r"quantile=1.0\) selects nothing"):
        select(model, SelectConfig(score=score, quantile=1.0))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_quantiles_are_those_of_numpy(largest: bool, forced: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(17, 5, generator=generator), torch.randn(40, generator=generator).round()]
    flat = torch.cat([v.flatten() for v in values]).double()
    for q in (0.0, 0.013, 0.25, 0.5, 0.7, 0.99, 1.0):
        bound = torch.quantile(flat, q)
        wanted = (flat > bound) if largest else (flat < bound)
        if forced:
            with ops.force_torch():
                found = order.below_quantile(values, "ab", q, largest=largest, absolute=False)
        else:
            found = order.below_quantile(values, "ab", q, largest=largest, absolute=False)
        got = torch.cat([found[0], found[1] + 85])
        assert torch.equal(got.long(), wanted.nonzero().squeeze(1)), q


def test_ties_can_overshoot() -> None:
    model, score = scored(torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]]), torch.tensor([[2.0, 0.0]]))
    exact = select(model, SelectConfig(score=score, k=2))
    assert chosen(exact, 0) == [0, 2] and chosen(exact, 1) == []
    over = select(model, SelectConfig(score=score, k=2, ties="all"))
    assert chosen(over, 0) == [0, 2, 3, 4] and chosen(over, 1) == [0]
    low = select(model, SelectConfig(score=score, k=3, ties="all", direction="bottom"))
    assert chosen(low, 0) == [1, 2, 3, 4] and chosen(low, 1) == [0, 1]
    own = select(model, SelectConfig(score=score, density=0.5, ties="all", scope="tensor"))
    assert chosen(own, 0) == [0, 2, 3, 4] and chosen(own, 1) == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantile": 1.5}, r"quantile=1.5; wanted a fraction in \[0, 1\]"),
        ({"quantile": 0.5, "scope": "row"}, "quantile with scope='row'"),
        ({"quantile": 0.5, "density": 0.5}, "density and quantile"),
        ({"threshold": 1.0, "ties": "all"}, "ties='all' needs density, k or lora_rank"),
        ({"k_per_row": 1, "ties": "all"}, "ties='all' needs"),
        ({"density": 0.5, "polarity": "thaw"}, "polarity='thaw'; wanted one of train, freeze"),
        ({"density": 0.5, "direction": "bernoulli"}, "so no density: leave it out"),
        ({"direction": "bernoulli", "scope": "tensor"}, "the same everywhere"),
        ({"direction": "weighted", "threshold": 0.5}, "ranks nothing, so no threshold"),
        ({"density": 0.5, "scope": "siblings"}, "granularity='element' with scope='siblings'"),
        ({"density": 0.5, "quota": "score"}, "quota='score' shares a density among tensors"),
        ({"k": 5, "scope": "tensor", "quota": "score"}, "quota='score' shares a density"),
        ({"density": 0.5, "quota": "rank"}, "quota='rank'; wanted one of size, score"),
        (
            {"density": 0.5, "polarity": "freeze", "heads": "full", "counted_in_budget": True},
            "counted_in_budget needs",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(fields, message: str) -> None:
    with pytest.raises(HyperparameterError, match=message):
        SelectConfig(score="magnitude", **fields)


# --- quotas by score ---------------------------------------------------------------------------------------


def test_the_oracle_of_snella() -> None:
    """Scores (1, 1, 2), sizes (10, 100, 100), 100 in all: what is over 10 goes to the others 1:2."""
    assert shares([1.0, 1.0, 2.0], [10, 100, 100], 100) == [10, 30, 60]
    values = [
        torch.linspace(0.5, 1.5, 10),
        torch.linspace(0.5, 1.5, 100),
        torch.linspace(1.0, 3.0, 100),
    ]
    model, score = scored(*values)
    config = SelectConfig(score=score, density=0.477, scope="tensor", quota="score")  # 100 of 210
    mask = select(model, config)
    assert [len(chosen(mask, i)) for i in range(3)] == [10, 30, 60]
    assert chosen(mask, 1) == list(range(70, 100)) and chosen(mask, 2) == list(range(40, 100))
    even = select(model, SelectConfig(score=score, density=0.477, scope="tensor"))
    assert [len(chosen(even, i)) for i in range(3)] == [4, 47, 47]


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=8),
    st.integers(0, 250),
)
def test_shares_spend_the_total_in_proportion(groups, total: int) -> None:
    weights, most = [w for w, _ in groups], [m for _, m in groups]
    found = shares(weights, most, total)
    assert sum(found) == min(total, sum(most))
    assert all(0 <= f <= m for f, m in zip(found, most, strict=True))
    free = [i for i in range(len(groups)) if found[i] < most[i]]
    for i in free:
        for j in free:  # in proportion to the weights, but for the unit that is rounded
            assert (found[i] - 1) * Fraction(weights[j]) <= (found[j] + 1) * Fraction(weights[i])


def test_pinned_scores_are_in_the_share_of_their_group() -> None:
    inf = math.inf
    model, score = scored(
        torch.tensor([inf, inf, 1.0, 1.0]), torch.tensor([5.0, 5.0, 5.0, -inf]), torch.zeros(4)
    )
    config = SelectConfig(score=score, density=0.5, scope="tensor", quota="score")
    mask = select(model, config)  # 6: two are given, and of 4 more 1:5 are 0.7 and 3.3, at most 3
    assert [chosen(mask, i) for i in range(3)] == [[0, 1, 2], [0, 1, 2], []]
    few = select(model, config, density=0.1)
    assert few.count == 1 and chosen(few, 0) == [0]
    below, bad = scored(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, float("nan")]))
    with pytest.raises(ScoreError, match=r"layers.0.weight have the mean -1.5"):
        select(below, SelectConfig(score=bad, density=0.5, scope="tensor", quota="score"))
    nan, bad = scored(torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]))
    with pytest.raises(ScoreError, match=r"layers.1.weight.*NaN"):
        select(nan, SelectConfig(score=bad, density=0.5, scope="tensor", quota="score"))


# --- ranks and draws ---------------------------------------------------------------------------------------


def literal_ranks(values: list[Tensor]) -> Tensor:
    flat = torch.cat([v.flatten() for v in values]).double()
    less = (flat[None] < flat[:, None]).sum(1)
    same = (flat[None] == flat[:, None]).sum(1)
    return ((less + (same - 1) / 2) / (len(flat) - 1)).float()


@pytest.mark.parametrize("limit", [2**24, 64, 8, 1])
def test_ranks_are_exact_however_they_are_counted(limit: int, monkeypatch) -> None:
    monkeypatch.setattr(order, "_RANGE", limit)
    monkeypatch.setattr(order, "_CHUNK", 50)
    generator = torch.Generator().manual_seed(3)
    values = [
        torch.randn(9, 20, generator=generator) ** 3,
        torch.tensor([0.0, -0.0, 0.0, 1e-45, -1e-45, float("inf"), -float("inf"), 1e38]),
        1 + torch.randint(0, 5, (60,), generator=generator) * 2**-20,
    ]
    found = order.relative_ranks(values, ["a", "b", "c"])
    assert [f.shape for f in found] == [v.shape for v in values]
    assert torch.equal(torch.cat([f.flatten() for f in found]), literal_ranks(values))
    with pytest.raises(ScoreError, match="of b is NaN"):
        order.relative_ranks([values[0], torch.tensor([float("nan")])], ["a", "b"])
    assert order.relative_ranks([torch.tensor([5.0])], ["a"])[0].tolist() == [1.0]


def test_weighted_draws_are_in_proportion() -> None:
    model, score = scored(torch.tensor([[1.0, 2.0, 0.0, 5.0]]))
    first, pairs = torch.zeros(4), 0
    for seed in range(2000):
        config = SelectConfig(score=score, direction="weighted", k=1, seed=seed)
        first[chosen(select(model, config))[0]] += 1
        two = SelectConfig(score=score, direction="weighted", k=2, seed=seed)
        pairs += chosen(select(model, two)) == [1, 3]
    assert first[2] == 0
    wanted = torch.tensor([1, 2, 0, 5]) / 8
    assert ((first / 2000 - wanted).abs() < 4 * (wanted * (1 - wanted) / 2000).sqrt() + 1e-9).all()
    p = 2 / 8 * 5 / 6 + 5 / 8 * 2 / 3  # one after the other, without replacement
    assert abs(pairs / 2000 - p) < 4 * math.sqrt(p * (1 - p) / 2000)
    with pytest.raises(BudgetError, match="cannot draw 4 elements: only 3 have a score above 0"):
        select(model, SelectConfig(score=score, direction="weighted", k=4))
    model, score = scored(torch.tensor([[1.0, -2.0]]))
    with pytest.raises(ScoreError, match=r"layers.0.weight is negative"):
        select(model, SelectConfig(score=score, direction="weighted", k=1))


def test_weighted_draws_of_layers_and_in_rows() -> None:
    model, score = scored(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3))
    config = SelectConfig(score=score, direction="weighted", granularity="layer", k=1)
    assert all(set(select(model, config, seed=s)) == {"layers.1.weight"} for s in range(20))
    model, score = scored(torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]))
    seen = {
        tuple(
            chosen(
                select(model, SelectConfig(score=score, direction="weighted", k_per_row=1), seed=s)
            )
        )
        for s in range(60)
    }
    assert seen == {(a, b) for a in (1, 2) for b in (3, 4)}


def test_bernoulli_draws_each_on_its_own() -> None:
    model, score = scored(torch.full((100, 100), 0.25), torch.tensor([[0.0, 1.0]]))
    mask = select(model, SelectConfig(score=score, direction="bernoulli"))
    share = len(chosen(mask, 0)) / 10_000
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 10_000) and chosen(mask, 1) == [1]
    assert mask == select(model, SelectConfig(score=score, direction="bernoulli"))
    assert mask != select(model, SelectConfig(score=score, direction="bernoulli", seed=1))
    model, score = scored(torch.tensor([[0.5, 1.5]]))
    with pytest.raises(ScoreError, match=r"layers.0.weight is not within \[0, 1\]"):
        select(model, SelectConfig(score=score, direction="bernoulli"))


# --- experts and siblings ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.quiet_gpt_oss])
def test_experts_are_taken_whole(make) -> None:
    model = make()
    fused = {n: p for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    with torch.no_grad():
        for p in fused.values():
            p[1] *= 5
    names = list(fused)
    config = SelectConfig(score="magnitude", granularity="expert", k=1, target_modules=names)
    mask = select(model, config)
    assert set(mask) == set(fused)
    for name, s in mask.items():
        assert s.kind == "rows" and s.index.tolist() == [1] and s.count == fused[name][0].numel()
    everything = select(model, config, k=3)
    assert all(s.kind == "all" for s in everything.values())
    drawn = SelectConfig(direction="random", granularity="expert", k=2, target_modules=names)
    picked = {tuple(select(model, drawn, seed=s)[names[0]].index.tolist()) for s in range(30)}
    assert picked == {(0, 1), (0, 2), (1, 2)}
    first = select(model, drawn)
    assert len({tuple(s.index.tolist()) for s in first.values()}) == 1  # one expert, all its parts
    with pytest.raises(HyperparameterError, match="holds no fused experts"):
        select(model, SelectConfig(score="magnitude", granularity="expert", k=1))


def test_biases_of_experts_go_with_them() -> None:
    model = tiny.quiet_gpt_oss()
    names = [n for n, _ in model.named_parameters() if ".experts." in n]
    assert any(n.endswith("_bias") for n in names)
    config = SelectConfig(direction="random", granularity="expert", k=1, target_modules=names)
    mask = select(model, config)
    assert set(mask) == set(names) and len({int(s.index[0]) for s in mask.values()}) == 1


def test_the_rest_of_siblings_goes_to_other_layers_by_chance() -> None:
    model = tiny.llama()
    base = {"granularity": "tensor", "scope": "siblings", "direction": "random"}
    seen = set()
    for seed in range(12):
        mask = select(model, SelectConfig(**base, density=0.5, norms="masked", seed=seed))
        count = {
            (i, part): sum(n.startswith(f"model.layers.{i}.{part}") for n in mask)
            for i in range(2) for part in ("self_attn", "mlp", "input_layernorm", "post_attention")
        }  # fmt: skip
        assert count[0, "self_attn"] == count[1, "self_attn"] == 2
        assert {count[0, "mlp"], count[1, "mlp"]} == {1, 2}
        assert all(count[i, "input_layernorm"] + count[i, "post_attention"] == 1 for i in range(2))
        seen.add((count[0, "mlp"], tuple(n for n in mask if "self_attn" in n)))
    assert {mlp for mlp, _ in seen} == {1, 2} and len({names for _, names in seen}) > 3
    two = select(model, SelectConfig(**base, k=2))
    assert len(two) == 2 * 4
