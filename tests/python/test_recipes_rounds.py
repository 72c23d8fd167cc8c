"""The oracles of the recipes that choose anew from data, and of those for PEFT models."""

import copy
import itertools
import math
import warnings
from dataclasses import replace

import peft
import pytest
import tiny
import torch
from tiny_hf import llama
from torch import Tensor, nn
from training import assert_same, bits, own, snapshot

import retouch
from retouch import Schedule, SelectConfig, recipes, select
from retouch.eligible import candidates
from retouch.errors import HyperparameterError, ScoreError
from retouch.quotas import shares
from retouch.scores import CosineGap, Fisher, HardExamples, Outliers, RowColumn, Wanda

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def of(score, model: nn.Module, data=None, **changes) -> dict[str, Tensor]:
    config = SelectConfig(**{"score": "magnitude", "density": 1.0} | changes)
    eligible = {n: c for n, c in candidates(model, config).items() if c.state == "masked"}
    return score(model, eligible, data, None)


def run(model: nn.Module, config, batches, steps: int, lr=1e-2, **reads) -> list[retouch.Mask]:
    """The mask of each step."""
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=lr, weight_decay=0.1, **reads)
    masks = []
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(retouch.get_engine(model).mask)
    return masks


def positions(mask: retouch.Mask) -> set[tuple[str, int]]:
    return {(n, int(i)) for n, s in mask.items() for i in s.flat()}


# --- FISH-DIP -------------------------------------------------------------------------------------


def test_hard_examples_are_those_with_the_largest_losses() -> None:
    model = tiny.bert()
    data = [tiny.labelled(5, seed=i) for i in range(4)]
    model.eval()
    with torch.no_grad():
        losses = torch.stack(
            [
                model(input_ids=i[None], labels=t[None]).loss
                for b in data
                for i, t in zip(b["input_ids"], b["labels"], strict=True)
            ]
        )
    ids = torch.cat([b["input_ids"] for b in data])
    labels = torch.cat([b["labels"] for b in data])
    worst = losses.topk(6).indices.sort().values
    want = of(Fisher(), model, [{"input_ids": ids[worst], "labels": labels[worst]}])
    model.train()
    for batches in (data, [{"input_ids": ids, "labels": labels}]):
        for name, found in of(HardExamples(Fisher(), 6), model, batches).items():
            torch.testing.assert_close(found, want[name], rtol=1e-4, atol=1e-10)
    assert model.training
    every = of(HardExamples(Fisher(), 99), model, data)
    for name, found in of(Fisher(), model, data).items():
        torch.testing.assert_close(every[name], found, rtol=1e-4, atol=1e-10)
    with pytest.raises(HyperparameterError, match="samples=0"):
        HardExamples(Fisher(), 0)
    with pytest.raises(ScoreError, match="needs data"):
        of(HardExamples(Fisher()), model)


def test_equal_losses_go_to_the_first_sample() -> None:
    model = tiny.Dot(1, 2)  # every loss is 0 at weights of 0, the gradients differ
    data = [torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]])]
    found = of(HardExamples(Fisher(), 2), model, data, target_modules=None)
    assert found["layer.weight"].tolist() == [[5.0, 0.0]]


def test_fishdip_follows_what_the_model_does_worst() -> None:
    model = tiny.bert()
    data = [tiny.labelled(8, seed=i) for i in range(2)]
    config = SelectConfig.named(
        "fishdip", score=HardExamples(Fisher(), 3), schedule={"every": 2}, density=0.01
    )
    masks = run(model, config, data, 4, data=data)
    assert masks[0] != masks[1] == masks[2] and len({m.count for m in masks}) == 1


# --- OwLore ---------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers of one linear each."""

    def __init__(self, *weights: list[list[float]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(len(w[0]), len(w), bias=False) for w in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data = torch.tensor(weight)
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def test_outlier_ratios_by_hand() -> None:
    # |W| * norm of input, (1, 2): first layer (1, 2, 1, 20), mean 6; second (9, 2, 9, 2), mean 5.5
    model = Two([[1.0, 1.0], [-1.0, 10.0]], [[9.0, 1.0], [-9.0, 1.0]])
    data = [(torch.tensor([[1.0, 2.0]]),)]
    found = of(Outliers(Wanda(), 1.5), model, data)
    assert found["layers.0.weight"].tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert found["layers.1.weight"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    config = SelectConfig.named("owlore", score=Outliers(Wanda(), 1.5), k=1)
    config = SelectConfig(**{**config.to_dict(), "score": config.score, "modules_to_save": None})
    draws = [set(select(model, config, data, seed=seed)) for seed in range(600)]
    second = sum(d == {"layers.1.weight"} for d in draws) / 600  # ratios 1/4 and 1/2
    assert abs(second - 2 / 3) < 5 * math.sqrt(2 / 9 / 600)
    with pytest.raises(HyperparameterError, match="times=0"):
        Outliers(Wanda(), 0)
    with pytest.raises(ScoreError, match="NaN"):
        of(Outliers(lambda m, e, d, f: {n: c.param * float("nan") for n, c in e.items()}), model)


def test_owlore_draws_anew() -> None:
    data = [tiny.text(seed=i) for i in range(2)]
    config = SelectConfig.named("owlore", score=Outliers(Wanda(), 2.0), k=1, schedule={"every": 1})
    masks = run(llama(num_hidden_layers=6), config, data, 8, lr=0.0, data=data)
    assert len({frozenset(m) for m in masks}) > 2


# --- safety layers --------------------------------------------------------------------------------


class Stack(nn.Module):
    """Layers that pass on what they get; some add a direction that depends on the kind of prompt."""

    def __init__(self, layers: int, where: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        for i, layer in enumerate(self.layers):
            layer.weight.data = torch.eye(8)
            layer.bias.data.zero_()
            if i in where:  # feature 0 is the kind, and turns into feature i
                layer.weight.data[i, 0] = 1.0
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def prompts(kind: float, count: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(kind) + 7)
    x = torch.randn(count, 3, 8, generator=generator) * 0.1
    x[..., 7] += 4.0  # what all have in common
    x[..., 0] = kind
    return {"x": x}


def test_the_gap_appears_where_layers_tell_prompts_apart() -> None:
    """Layers 2 and 3 of 6 add a direction of the kind: the gap appears at 2 and is flat after 3."""
    model = Stack(6, (2, 3))
    normal, harmful = [prompts(0.0)], [prompts(3.0)]
    fields = {"target_modules": None, "heads": "frozen"}
    found = of(CosineGap(harmful), model, normal, **fields)
    growth = [float(found[f"layers.{i}.weight"][0, 0]) for i in range(6)]
    # literally: all pairs of last tokens
    x, y, before = normal[0]["x"], harmful[0]["x"], None
    for i in range(-1, 6):
        if i >= 0:
            x, y = model.layers[i](x).detach(), model.layers[i](y).detach()
        a, b = (nn.functional.normalize(t[:, -1].double(), dim=-1) for t in (x, y))
        alike = (a @ a.t())[~torch.eye(6, dtype=torch.bool)].mean()
        gap = float(torch.acos((a @ b.t()).mean()) - torch.acos(alike))
        assert before is None or growth[i] == pytest.approx(gap - before, abs=1e-6)
        before = gap
    assert min(growth[2], growth[3]) > 0.05
    assert max(abs(growth[i]) for i in (0, 1, 4, 5)) < 1e-6
    mask = select(
        model, "sppft-gap", data=normal, score=CosineGap(harmful), k=2, target_modules=None,
        heads="full", modules_to_save=None,
    )  # fmt: skip
    frozen = {n for n, _ in model.named_parameters()} - set(mask)
    assert frozen == {f"layers.{i}.{p}" for i in (2, 3) for p in ("weight", "bias")}
    few = of(CosineGap(harmful), model, normal, **fields, layers=[3])
    assert float(few["layers.3.weight"][0, 0]) == growth[3]


def test_padding_and_batches_do_not_change_the_gap() -> None:
    model = tiny.llama()
    ids = tiny.tokens(6)
    harmful = [{"input_ids": tiny.tokens(4, seed=1)}]
    target = {"target_modules": "all-linear"}
    whole = of(CosineGap(harmful), model, [{"input_ids": ids}], **target)
    padded = nn.functional.pad(ids, (0, 3))
    mask = nn.functional.pad(torch.ones_like(ids), (0, 3))
    parts = [{"input_ids": padded[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]
    for name, found in of(CosineGap(harmful), model, parts, **target).items():
        torch.testing.assert_close(found, whole[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ScoreError, match="two kinds of prompts"):
        of(CosineGap(), model, harmful, **target)
    with pytest.raises(ScoreError, match="1 normal prompt"):
        of(CosineGap(harmful), model, [{"input_ids": ids[:1]}], **target)
    with pytest.raises(HyperparameterError, match="is in no layer"):
        of(CosineGap(harmful), model, harmful, target_modules=None)


# --- rounds ---------------------------------------------------------------------------------------


def test_hft_draws_another_half_in_each_round() -> None:
    model = llama(num_hidden_layers=4)
    optimizer = retouch.wrap(retouch.AdamW, "hft-rounds", model, lr=1e-2)
    engine, masks = retouch.get_engine(model), []
    for _ in range(3):
        model(**tiny.text()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(engine.mask)
        engine.mover.new_epoch()
        assert all(
            not optimizer.state.get(s.value) for s in engine.slots.values()
        )  # a new optimizer
    assert masks[0] == select(llama(num_hidden_layers=4), "hft")
    for mask in masks:
        frozen = {n for n, _ in own(model)} - set(mask)
        for part, wanted in (("self_attn", [2] * 4), ("layernorm", [1] * 4)):
            counts = [sum(f".{i}." in n and part in n for n in frozen) for i in range(4)]
            assert counts == wanted
        assert sum("mlp" in n for n in frozen) == 6
    assert masks[0] != masks[1] != masks[2] != masks[0]


def test_roast_draws_anew_in_each_epoch() -> None:
    model, data = llama(), [tiny.text(seed=i) for i in range(2)]
    # at a learning rate of 0 the scores stay, so that masks differ by their draws alone
    optimizer = retouch.wrap(retouch.AdamW, "roast", model, lr=0.0, data=data)
    engine, masks = retouch.get_engine(model), []
    for _ in range(3):
        for batch in data:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        masks.append(engine.mask)
        engine.mover.new_epoch()
    inside = 2 * (7680 + 64)
    for mask in masks:
        count = sum(s.count for n, s in mask.items() if ".layers." in n)
        assert abs(count / inside - 0.106) < 0.02
        assert mask["lm_head.weight"].kind == "all"
    assert masks[0] != masks[1] != masks[2]
    assert recipes.info("roast").config["score"] == recipes.info("roast-fixed").config["score"]


def test_fishertune_only_grows() -> None:
    model, data = llama(), [tiny.text(seed=i) for i in range(2)]
    config = SelectConfig.named("fishertune", schedule={"start": 2, "every": 2, "rounds": 4})
    masks = run(model, config, data, 10, data=data)
    assert set(masks[0]) == {"lm_head.weight"}  # the head alone at first
    sizes = [m.count - 97 * 32 for m in masks]
    competing = 21728 - 97 * 32
    ramp = [(1 - math.exp(-i / 3)) / (1 - math.exp(-1)) for i in range(4)]
    want = [math.floor(competing * (0.005 + 0.045 * r)) for r in ramp]
    assert sizes == [0, want[0], want[0], want[1], want[1], want[2], want[2], *[want[3]] * 3]
    for before, after in itertools.pairwise(masks):
        assert positions(before) <= positions(after)


def test_cure_looks_at_the_batch_that_it_is_given() -> None:
    model, current = tiny.residual(), [tiny.images(seed=0)]
    optimizer = retouch.wrap(
        retouch.SGD, "cure-released", model, lr=1e-2, momentum=0.9, weight_decay=0.1, data=current
    )
    engine = retouch.get_engine(model)
    name = "layer1.0.conv1.weight"
    for step in range(4):
        held = {n: p.detach().clone() for n, p in own(model)}
        mask = engine.mask
        model(**current[0]).loss.backward()
        current[0] = tiny.images(seed=step + 1)
        optimizer.step()
        optimizer.zero_grad()
        still = torch.ones(576, dtype=torch.bool)
        still[mask[name].flat().long()] = False
        assert int(still.sum()) == math.ceil(0.3 * 575)
        now = dict(own(model))[name].detach()
        assert torch.equal(bits(now).flatten()[still], bits(held[name]).flatten()[still])
        assert mask["layer1.0.conv2.weight"].kind == "all" and mask["conv1.weight"].kind == "all"
        assert engine.mask != mask


def test_the_simpler_mode_of_cure_takes_the_gradient_of_the_step() -> None:
    model = tiny.residual()
    config = SelectConfig.named("cure", score="gradient", schedule={"collect": 1, "now": True})
    optimizer = retouch.wrap(retouch.SGD, config, model, lr=1e-2, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        held, batch, twin = snapshot(model), tiny.images(seed=step), tiny.residual()
        twin.load_state_dict(held | dict(model.named_buffers()))
        twin(**batch).loss.backward()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in twin.named_parameters():
            size = p.grad.abs()
            frozen = size < size.double().quantile(0.3)
            assert torch.equal(dict(own(model))[name][frozen], held[name][frozen]), name
            if size.unique().numel() == size.numel():
                count = retouch.get_engine(model).mask[name].count
                assert p.numel() - count == math.ceil(0.3 * (p.numel() - 1))


def test_row_times_column() -> None:
    model = Two([[1.0, -5.0, 2.0], [3.0, 0.5, -1.0]])
    found = of(RowColumn("magnitude"), model)["layers.0.weight"]
    assert found.tolist() == [[15.0, 25.0, 10.0], [9.0, 15.0, 6.0]]
    other = of(RowColumn("magnitude"), tiny.gpt2())  # stored the other way round
    for name, score in of(RowColumn("magnitude"), tiny.LikeGPT2(tiny.gpt2())).items():
        assert torch.equal(score.t(), other[name])


def test_spiel_ma_keeps_its_size_and_puts_back_what_it_drops() -> None:
    model, data = llama(), [tiny.text(seed=i) for i in range(2)]
    before = snapshot(model)
    config = SelectConfig.named("spiel-ma", schedule={"every": 4, "collect": 2, "rounds": 3})
    masks = run(model, config, data, 9)
    assert len({m.count for m in masks}) == 1
    assert not positions(masks[0]) <= positions(masks[4])
    now = snapshot(model)
    kept = positions(masks[-1])
    for name, index in set().union(*map(positions, masks)) - kept:
        assert now[name].flatten()[index] == before[name].flatten()[index]


# --- shares of matrices ---------------------------------------------------------------------------


def literal_scores(model: nn.Module, batches, names) -> dict[str, Tensor]:
    """Sum of |gradient| * |weight|."""
    found = {}
    for batch in batches:
        params = [model.get_parameter(n) for n in names]
        grads = torch.autograd.grad(model(**batch).loss, params)
        for n, g in zip(names, grads, strict=True):
            found[n] = found.get(n, 0) + g.abs()
    return {n: g * model.get_parameter(n).detach().abs() for n, g in found.items()}


def test_snella_shares_by_score_and_shrinks() -> None:
    data = [tiny.text(seed=i) for i in range(2)]
    config = SelectConfig.named("snella", density=0.3, schedule={"rounds": 3, "density_from": 0.8})
    # literally, at a learning rate of 0: the weights stay
    twin = llama()
    names = [n for n in select(twin, "snella", data=data, density=1.0)]
    scores = literal_scores(twin, data, names)
    model = llama()
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=0.0)
    engine = retouch.get_engine(model)
    assert all(s.kind == "all" for s in engine.mask.values()) and set(engine.mask) == set(names)
    before = None
    for done in (0.0, 0.5, 1.0, 1.0):
        for batch in data:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.mover.new_epoch()
        volume = 0.3 + 0.5 * (1 - done) ** 3
        assert engine.mask.count == math.floor(2 * 7680 * volume)
        if before is None:
            sizes = [scores[n].numel() for n in names]
            want = shares([float(scores[n].mean()) for n in names], sizes, engine.mask.count)
            for n, k in zip(names, want, strict=True):
                assert abs(engine.mask[n].count - k) <= 1
                top = set(scores[n].flatten().topk(engine.mask[n].count).indices.tolist())
                assert len(top ^ set(engine.mask[n].flat().tolist())) <= 2  # float rounding
        else:
            assert positions(engine.mask) <= before
        before = positions(engine.mask)
    assert len({round(engine.mask[n].count / scores[n].numel(), 2) for n in names}) > 3


def test_increlora_adds_the_same_number_in_each_round() -> None:
    model, data = llama(), [tiny.text(seed=i) for i in range(3)]
    config = SelectConfig.named("increlora", density=0.1, schedule={"every": 2, "rounds": 4})
    masks = run(model, config, data, 9)
    counts = [m.count for m in masks]
    quarter = 2 * 7680 * 0.1 / 4
    assert counts == [math.floor(quarter * min(i // 2 + 1, 4)) for i in range(9)]
    for before, after in itertools.pairwise(masks):
        assert positions(before) <= positions(after)
    added = {
        n: s.count - masks[0][n].count if n in masks[0] else s.count for n, s in masks[-1].items()
    }
    assert max(added.values()) > 3 * min(added.values())  # not in proportion to sizes


# --- PEFT -----------------------------------------------------------------------------------------


def with_lora(r: int = 2) -> nn.Module:
    model = llama()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("variant", ["LoRA", "LoRA-FA"])
def test_all_of_the_factors_is_lora_and_b_alone_is_lora_fa(variant: str) -> None:
    one, other = with_lora(), with_lora()
    for name, p in one.named_parameters():
        p.requires_grad_("lora_B" in name or ("lora_A" in name and variant == "LoRA"))
    plain = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
    fields = {} if variant == "LoRA" else {"exclude_modules": r".*lora_A.*"}
    mask = select(other, "lora-sp", density=1.0, **fields)
    assert set(mask) == {n for n, p in one.named_parameters() if p.requires_grad}
    ours = retouch.wrap(torch.optim.AdamW, mask, other, lr=1e-2, gradient="dense")
    for step in range(3):
        for model, optimizer in ((one, plain), (other, ours)):
            model(**tiny.text(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(snapshot(one), snapshot(other))


def test_lora_sp_takes_exactly_half_of_each_factor() -> None:
    model = with_lora()
    mask = select(model, "lora-sp")
    assert set(mask) == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert all(s.count == model.get_parameter(n).numel() // 2 for n, s in mask.items())
    rows = select(
        model, "lora-sp", granularity="row", scope="global", exclude_modules=r".*lora_B.*"
    )
    assert all(s.kind in ("rows", "all") and "lora_A" in n for n, s in rows.items())
    masks = run(model, SelectConfig.named("lora-sp-redrawn"), [tiny.text()], 3)
    assert masks[0] != masks[1] != masks[2] and len({m.count for m in masks}) == 1


def test_rosa_starts_the_sparse_part_after_the_lora() -> None:
    model, data = with_lora(), [tiny.text(seed=i) for i in range(6)]
    config = SelectConfig.named("rosa-warmup", density=0.05, schedule={"start": 4})
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=1e-2)
    engine, before = retouch.get_engine(model), snapshot(model)
    factors = {n for n in before if "lora_" in n}
    for step in range(4):
        assert set(engine.mask) == factors
        if step == 3:
            twin = copy.deepcopy({n: t for n, t in snapshot(model).items()})
        model(**data[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bases = {
        n for n in before if n.endswith(("q_proj.base_layer.weight", "v_proj.base_layer.weight"))
    }
    assert set(engine.mask) == factors | bases
    now = snapshot(model)
    assert_same({n: now[n] for n in bases}, {n: before[n] for n in bases})  # S = 0 at first
    # the best of each by the gradient of the last of these steps
    literal = with_lora()
    with torch.no_grad():
        for name, p in literal.named_parameters():
            p.copy_(twin[name])
            p.requires_grad_(name in bases)
    literal(**data[3]).loss.backward()
    for name in bases:
        grad = literal.get_parameter(name).grad.flatten()
        k = math.floor(0.05 * grad.numel())
        assert set(engine.mask[name].flat().tolist()) == set(grad.abs().topk(k).indices.tolist())
    model(**data[4]).loss.backward()
    optimizer.step()
    later = snapshot(model)
    assert all(not torch.equal(later[n], now[n]) for n in bases | factors)


# --- presets --------------------------------------------------------------------------------------


def test_codyra_keeps_the_ranks_whose_gates_stay_open() -> None:
    model, data = with_lora(4), [tiny.text(seed=i) for i in range(4)]
    score = replace(recipes.info("codyra").config["score"], penalty=0.1, lr=2e-2)
    mask = select(model, "codyra", data=data, score=score)
    found = of(score, model, data, target_modules=r".*lora_B.*")
    columns = 0
    for name, s in found.items():
        gates = s[0]
        assert torch.equal(s, gates.expand_as(s))  # one gate for each rank
        wanted = gates.nonzero().flatten().tolist()
        columns += len(wanted)
        got = sorted({i % 4 for i in mask[name].flat().tolist()}) if name in mask else []
        assert got == wanted
    assert 0 < columns < 16
    assert all(s.kind == "all" for n, s in mask.items() if "lora_A" in n)
    assert sum("lora_A" in n for n in mask) == 4


def test_cu_icu_trains_less_than_a_hundredth_of_a_t5() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config())  # the sizes of T5-small
    mask = select(model, "cu-icu")
    assert all("layer_norm" in n for n in mask)
    assert 0 < mask.count / sum(p.numel() for p in model.parameters()) < 0.01


def test_schedules_of_these_recipes() -> None:
    moving = [r.id for r in recipes.list() if "schedule" in r.config]
    for name in ("fishertune", "cure", "fishdip", "owlore", "roast", "spiel-ma", "rosa-warmup"):
        assert name in moving and isinstance(recipes.info(name).config["schedule"], Schedule)
