"""Deltas as LoRA adapters: PEFT loads them and gives the outputs of the tuned model."""

import pytest
import torch
from deltas import llama
from transformers import GPT2Config, GPT2LMHeadModel

from retouch import Delta
from retouch.compress import LowRank
from retouch.errors import BaseMismatchError, FormatError, HyperparameterError, LayoutError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*fan_in_fan_out")


def changed(model, rank, words, seed=1):
    """The model with changes of some rank in the weights whose name has one of the words."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and any(w in name for w in words):
                factors = [torch.randn(n, rank, generator=gen) for n in p.shape]
                p += 0.1 * factors[0] @ factors[1].T
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


WORDS = ["q_proj", "k_proj", "down_proj"]


def test_peft_gives_the_outputs_of_the_tuned_model(tmp_path):
    base, tuned = llama(), changed(llama(), 3, WORDS)
    report = Delta.between(base, tuned).to_peft(tmp_path / "lora", 3, task_type="CAUSAL_LM")
    assert len(report) == 6
    assert all(row["rank"] == 3 and row["residual"] < 1e-10 for row in report.values())
    before, want = logits(base), logits(tuned)
    assert not torch.allclose(before, want, atol=1e-2)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    assert isinstance(model, peft.PeftModelForCausalLM)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, tuned.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_what_is_lost_is_reported(tmp_path):
    base, tuned = llama(), changed(llama(), 5, WORDS)
    delta = Delta.between(base, tuned)
    report = delta.to_peft(tmp_path / "lora", 2)
    small = delta.compress(LowRank(2))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora").merge_and_unload()
    got, old = loaded.state_dict(), base.state_dict()
    for name, row in report.items():
        change = (tuned.state_dict()[name] - old[name]).double()
        missing = (tuned.state_dict()[name] - got[name]).double()
        lost = float(missing.square().sum() / change.square().sum())
        assert row["residual"] == pytest.approx(lost, rel=1e-3) and 0.05 < lost < 0.9
        singular = torch.linalg.svdvals(change)
        least = float(singular[2:].square().sum() / singular.square().sum())
        assert row["residual"] == pytest.approx(least, rel=1e-3)  # no adapter is nearer
        assert small[name].error == pytest.approx(row["residual"] ** 0.5)


def test_a_rank_above_the_shape_and_a_delta_from_a_file(tmp_path):
    base, tuned = llama(), changed(llama(), 4, ["k_proj", "up_proj"])
    Delta.between(base, tuned).save_pretrained(tmp_path / "delta")
    delta = Delta.load(tmp_path / "delta")
    with pytest.raises(FormatError, match="pass base="):
        delta.to_peft(tmp_path / "lora", 24)
    with pytest.raises(BaseMismatchError):
        delta.to_peft(tmp_path / "lora", 24, tuned)
    assert not (tmp_path / "lora").exists()
    report = delta.to_peft(tmp_path / "lora", 24, base)  # k_proj is [16, 32]
    assert {row["rank"] for row in report.values()} == {16, 24}
    want = logits(tuned)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_weights_that_are_stored_transposed(tmp_path):
    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=32)
        )

    base, tuned = gpt2(), changed(gpt2(), 2, ["c_attn", "c_proj"])
    Delta.between(base, tuned).to_peft(tmp_path / "lora", 2, fan_in_fan_out=True)
    want = logits(tuned)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_what_has_no_place_in_an_adapter(tmp_path):
    base, tuned = llama(), changed(llama(), 2, [*WORDS, "embed_tokens"])
    with torch.no_grad():
        tuned.model.norm.weight += 1
    delta = Delta.between(base, tuned)
    with pytest.raises(LayoutError, match=r"2 changed tensors .*others='drop'"):
        delta.to_peft(tmp_path / "lora", 2)
    with pytest.raises(HyperparameterError, match="rank"):
        delta.to_peft(tmp_path / "lora", 0, others="drop")
    with pytest.raises(HyperparameterError, match="error or drop"):
        delta.to_peft(tmp_path / "lora", 2, others="keep")
    assert not (tmp_path / "lora").exists()
    report = delta.to_peft(tmp_path / "lora", 2, others="drop")
    dropped = {name for name, row in report.items() if row["rank"] == 0}
    assert dropped == {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(report[name]["residual"] == 1 for name in dropped)
    peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    only = Delta({n: delta[n] for n in dropped})
    with pytest.raises(LayoutError, match="nothing to adapt"):
        only.to_peft(tmp_path / "x", 2, others="drop")
    with pytest.raises(HyperparameterError, match="new or empty folder"):
        delta.to_peft(tmp_path / "lora", 2, others="drop")
    delta.to_peft(tmp_path / "lora", 1, others="drop", overwrite=True)
