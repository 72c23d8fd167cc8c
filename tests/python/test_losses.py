"""Losses that choose pairs and tokens: oracles, and inside of real trainers."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_hf import llama, same, sentence, tokenizer, tokens, trainer, weights
from torch.nn import functional
from trl import DPOConfig, DPOTrainer

import retouch
from retouch.errors import HyperparameterError, ScoreError, ShapeError
from retouch.losses import BetaDPO, Overtone, pairs, sequence_log_probs

GAPS = torch.tensor([2.0, 0.0, 1.0, 5.0])
FIXED = {"mean": 1.0, "std": 1.0, "memory": 1.0}  # the running figures stay where they are


# --- beta-DPO --------------------------------------------------------------------------------------------


def test_weights_and_beta_by_hand() -> None:
    choose = BetaDPO(**FIXED)
    assert choose.log_weights(GAPS).exp().tolist() == pytest.approx(
        [0.6065, 0.6065, 1, 3.4e-4], abs=1e-4
    )
    betas = set()
    for seed in range(20):
        kept, beta = BetaDPO(**FIXED, seed=seed)(GAPS)
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 3
        follows = 1 + 0.6 * (float(GAPS[kept].mean()) - 1)
        assert beta == pytest.approx(0.1 * follows)
        betas.add((tuple(kept.tolist()), round(beta, 6)))
    assert ((0, 1, 2), 0.1) in betas
    kept, beta = BetaDPO(**FIXED, mode_weight=0.0)(GAPS)
    assert kept.tolist() == [0, 1, 2, 3] and beta == pytest.approx(0.16)
    assert BetaDPO(**FIXED, a=-9.0, mode_weight=0.0)(GAPS)[1] == 1e-3


def test_draws_have_the_chances_of_a_draw_without_replacement() -> None:
    weights_ = BetaDPO(**FIXED).log_weights(GAPS).exp()
    first = weights_ / weights_.sum()
    counts = torch.zeros(4)
    choose = BetaDPO(**FIXED, mode_weight=0.75)  # one of four
    for _ in range(3000):
        counts[choose(GAPS)[0]] += 1
    torch.testing.assert_close(counts / 3000, first.float(), rtol=0, atol=0.03)
    # weights that underflow are still in their order, and enough are drawn
    far = torch.tensor([0.0, 1e6, 2e6, 3e6])
    assert BetaDPO(mean=0.0, std=1.0, memory=1.0, mode_weight=0.5)(far)[0].tolist() == [0, 1]


def test_running_figures_take_the_batch_in_first() -> None:
    choose = BetaDPO(mode_weight=0.0)
    _, beta = choose(GAPS)
    assert choose.mean == pytest.approx(0.2) and choose.std == pytest.approx(
        0.1 * GAPS.std().item()
    )
    assert beta == pytest.approx(0.1 * (1 + 0.6 * (2.0 - 0.2)))
    choose(GAPS)
    assert choose.mean == pytest.approx(0.38)


def test_it_goes_on_exactly_and_is_dpo_without_its_two_parts() -> None:
    whole, first = BetaDPO(seed=3), BetaDPO(seed=3)
    batches = [torch.randn(8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    wanted = [(k.tolist(), b) for k, b in map(whole, batches)]
    for batch in batches[:3]:
        first(batch)
    again = BetaDPO(seed=3)
    again.load_state_dict(first.state_dict())
    assert [(k.tolist(), b) for k, b in map(again, batches[3:])] == wanted[3:]
    gaps = batches[0].requires_grad_()
    plain = BetaDPO(a=0.0, mode_weight=0.0).loss(gaps)
    assert torch.equal(plain, -functional.logsigmoid(0.1 * gaps).mean())
    kept, _ = BetaDPO(seed=3)(gaps)
    BetaDPO(seed=3).loss(gaps).backward()
    assert (gaps.grad != 0).nonzero().flatten().tolist() == kept.tolist() and len(kept) == 6


def test_what_cannot_be_chosen_from() -> None:
    with pytest.raises(ShapeError, match="at least two pairs"):
        BetaDPO()(torch.ones(1))
    with pytest.raises(ScoreError, match="NaN"):
        BetaDPO()(torch.tensor([1.0, math.nan]))
    for options in ({"mode_weight": 1.0}, {"mode_weight": -0.1}, {"beta": -1.0}, {"memory": 2.0}):
        with pytest.raises(HyperparameterError):
            BetaDPO(**options)


def test_pairs_of_a_batch() -> None:
    inputs = {
        "input_ids": torch.arange(12).view(6, 2),
        "ref_chosen_logps": torch.tensor([0.0, 1.0, 2.0]),
        "flag": True,
    }
    made = pairs(inputs, torch.tensor([0, 2]))
    assert made["input_ids"][:, 0].tolist() == [0, 4, 6, 10] and made["flag"] is True
    assert made["ref_chosen_logps"].tolist() == [0.0, 2.0]


class BetaDPOTrainer(DPOTrainer):
    """As the docstring of `BetaDPO` says; keeps what it has seen."""

    choose: BetaDPO

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        ours = self.compute_ref_log_probs(model, inputs)
        theirs = self.compute_ref_log_probs(self.ref_model, inputs)
        gaps = (ours[0] - theirs[0]) - (ours[1] - theirs[1])
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with torch.no_grad():
            logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(sequence_log_probs(logits, labels), torch.cat(ours))
        kept, self.beta = self.choose(gaps)
        loss = super().compute_loss(model, pairs(inputs, kept), *args, **kwargs)
        wanted = -functional.logsigmoid(self.beta * gaps[kept]).mean()
        torch.testing.assert_close(loss.detach(), wanted)
        self.seen = [*getattr(self, "seen", []), (len(gaps), len(kept), self.beta)]
        return loss


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_in_the_trainer_of_trl(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    texts = [sentence(s).split() for s in tokens(32)]
    data = Dataset.from_dict(
        {
            "prompt": [" ".join(t[:4]) + " " for t in texts],
            "chosen": [" ".join(t[4:8]) for t in texts],
            "rejected": [" ".join(t[8:]) for t in texts],
        }
    )

    def start(cls, choose=None):
        arguments = DPOConfig(
            output_dir=str(tmp_path), max_length=16, max_steps=3, per_device_train_batch_size=8,
            learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
            save_strategy="no", dataloader_pin_memory=False, logging_steps=1, seed=7,
        )  # fmt: skip
        run = cls(
            model=str(tmp_path / "model"), args=arguments, processing_class=tokenizer(),
            train_dataset=data,
        )  # fmt: skip
        run.choose = choose
        retouch.attach(run, "magnitude", density=0.05).train()
        return run

    plain = weights(start(DPOTrainer).model)
    off = start(BetaDPOTrainer, BetaDPO(a=0.0, mode_weight=0.0))
    assert same(weights(off.model), plain)
    on = start(BetaDPOTrainer, BetaDPO())
    assert [(whole, part) for whole, part, _ in on.seen] == [(8, 6)] * 3
    assert on.seen[0][2] == pytest.approx(0.1, abs=1e-4)  # the first gaps are 0
    assert on.seen[2][2] != on.seen[1][2] and not same(weights(on.model), plain)
    retouch.verify_untouched(on.model)


# --- OVERTONE --------------------------------------------------------------------------------------------

Z = torch.tensor([[2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("label", "weight", "target", "loss"),
    [
        (1, 0.5, [0.3655, 0.6345, 0.0], 0.3855),
        (1, 0.1, [0.0, 1.0, 0.0], 1.4076),
        (0, 0.1, [0.7580, 0.2420, 0.0], 0.0962),
    ],
)
def test_overtone_by_hand(label, weight, target, loss) -> None:
    rule, labels = Overtone(weight, floor=0.0, n=1.5), torch.tensor([label])
    torch.testing.assert_close(rule.targets(Z, labels), torch.tensor([target]), rtol=0, atol=1e-4)
    assert rule.tokens(Z, labels).item() == pytest.approx(loss, abs=1e-4)


def test_overtone_without_its_parts_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator).to(torch.bfloat16)
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, 1:3] = -100
    wanted = functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, 11), labels[:, 1:].reshape(-1)
    )
    for outputs in (logits, {"logits": logits}):
        torch.testing.assert_close(Overtone(1.0, 0.0)(outputs, labels), wanted)
    total = wanted * int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(Overtone(1.0, 0.0)(logits, labels, 4), total / 4)


def test_overtone_leaves_learned_tokens_alone() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [9.0, 0.0, 0.0]], requires_grad=True)
    rule = Overtone(0.1, floor=0.09, n=1.5)
    losses = rule.tokens(logits, torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([0.0962, 0.09], abs=1e-4)
    losses.sum().backward()
    assert logits.grad[0].abs().min() > 0 and not logits.grad[1].any()
    # the gradient of a KL with a constant target is softmax - target
    wanted = torch.softmax(logits[0].detach(), -1) - rule.targets(logits, torch.tensor([0, 0]))[0]
    torch.testing.assert_close(logits.grad[0], wanted)
    impossible = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    rule.tokens(impossible, torch.tensor([2])).sum().backward()
    assert torch.isfinite(impossible.grad).all()


def test_overtone_in_the_trainer(tmp_path: Path) -> None:
    runs = {}
    for name, rule in (
        ("plain", None),
        ("hard", Overtone(1.0, 0.0)),
        ("smooth", Overtone(0.5, 0.05)),
    ):
        run = trainer(tmp_path / name, max_steps=3)
        run.compute_loss_func = rule
        retouch.attach(run, "magnitude", density=0.05).train()
        runs[name] = weights(run.model)
        retouch.verify_untouched(run.model)
    for name, a in runs["plain"].items():
        torch.testing.assert_close(a, runs["hard"][name], rtol=1e-4, atol=1e-5)
    assert not same(runs["smooth"], runs["hard"])
    for options in ({"weight": 1.5}, {"floor": -1.0}, {"n": math.nan}):
        with pytest.raises(HyperparameterError, match="wanted weight"):
            Overtone(**options)
