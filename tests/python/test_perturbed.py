"""Scores of changed inputs: other channel statistics, adversaries."""

import json
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch import SelectConfig, recipes, select
from retouch.eligible import candidates
from retouch.errors import HyperparameterError, ScoreError
from retouch.perturb import shifted
from retouch.scores import (
    Adversarial,
    Fisher,
    Gradient,
    GradStat,
    Magnitude,
    Shifted,
    domain_fisher,
    robust_gradient,
)


class Means(nn.Module):
    """The gradient of weight c is the mean of channel c of the input [samples, positions, channels]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.weight = nn.Parameter(torch.zeros(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer.weight * x.mean((0, 1))).sum()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Linear(5, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv1(x)))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def of(score, model: nn.Module, data, loss_fn=None, target=None) -> dict[str, Tensor]:
    config = SelectConfig(score="magnitude", density=1.0, target_modules=target, heads="masked")
    eligible = {n: c for n, c in candidates(model, config).items() if c.state == "masked"}
    return score(model, eligible, data, loss_fn)


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 7, 3), (4, 9)])
def test_channels_get_other_means_and_spreads(shape) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 2 + 1
    new = shifted(x, 0.5, 0.25, seed=3)
    channel = {4: 1, 3: 2, 2: None}[len(shape)]
    over = [d for d in range(1, len(shape)) if d != channel]
    mean, std = x.mean(over, keepdim=True), x.std(over, correction=0, keepdim=True)
    shift = (new.mean(over, keepdim=True) - mean) / std
    scale = new.std(over, correction=0, keepdim=True) / std
    torch.testing.assert_close(shift.abs(), torch.full_like(shift, 0.5))
    torch.testing.assert_close((scale - 1).abs(), torch.full_like(scale, 0.25))
    for ways in (shift, scale):  # one way for all samples
        torch.testing.assert_close(ways, ways[:1].expand_as(ways))
    assert channel is None or len(set(shift.sign().flatten().tolist())) == 2
    assert torch.equal(shifted(x[1:2], 0.5, 0.25, seed=3), new[1:2])
    torch.testing.assert_close(shifted(x, 0.0, 0.0, seed=3), x)
    assert shifted(x.bfloat16(), 0.5, 0.25, seed=3).dtype == torch.bfloat16


def test_domain_fisher_oracle() -> None:
    model = Means(2)
    # channel 0 has mean 1 and no spread, channel 1 mean 1 and spread 5: 0.2 of it makes 2 of 1
    x = torch.tensor([[[1.0, 6.0], [1.0, -4.0]]])
    for eps, want in ((1e-8, 1 + math.exp(-0.2) * 3), (1.0, 1 + math.exp(-0.2) * 3 / 2)):
        found = of(domain_fisher(0.2, 0.0, eps=eps), model, [x])["layer.weight"]
        torch.testing.assert_close(found, torch.tensor([[1.0, want]]))
    same = of(domain_fisher(0.0, 0.0), model, [x])["layer.weight"]
    torch.testing.assert_close(same, torch.ones(1, 2), rtol=0, atol=1e-6)


def test_shifted_features_of_a_language_model() -> None:
    model = tiny.llama()
    data = [tiny.text(), tiny.text(seed=1)]
    plain = of(Fisher(), model, data, target="all-linear")
    moved = of(Shifted(Fisher(), mean=0.3, std=0.3), model, data, target="all-linear")
    assert all(not torch.equal(plain[n], moved[n]) for n in plain)
    named = of(Shifted(Fisher(), "model.embed_tokens", 0.3, 0.3), model, data, target="all-linear")
    for name, score in moved.items():
        assert torch.equal(score, named[name])
    # a literal one: the shifted embeddings as inputs, sample by sample
    for name in plain:
        want = torch.zeros_like(plain[name])
        for batch in data:
            for ids in batch["input_ids"]:
                with torch.no_grad():
                    x = shifted(model.model.embed_tokens(ids[None]), 0.3, 0.3, 0)
                loss = model(inputs_embeds=x, labels=ids[None]).loss
                want += torch.autograd.grad(loss, model.get_parameter(name))[0] ** 2
        torch.testing.assert_close(moved[name], want, rtol=2e-3, atol=1e-8)
    assert not model.model.embed_tokens._forward_hooks


# --- adversaries ----------------------------------------------------------------------------------


def test_the_worst_inputs_of_a_linear_loss() -> None:
    model = tiny.Dot(1, 3)
    model.layer.weight.data = torch.tensor([[2.0, -3.0, 0.5]])
    x = torch.tensor([[[0.5, 0.5, 0.99]]])
    attack = {"aim": "loss", "radius": 0.03, "step": 0.01, "steps": 4, "noise": 0.0}
    found = of(Adversarial(GradStat(), **attack), model, [x])["layer.weight"]
    torch.testing.assert_close(found, torch.tensor([[0.53, 0.47, 1.02]]))
    found = of(Adversarial(GradStat(), bounds=(0, 1), **attack), model, [x])["layer.weight"]
    torch.testing.assert_close(found, torch.tensor([[0.53, 0.47, 1.0]]))


@pytest.mark.parametrize("kind", ["task", "kl"])
def test_the_attack_is_that_of_trades(kind: str) -> None:
    """Written out after the paper of TRADES (arXiv 1901.08573)."""
    model, generator = Classifier(), torch.Generator().manual_seed(1)
    x = torch.rand(6, 5, generator=generator)
    y = torch.arange(6) % 3
    attack = {"radius": 0.05, "step": 0.02, "steps": 3, "bounds": (0, 1)}

    def divergence(adversarial: Tensor, natural: Tensor) -> Tensor:
        q, p = F.log_softmax(adversarial, 1), F.softmax(natural, 1)
        return F.kl_div(q, p, reduction="sum") / len(natural)

    torch.manual_seed(5)
    worst = (x + 1e-3 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(3):
        worst = worst.detach().requires_grad_(True)
        slope = torch.autograd.grad(divergence(model(worst), model(x).detach()), worst)[0]
        worst = worst.detach() + 0.02 * slope.sign()
        worst = torch.min(torch.max(worst, x - 0.05), x + 0.05).clamp(0, 1)
    loss = (
        F.cross_entropy(model(worst), y) if kind == "task" else divergence(model(worst), model(x))
    )
    names, params = zip(*model.named_parameters(), strict=True)
    want = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
    torch.manual_seed(5)
    score = Adversarial(GradStat(), loss=kind, **attack)
    found = of(score, model, [(x, y)], cross_entropy)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in params) and not model._forward_hooks


def test_robust_gradients_mix_both() -> None:
    model, x = Classifier(), torch.rand(4, 5, generator=torch.Generator().manual_seed(2))
    data = [(x, torch.arange(4) % 3)]

    def seeded(score) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return of(score, model, data, cross_entropy)

    natural, kl = seeded(GradStat()), seeded(Adversarial(GradStat(), loss="kl"))
    task = seeded(Adversarial(GradStat()))
    for name, found in seeded(robust_gradient(0.25)).items():
        torch.testing.assert_close(found, 0.25 * natural[name].abs() + 0.75 * task[name].abs())
    for name, found in seeded(robust_gradient(0.25, signed=True)).items():
        torch.testing.assert_close(found, 0.25 * natural[name] + 0.75 * kl[name])


def test_adversaries_of_a_language_model() -> None:
    model, data = tiny.llama(), [tiny.text()]
    plain = of(GradStat(), model, data, target="all-linear")
    for kind in ("task", "kl"):
        found = of(Adversarial(GradStat(), loss=kind), model, data, target="all-linear")
        assert all(not torch.equal(plain[n], found[n]) for n in plain)


# --- what cannot be -------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(HyperparameterError, match="mean=-1"):
        Shifted(Fisher(), mean=-1)
    with pytest.raises(HyperparameterError, match="loss='both'"):
        Adversarial(Fisher(), loss="both")
    for bad in ({"aim": "up"}, {"radius": -1.0}, {"steps": -1}):
        with pytest.raises(HyperparameterError, match="Attack"):
            Adversarial(Fisher(), **bad)
    model, data = tiny.llama(), [tiny.text()]
    with pytest.raises(HyperparameterError, match="no module of this name; did you mean 'lm_head'"):
        of(Shifted(Fisher(), at="lm_haed"), model, data)
    with pytest.raises(ScoreError, match="no features of Llama"):
        of(Shifted(Magnitude()), model, data)
    with pytest.raises(ScoreError, match="took no loss"):
        of(Adversarial(Magnitude()), model, data)
    with pytest.raises(ScoreError, match="no logits"):
        of(Adversarial(Gradient()), tiny.Dot(1, 2), [torch.ones(1, 1, 2)])
    config = SelectConfig(score=Adversarial("gradient", bounds=[0, 1]), density=0.5)
    assert SelectConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.score.bounds == (0.0, 1.0)


# --- recipes --------------------------------------------------------------------------------------


def test_cure_oracle() -> None:
    """g_nat = (1, -3, 2), alpha = 1, p = 1/3: the paper freezes 0, the code the most negative, 1."""
    model, data = tiny.Dot(1, 3), [torch.tensor([[[1.0, -3.0, 2.0]]])]
    for name, trained in (("cure", [1, 2]), ("cure-released", [0, 2])):
        signed = name == "cure-released"
        score = robust_gradient(1.0, signed=signed, aim="loss", loss="task")
        fields = {
            "score": score, "quantile": 1 / 3, "target_modules": None, "modules_to_save": None,
            "heads": "masked",
        }  # fmt: skip
        mask = select(model, name, data=data, **fields)
        assert mask["layer.weight"].flat().tolist() == trained
        everything = select(model, name, data=data, **(fields | {"quantile": 0.0}))
        assert everything["layer.weight"].count == 3  # p = 0: plain training
        assert recipes.info(name).config["score"] == robust_gradient(0.1, signed=signed)
