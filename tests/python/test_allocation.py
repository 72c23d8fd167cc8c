"""The structured half of SPT: which matrices get a LoRA, which vectors are trained whole."""

import pytest
import tiny
from torch import nn

import retouch
from retouch.errors import HyperparameterError


class Block(nn.Module):
    """Two projections of 768 x 768, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(768, 768)
        self.k = nn.Linear(768, 768, bias=False)
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, 2)


def masked(model: nn.Module, counts: dict[str, int]) -> retouch.Mask:
    return retouch.Mask.from_indices({n: range(k) for n, k in counts.items()}, model)


def test_spt_oracle() -> None:
    model = Block()  # a LoRA of rank 8 has 12288 parameters, a tenth of which is 1228.8
    counts = {"q.weight": 1300, "k.weight": 1200, "q.bias": 154, "norm.weight": 153}
    found = retouch.escalate(masked(model, counts), model)
    assert found.lora == ("q",) and found.whole == ("q.bias",)  # 768 / 5 is 153.6
    assert {n: s.count for n, s in found.mask.items()} == {
        "k.weight": 1200, "q.bias": 768, "norm.weight": 153,
    }  # fmt: skip
    assert found.count == 12288 + 1200 + 768 + 153
    edge = masked(model, {"q.weight": 1229, "k.weight": 1228})
    assert retouch.escalate(edge, model).lora == ("q",)
    every = retouch.escalate(masked(model, counts), model, alpha=1e9, beta=1e9)
    assert every.lora == ("q", "k") and every.whole == ("q.bias", "norm.weight")
    none = retouch.escalate(masked(model, counts), model, alpha=1e-9, beta=1e-9)
    assert none.mask == masked(model, counts) and none.count == sum(counts.values())


def test_spt_on_a_model() -> None:
    model = tiny.bert()
    mask = retouch.select(model, "spt", data=[tiny.labelled(8)], density=0.05)
    found = retouch.escalate(mask, model, rank=1)
    assert found.lora and all(isinstance(model.get_submodule(m), nn.Linear) for m in found.lora)
    assert not {f"{m}.weight" for m in found.lora} & set(found.mask)
    assert set(found.whole) <= set(found.mask) and found.mask["classifier.weight"].kind == "all"
    sizes = [sum(model.get_submodule(m).weight.shape) for m in found.lora]
    assert found.count == found.mask.count + sum(sizes)
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"beta": -1.0}):
        with pytest.raises(HyperparameterError, match="wanted a number above 0"):
            retouch.escalate(mask, model, **bad)
