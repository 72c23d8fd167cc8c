"""How sparse an update is: the oracles of arXiv 2505.11711, and what the dtype does to them."""

import pytest
import torch

import retouch
from retouch import Delta
from retouch.errors import FormatError
from retouch.masks import Mask


def test_one_of_four_in_bfloat16():
    base = {"w": torch.ones(4, dtype=torch.bfloat16)}
    tuned = {"w": torch.tensor([1, 1, 1.0078125, 1], dtype=torch.bfloat16)}
    found = Delta.between(base, tuned).updates(base)
    assert (found.numel, found.changed, found.one_ulp) == (4, 1, 1)
    assert found.sparsity == 0.75
    assert any("bfloat16" in text and "denser" in text for text in found.warnings)
    assert "sparsity 75.00%" in str(found) and "warning: weights are stored" in str(found)


def test_a_change_of_the_tolerance_is_none():
    base = {"w": torch.zeros(3, dtype=torch.float64)}
    tuned = {"w": torch.tensor([1e-5, 1.0001e-5, 0.0], dtype=torch.float64)}
    found = Delta.between(base, tuned).updates(base)
    assert (found.changed, found.beyond) == (2, 1)
    assert found.sparsity_at_tolerance == pytest.approx(2 / 3)
    assert Delta.between(base, tuned).updates(base, atol=1e-6).beyond == 2
    assert found.warnings == ()


def test_tensors_without_a_change_and_tied_ones_count_once():
    one = torch.zeros(10)
    base = {"a": one, "tied": one, "b": torch.zeros(2, 5), "ids": torch.zeros(7, dtype=torch.int64)}
    changed = torch.zeros(10)
    changed[:2] = 1.0
    tuned = {"a": changed, "tied": changed, "b": base["b"], "ids": torch.ones(7, dtype=torch.int64)}
    delta = Delta.between(base, tuned)
    found = delta.updates(base)
    assert (found.numel, found.changed) == (20, 2)
    assert found.densities == {"a": 0.2, "b": 0.0} and found.mean_density == pytest.approx(0.1)
    alone = delta.updates()
    assert alone.numel == 10 and "pass the base" in alone.warnings[0]


def test_ranks_of_the_change():
    generator = torch.Generator().manual_seed(0)
    base = {
        "low": torch.randn(12, 8, generator=generator),
        "high": torch.randn(8, 12, generator=generator),
    }
    left, right = torch.randn(12, 2, generator=generator), torch.randn(2, 8, generator=generator)
    tuned = {"low": base["low"] + left @ right, "high": base["high"].clone()}
    tuned["high"].reshape(-1)[torch.arange(0, 96, 13)] += 1.0  # eight entries, a diagonal
    # low is exact only up to the rounding of the sum, which is of full rank and tiny
    found = Delta.between(base, tuned).updates(base, ranks=True)
    assert found.ranks["high"] == 1.0
    assert found.ranks["low"] >= 0.25
    exact = {"low": torch.zeros(12, 8), "high": base["high"]}
    found = Delta.between(exact, exact | {"low": left @ right}).updates(exact, ranks=True)
    assert found.ranks == {"low": 0.25} and found.mean_rank == 0.25
    assert "rank of the change" in str(found)
    assert Delta.between(base, tuned).updates(base).mean_rank is None


def test_a_float32_copy_of_a_bfloat16_model_is_told():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100, generator=generator)
    base, tuned = {"w": exact.bfloat16().float()}, {"w": exact}
    found = Delta.between(base, tuned).updates(base)
    assert any("rounding" in text for text in found.warnings)
    both = Delta.between({"w": exact}, {"w": exact + 1}).updates({"w": exact})
    assert both.warnings == ()


def test_old_values_come_from_the_base(tmp_path):
    base, tuned = {"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 1.0, 0.0, 0.0])}
    Delta.between(base, tuned).save_pretrained(tmp_path)
    delta = Delta.load(tmp_path)
    with pytest.raises(FormatError, match="pass base="):
        delta.updates()
    assert delta.updates(base).changed == 1


def test_masks_of_deltas_overlap_as_chance_says():
    torch.manual_seed(0)
    base = {"w": torch.zeros(400, 500)}
    masks = []
    for seed in (1, 2):
        mask = retouch.ops.uniform((400, 500), seed, "w", "cpu") < 0.2
        masks.append(Delta.between(base, {"w": mask.float()}).mask())
    assert isinstance(masks[0], Mask)
    shared = masks[0].overlap(masks[1])
    assert shared.both / shared.first == pytest.approx(0.2, abs=0.01)
    assert shared.lift == pytest.approx(1.0, abs=0.05)
    whole = Delta.between({"w": torch.zeros(3)}, {"w": torch.ones(3)}).mask()
    assert whole.count == 3


def test_a_trained_model_is_as_sparse_as_its_mask():
    model = torch.nn.Linear(20, 10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = retouch.select(model, "random", density=0.1, heads="masked")
    optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=0.1)
    model(torch.randn(4, 20)).square().sum().backward()
    optimizer.step()
    delta = Delta.from_model(model)
    found = delta.updates(before)
    assert (found.numel, found.changed) == (210, mask.count)
    assert delta.mask() == mask
