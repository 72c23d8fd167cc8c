"""Every recipe on a real model: exactly its budget, a loss that falls, and nothing else that moves."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny_hf import llama, tokens, trainer
from training import assert_frozen, snapshot

import retouch
from retouch.scores import (
    CosineGap,
    Difference,
    Fisher,
    HardExamples,
    LowRankMagnitude,
    Outliers,
    Probe,
    Wanda,
    robust_gradient,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# Two layers of q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48: 7680 weights and 64 of
# norms each; 3104 of the embedding and of the output, 32 of the last norm; 21728 in all.
LAYER, OUTSIDE, ALL = 7680 + 64, 2 * 3104 + 32, 21728
ROWS = 2 * 224
TAPS, DIFF_PRUNING, STRUCTURED = (
    retouch.recipes.info(name).config["score"]
    for name in ("taps", "diff-pruning", "diff-pruning-structured")
)
# A LoRA of rank 2 on q and v has 2 * (32 + 32) + 2 * (32 + 16) parameters in each layer.
LORA = 2 * 224
HARMFUL = [tiny.text(seed=5)]
CODYRA = [retouch.recipes.info(name).config["score"] for name in ("codyra", "codyra-released")]
# What is selected of it, by hand. Sizes for large matrices are scaled down, as written on the right.
BUDGETS = {
    "child-tuning-d": (4646 + OUTSIDE, {}),  # floor(0.3 * 2 * LAYER)
    "fish": (108, {}),  # floor(0.005 * ALL)
    # learned in few steps on a small model: higher rates, fewer batches a step
    "diff-pruning": (108, {"score": replace(DIFF_PRUNING, lr=1e-3)}),
    "diff-pruning-structured": (108, {"score": replace(STRUCTURED, lr=1e-3)}),
    "gps": (ROWS, {}),
    "hft": (None, {}),  # see its oracle
    "hft-layer": (LAYER + OUTSIDE, {}),
    "hft-model": (None, {}),
    "irepair-fixed": (LAYER, {}),
    "kappatune": (None, {}),  # two tensors, of whichever size
    "lift": (2 * 928, {"score": LowRankMagnitude(2), "lora_rank": 2}),
    "ln-tuning": (5 * 32, {}),
    "lota": (1536, {}),
    "lt-sft": (217, {}),
    "magnitude": (153, {}),
    "model-surgery": (4 * 32, {"score": Probe(range(1, 33))}),  # floor(0.0465 * 96) rows
    "neuroada": (ROWS, {}),
    "neuroada-grad": (ROWS, {}),
    "pafi": (108, {}),
    "perp": (5 * 32, {}),
    "cu-icu": (5 * 32, {}),
    "random": (153, {}),
    "rl-subnetwork": (ALL // 2, {}),
    "roast-fixed": (None, {}),  # by chance
    "rocoft-column": (ROWS, {}),
    "rocoft-row": (2 * (6 * 32 + 48), {}),
    "rosa": (2 * (3 + 1 + 1 + 3 + 3 * 4), {}),
    "s2ft": (2 * 32, {}),  # floor(0.03 * 96) columns
    "sam": (2 * (5 + 2 + 2 + 5 + 3 * 7), {}),
    "sara": (None, {}),  # what is small enough
    "shira-grad": (150, {}),
    "shira-rand": (150, {}),
    "shira-snip": (150, {}),
    "shira-struct": (2 * (63 + 47 + 47 + 63 + 63 + 63 + 79), {}),
    "shira-wm": (150, {}),
    "sift": (150, {}),
    "smt": (4 * 64, {"block_size": 8}),  # floor(0.07 * 64) blocks
    "sppft-gap": (ALL - LAYER, {"score": CosineGap(HARMFUL), "k": 1}),
    "sppft": (ALL - LAYER, {"exclude_modules": ["layers.0"]}),
    "spt": (77, {}),  # floor(0.005 * (2 * LAYER + 32))
    "spu": (4 * 153, {}),
    "spu-released": (4 * 153, {}),
    "ssu": (LAYER - 64 + 2 * 3104, {}),
    "ssu-released": (LAYER - 64 + 2 * 3104, {}),
    "supertuning": (150, {}),
    "supertuning-wanda": (150, {}),
    # whichever gates are open
    "taps": (None, {"score": replace(TAPS, epochs=6, penalty=0.44, accumulate=1, lr=0.02)}),
    "tr-pts": (None, {}),  # see its oracle
    "bitfit": (None, {}),  # a Llama has none
    # Those whose selection moves; here as one selection, see `test_a_moving_recipe_learns`.
    "badam": (LAYER, {}),
    "badam-ratio": (2 * (102 + 51 + 51 + 102 + 3 * 153), {}),
    "fish-epochs": (108, {}),
    "gmt": (2 * (204 + 102 + 102 + 204 + 3 * 307), {}),
    "grades": (2 * 7680, {}),
    "grades-released": (2 * 7680, {}),
    "id3": (108, {}),
    "id3-released": (108, {}),
    "irepair": (LAYER, {}),
    "lift-refresh": (2 * 928, {"score": LowRankMagnitude(2), "lora_rank": 2}),
    "lisa": (LAYER + OUTSIDE, {"k": 1}),
    "lt-sft-rewind": (217, {}),
    "sift-first-step": (2 * (51 + 25 + 25 + 51 + 3 * 76), {}),
    "smt-warmup": (4 * 64, {"block_size": 8}),
    "spiel": (150, {}),
    # Those that change the step and select all, see test_recipes_learn_updates.py.
    "alphaadam": (ALL, {}),
    "cautious": (ALL, {}),
    "child-tuning-f": (ALL, {}),
    "gmt-gate": (2 * 7680, {}),
    "gmt-micro": (2 * 7680, {}),
    "l2-sp": (ALL, {}),
    "magma": (ALL, {}),
    "mos": (ALL, {}),
    "skipupdate": (ALL, {}),
    "cure": (None, {"score": robust_gradient(0.1, steps=2)}),  # see below
    "cure-released": (None, {"score": robust_gradient(0.1, signed=True, steps=2)}),
    "fishdip": (217, {"score": HardExamples(Fisher(), samples=12)}),
    "fishertune": (931 + 3104, {}),  # floor(0.05 * (ALL - 3104)), and the head
    "hft-rounds": (None, {}),
    "lora-sp": (LORA // 2, {}),
    "lora-sp-redrawn": (LORA // 2, {}),
    "owlore": (LAYER - 64 + OUTSIDE, {"k": 1, "score": Outliers(Wanda(), 2.0)}),
    "roast": (None, {}),
    "rosa-warmup": (LORA + 2 * (3 + 1), {}),
    "spiel-ma": (150, {}),
    # whichever gates are open
    "codyra": (None, {"score": replace(CODYRA[0], penalty=0.1, lr=1e-2)}),
    "codyra-released": (None, {"score": replace(CODYRA[1], penalty=0.09, lr=1e-2)}),
    "increlora": (307, {}),  # floor(0.02 * 2 * 7680)
    "snella": (3072, {}),
}
# Schedules that do all that they do within 16 steps.
SHORT = {
    "badam": {"every": 4}, "badam-ratio": {"every": 2}, "fish-epochs": {}, "gmt": {},
    "grades": {"start": 12, "threshold": 1e9}, "grades-released": {"start": 12, "threshold": 1e9},
    "id3": {"rounds": 8}, "id3-released": {"rounds": 8}, "irepair": {},
    "lift-refresh": {"every": 5}, "lisa": {"every": 3}, "lt-sft-rewind": {"start": 4},
    "sift-first-step": {}, "smt-warmup": {"start": 4, "collect": 4},
    "spiel": {"every": 4, "collect": 2, "rounds": 3},
    "cure": {}, "cure-released": {}, "fishdip": {"every": 3},
    "fishertune": {"start": 3, "every": 3, "rounds": 3}, "hft-rounds": {},
    "lora-sp-redrawn": {}, "owlore": {"every": 3}, "roast": {}, "rosa-warmup": {"start": 5},
    "spiel-ma": {"every": 4, "collect": 2, "rounds": 3},
    "increlora": {"every": 2, "rounds": 5}, "snella": {"rounds": 3},
}  # fmt: skip
# Of two layers one: other data may well say the same.
WHOLE_LAYERS = ("irepair", "irepair-fixed", "owlore", "sppft-gap")
MOVING = [row.id for row in retouch.recipes.list() if "schedule" in row.config]


def with_lora():
    model = llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def classifier():
    return tiny.bert(), [tiny.labelled(8, seed=i) for i in range(4)]


def residual():
    return tiny.residual(), [tiny.images(8, seed=i) for i in range(4)]


# Models that have what a recipe is for, with their data.
OTHERS = {
    "bitfit": classifier, "codyra": with_lora, "codyra-released": with_lora,
    "cure-released": residual, "lora-sp": with_lora,
    "lora-sp-redrawn": with_lora, "rosa-warmup": with_lora,
}  # fmt: skip


def model_for(name, data):
    found = OTHERS.get(name, llama)()
    return found if isinstance(found, tuple) else (found, data)


@pytest.fixture(scope="module")
def data():
    samples = tokens(32)
    return [
        {k: torch.stack([s[k] for s in samples[i : i + 8]]) for k in samples[0]}
        for i in range(0, 32, 8)
    ]


@pytest.fixture(scope="module")
def tuned():
    """The model, with every second weight changed."""
    model = llama()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.view(-1)[::2] += 0.1 * (torch.rand(p.view(-1)[::2].shape, generator=generator) + 0.1)
    return model


def test_there_is_a_budget_for_each() -> None:
    assert BUDGETS.keys() == {row.id for row in retouch.recipes.list()}


@pytest.mark.parametrize(
    "name", [row.id for row in retouch.recipes.list() if row.id != "lt-sft-rewind"]
)
def test_learns_and_moves_nothing_else(name, data, tuned) -> None:
    model, data = model_for(name, data)
    wanted, changes = BUDGETS[name]
    if isinstance(retouch.recipes.info(name).config.get("score"), Difference):
        changes = {"score": Difference(tuned)}
    before, state = snapshot(model), torch.random.get_rng_state()
    mask = retouch.select(model, name, data=data, **changes)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert 0 < mask.count <= sum(p.numel() for p in model.parameters())
    if wanted is not None:
        assert mask.count == wanted
    with torch.no_grad():
        first = sum(float(model(**batch).loss) for batch in data)
    optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=2e-2, weight_decay=0.1)
    for batch in data * 4:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        last = sum(float(model(**batch).loss) for batch in data)
    assert last < first - 0.02, f"{first:.3f} -> {last:.3f}"
    assert_frozen(before, model, mask)
    retouch.verify_untouched(model)
    retouch.unwrap(model)


@pytest.mark.parametrize("name", MOVING)
def test_a_moving_recipe_learns(name, data) -> None:
    model, data = model_for(name, data)
    wanted, changes = BUDGETS[name]
    config = retouch.SelectConfig.named(name, **changes, schedule=SHORT[name])
    with torch.no_grad():
        first = sum(float(model(**batch).loss) for batch in data)
    before = snapshot(model)
    reads = getattr(config.score, "needs_data", False) and not config.schedule.collect
    reads = {"data": data} if reads else {}
    optimizer = retouch.wrap(retouch.AdamW, config, model, lr=2e-2, weight_decay=0.1, **reads)
    engine = retouch.get_engine(model)
    masks, counts = [], []
    for epoch in range(4):
        for batch in data:
            if engine.mover.finished:
                continue
            held = {n: p.detach().clone() for n, p in model.named_parameters() if "_ret" not in n}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            masks.append(engine.mask)
            counts.append(sum(s.selection.count for s in engine.slots.values()))
            if config.schedule.rewind == "none" and config.schedule.now:
                assert_frozen(held, model, engine.mask)
        if epoch < 3:
            engine.mover.new_epoch()
    with torch.no_grad():
        last = sum(float(model(**batch).loss) for batch in data)
    assert last < first - 0.02, f"{first:.3f} -> {last:.3f}"
    assert wanted is None or counts[-1] in (wanted, 0), counts  # all is frozen by GradES
    retouch.verify_untouched(model)
    delta = retouch.Delta.from_model(model)
    retouch.unwrap(model)
    delta.revert_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_counts_that_follow_from_the_weights(data) -> None:
    model = llama()
    mask = retouch.select(model, "kappatune")
    assert len(mask) == 2 and all(s.kind == "all" for s in mask.values())
    small = {n: int((p.abs() < 2e-3).sum()) for n, p in model.named_parameters()}
    mask = retouch.select(model, "sara")
    assert {n: s.count for n, s in mask.items()} == {n: k for n, k in small.items() if k}
    biased = tiny.bert()
    mask = retouch.select(biased, "bitfit")
    wanted = {n for n, _ in biased.named_parameters() if n.endswith("bias")}
    assert set(mask) == wanted | {"classifier.weight"}
    assert all(s.kind == "all" for s in mask.values())


def test_selections_by_data_follow_the_data(data) -> None:
    """A selection that never looked at its data would pass the other tests."""
    other = [{k: (v * 7 + 11) % 90 + 3 for k, v in batch.items()} for batch in data]
    for row in retouch.recipes.list():
        score = row.config.get("score")
        if not getattr(score, "needs_data", False) or row.id in WHOLE_LAYERS:
            continue
        model, batches = model_for(row.id, data)
        others = other if batches is data else [tiny.images(seed=9)]
        first = retouch.select(copy.deepcopy(model), row.id, data=batches, **BUDGETS[row.id][1])
        second = retouch.select(copy.deepcopy(model), row.id, data=others, **BUDGETS[row.id][1])
        assert first != second, row.id
        with pytest.raises(retouch.errors.ScoreError, match="needs data"):
            retouch.select(model, row.id)


@pytest.mark.parametrize("name", ["supertuning-wanda", "kappatune", "smt", "tr-pts"])
def test_recipes_in_the_trainer(name, data, tmp_path) -> None:
    """Scores of inputs, of tensors, of blocks and of rows, on the Trainer's own data and loss."""
    run = trainer(tmp_path, max_steps=3)
    before = snapshot(run.model)
    retouch.attach(run, name, **BUDGETS[name][1])
    run.train()
    retouch.verify_untouched(run.model)
    budget = retouch.select(llama(), name, data=data, **BUDGETS[name][1]).count
    moved = {n: int((p != before[n]).sum()) for n, p in snapshot(run.model).items()}
    # what is chosen of tensors of several sizes depends on the data
    assert 0 < sum(moved.values()) <= (2 * budget if name == "tr-pts" else budget)
