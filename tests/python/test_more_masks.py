"""Masks of tokens and of pruned models, and the recipes by chance and by a probe."""

import json
import math

import pytest
import tiny
import torch
from tiny_hf import llama, tokenizer
from tiny_hf import tokens as samples
from training import assert_frozen, snapshot

import retouch
from retouch import Mask, SelectConfig, recipes, select
from retouch.errors import HyperparameterError, MaskError, ScoreError
from retouch.scores import Magnitude, Probe, SoftRank


def train(model, mask: Mask, steps: int = 4) -> None:
    optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=2e-2, weight_decay=0.1)
    for sample in samples(steps):
        model(**{k: v[None] for k, v in sample.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    retouch.verify_untouched(model)
    retouch.unwrap(model)


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_are_rows_of_both_tables() -> None:
    model = llama()
    mask = Mask.from_tokens(model, ["w7", 5, "<s>", 5], tokenizer())
    assert set(mask) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(s.kind == "rows" and s.index.tolist() == [1, 5, 7] for s in mask.values())
    before = snapshot(model)
    train(model, mask)
    assert_frozen(before, model, mask)
    moved = (model.lm_head.weight != before["lm_head.weight"]).any(1).nonzero().flatten()
    assert moved.tolist() == [1, 5, 7]


def test_tied_tables_count_once() -> None:
    model = tiny.gpt2()
    mask = Mask.from_tokens(model, [3])
    assert set(mask) == {"transformer.wte.weight"} and mask.count == 16
    rest = select(model, SelectConfig(target_modules=[], embeddings="full")) - mask
    assert rest.count == (tiny.VOCABULARY - 1) * 16 + 16 * 16  # and the positions


def test_errors_of_tokens_say_what_is_unknown() -> None:
    model = llama()
    with pytest.raises(MaskError, match="unknown: 'w1000'; got the tokenizer"):
        Mask.from_tokens(model, ["w5", "w1000"], tokenizer())
    with pytest.raises(MaskError, match="unknown: 'w5'; got no tokenizer"):
        Mask.from_tokens(model, ["w5"])
    for bad in (97, -1):
        with pytest.raises(MaskError, match=r"embed_tokens.weight has 97 rows"):
            Mask.from_tokens(model, [4, bad])
    with pytest.raises(MaskError, match="Linear names no input embedding"):
        Mask.from_tokens(torch.nn.Linear(2, 2), [0])


# --- pruned models --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pattern_of_a_pruned_model_survives_training(dtype: torch.dtype) -> None:
    model = llama(dtype)
    kept = select(model, "magnitude", k=2, scope="group", group_size=4)
    with torch.no_grad():
        for name, s in kept.items():
            p = model.get_parameter(name)
            keep = torch.zeros(p.numel(), dtype=torch.bool)
            keep[s.flat().long()] = True
            p.mul_(keep.view_as(p))
    before = snapshot(model)
    mask = Mask.nonzero(model)
    assert mask == kept
    train(model, mask)
    assert_frozen(before, model, mask)
    for name in kept:
        weight, old = model.get_parameter(name), before[name]
        groups = (weight.view(-1, 4) != 0).sum(1)
        assert int(groups.max()) <= 2
        # bit for bit: also the sign of a zero
        zeros = old == 0
        assert torch.equal(torch.signbit(weight[zeros]), torch.signbit(old[zeros]))
        assert not torch.equal(weight, old)
    few = Mask.nonzero(model, ["o_proj"])
    assert set(few) == {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
    with pytest.raises(HyperparameterError, match="matches nothing"):
        Mask.nonzero(model, ["nothing"])


def test_indices_of_the_user() -> None:
    model = llama()
    name = "model.layers.0.self_attn.o_proj.weight"
    assert Mask.from_indices({name: [9, 2, 9]}, model)[name].flat().tolist() == [2, 9]
    for bad, message in (
        ({name: [-1]}, "goes from -1 to -1"), ({name: [1024]}, "wanted 0 to 1023"),
        ({"o_proj": [1]}, "has no parameter 'o_proj'"), ({name: [0.5]}, "wanted integers"),
    ):  # fmt: skip
        with pytest.raises(MaskError, match=message):
            Mask.from_indices(bad, model)


# --- RoAST ----------------------------------------------------------------------------------------


def expected_density(alpha: float, beta: float) -> float:
    """The mean of the probabilities over ranks from 0 to 1."""
    top = math.log1p(math.exp(2 * beta * (1 - alpha)))
    return (top - math.log1p(math.exp(-2 * beta * alpha))) / (2 * beta)


@pytest.mark.parametrize(("alpha", "beta", "wanted"), [(0.9, 10.0, 0.106), (0.6, 1.0, 0.454)])
def test_roast_draws_as_many_as_its_formula_says(alpha, beta, wanted) -> None:
    assert abs(expected_density(alpha, beta) - wanted) < 5e-4
    model = llama()
    score = SoftRank(Magnitude(), alpha, beta)
    counts = [
        select(model, SelectConfig(score=score, direction="bernoulli", seed=seed)).count / 15360
        for seed in range(4)
    ]
    spread = math.sqrt(wanted * (1 - wanted) / 15360)
    assert all(abs(c - expected_density(alpha, beta)) < 5 * spread for c in counts)
    assert len(set(counts)) > 1


def test_soft_ranks() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(11, 1, bias=False), torch.nn.Linear(1, 1))
    model[0].weight.data = torch.arange(11.0).flip(0)[None]
    config = SelectConfig(score="magnitude", density=1.0)
    eligible = {
        n: c for n, c in retouch.eligible.candidates(model, config).items() if c.state == "masked"
    }
    p = SoftRank(Magnitude(), 0.9, 10.0)(model, eligible)["0.weight"].flatten()
    assert p[1] == 0.5 and abs(float(p[0]) - 1 / (1 + math.exp(-2.0))) < 1e-6  # ranks 0.9 and 1
    assert bool((p.diff() < 0).all())
    hard = select(
        model, SelectConfig(score=SoftRank(Magnitude(), 0.75, 1e6), direction="bernoulli")
    )
    assert hard == select(model, SelectConfig(score="magnitude", k=3))  # ranks 0.8, 0.9 and 1
    for bad in ({"alpha": 2.0, "beta": 1.0}, {"alpha": 0.5, "beta": 0.0}):
        with pytest.raises(HyperparameterError, match="SoftRank"):
            SoftRank("magnitude", **bad)
    assert (
        not SoftRank("magnitude", 0.5, 1.0).needs_data and SoftRank("fisher", 0.5, 1.0).needs_data
    )


# --- Model Surgery --------------------------------------------------------------------------------


def test_model_surgery_oracle() -> None:
    model = torch.nn.Module()
    model.gate_proj = torch.nn.Linear(2, 3, bias=False)
    model.head = torch.nn.Linear(1, 1)
    model.gate_proj.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    vector, alpha = torch.tensor([1.0, 0.0]), 0.25
    mask = select(model, "model-surgery", k=1, score=Probe(vector))
    s = mask["gate_proj.weight"]
    assert s.kind == "rows" and s.index.tolist() == [1]
    model.gate_proj.weight.data[s.index] += alpha * vector
    assert model.gate_proj.weight[1].tolist() == [-0.75, 0.0]
    with pytest.raises(ScoreError, match="needs a direction"):
        select(model, "model-surgery", k=1)
    with pytest.raises(ScoreError, match="has 2 input features, the probe 3"):
        select(model, "model-surgery", k=1, score=Probe([1.0, 2.0, 3.0]))
    for bad in ([0.0, 0.0], [[1.0]], [float("nan")]):
        with pytest.raises(HyperparameterError, match="Probe: a vector of shape"):
            Probe(bad)
    config = SelectConfig(score=Probe([1, 2]), density=0.5)
    assert SelectConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_probe_does_not_mind_lengths_or_storage() -> None:
    linear = tiny.LikeGPT2(tiny.gpt2())
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    fields = {"granularity": "row", "density": 0.2, "target_modules": ["c_fc"]}  # 25 rows of 128
    masks = [
        select(m, SelectConfig(score=Probe(scale * vector), **fields))
        for m, scale in ((tiny.gpt2(), 1.0), (tiny.gpt2(), 7.0))
    ]
    assert masks[0] == masks[1]
    rows = select(linear, SelectConfig(score=Probe(vector), **fields))
    inside, outside = [], []
    for name, s in rows.items():
        weight = linear.get_parameter(name).detach()
        cosines = torch.nn.functional.cosine_similarity(weight, vector[None])
        rest = torch.ones(len(cosines), dtype=torch.bool)
        rest[s.index.long()] = False
        inside.append(cosines[s.index.long()])
        outside.append(cosines[rest])
        other = masks[0][name if name in masks[0] else f"transformer.{name}"]
        assert other.kind == "columns" and other.index.tolist() == s.index.tolist()
    assert float(torch.cat(inside).min()) > float(torch.cat(outside).max())


# --- HFT ------------------------------------------------------------------------------------------


def test_hft_oracle() -> None:
    model = llama(num_hidden_layers=4)
    mask = select(model, "hft")
    frozen = {n for n, _ in model.named_parameters()} - set(mask)
    assert all(s.kind == "all" for s in mask.values())

    def count(layer: int, part: str) -> int:
        return sum(n.startswith(f"model.layers.{layer}.") and part in n for n in frozen)

    assert [count(i, "self_attn") for i in range(4)] == [2] * 4
    assert [count(i, "layernorm") for i in range(4)] == [1] * 4
    assert sorted(count(i, "mlp") for i in range(4)) == [1, 1, 2, 2]  # 1.5 a layer
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(mask)
    odd = select(llama(num_hidden_layers=3), "hft")
    assert sum("mlp" in n for n in odd) == 9 - 4  # one layer of three freezes two
    assert mask != select(model, "hft", seed=1)


def test_hft_by_layer_and_by_model() -> None:
    model = llama(num_hidden_layers=4)
    every = {n for n, _ in model.named_parameters()}
    frozen = every - set(select(model, "hft-layer"))
    assert len({n.split(".")[2] for n in frozen}) == 2 and len(frozen) == 2 * 9
    frozen = every - set(select(model, "hft-model"))
    assert len(frozen) == (4 * 9 + 1) // 2 and not {"lm_head.weight"} & frozen
    assert recipes.info("hft").budget == "density=0.5 frozen"
