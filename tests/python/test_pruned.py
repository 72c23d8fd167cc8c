"""Merging LoRA into pruned weights (PERP): by hand, and with PEFT's own layers on real models."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training import bits

from retouch import errors
from retouch.pruned import PrunedLora, add_unpruned, scale_unpruned

pytestmark = [  # of PEFT and transformers
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
VARIANTS = ("lora_prune", "mask_lora", "scale_lora")
MODELS = {"llama": (tiny.llama, ["q_proj", "down_proj"]), "gpt2": (tiny.gpt2, ["c_attn", "c_fc"])}


def test_perp_oracle() -> None:
    weight = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    ones = torch.ones(2, 2)
    assert add_unpruned(weight, 2 * ones).tolist() == [[3.0, 0.0], [4.0, 5.0]]
    assert scale_unpruned(weight, 2 * ones).tolist() == [[2.0, 0.0], [4.0, 6.0]]
    signed = torch.tensor([-0.0, 0.0, 1.0]).to(torch.bfloat16)
    for merged in (
        add_unpruned(signed, ones[0, 0].expand(3)),
        scale_unpruned(signed, -torch.ones(3)),
    ):
        assert merged.dtype == torch.bfloat16
        assert torch.equal(bits(merged)[:2], bits(signed)[:2]) and merged[2] != 1
    with pytest.raises(errors.ShapeError, match=r"\(2, 2\) and a product of shape \(3,\)"):
        add_unpruned(weight, torch.ones(3))


def prune(model: nn.Module) -> None:
    """Half of each matrix, by magnitude."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "emb" not in name and "wte" not in name and "wpe" not in name:
                p[p.abs() < p.abs().median()] = 0.0


def lora(name: str, **changes) -> tuple[nn.Module, list[str], dict[str, Tensor]]:
    make, targets = MODELS[name]
    model = make().eval()
    prune(model)
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0, **changes)
    torch.manual_seed(1)
    return get_peft_model(model, config), targets, plain


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(**tiny.text()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.002


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_stay_zeros(name: str, variant: str) -> None:
    model, targets, plain = lora(name)
    with model.disable_adapter():
        want = model(**tiny.text()).logits
    pruned = PrunedLora(model, variant)
    assert torch.equal(model(**tiny.text()).logits, want)  # step 0; r = 4: 1 / sqrt(r) is exact
    train(model)
    adapted = model(**tiny.text()).logits.detach()
    assert not torch.allclose(adapted, want, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(**tiny.text()).logits, want)
    merged = pruned.merge()
    assert "lora" not in str(type(merged)).lower() and not any(
        "lora" in n for n, _ in merged.named_modules()
    )
    moved = 0
    for n, p in merged.named_parameters():
        if any(f"{t}.weight" in n for t in targets):
            zero = plain[n] == 0
            assert zero.float().mean() > 0.4 and torch.equal(p == 0, zero), n
            assert torch.equal(bits(p)[zero], bits(plain[n])[zero])
            moved += int((p != plain[n]).sum())
        else:
            assert torch.equal(bits(p), bits(plain[n])), n
    assert moved
    now = merged(**tiny.text()).logits
    if variant == "lora_prune":  # what fell on zeros is lost
        assert not torch.allclose(now, adapted, atol=1e-3)
    else:
        torch.testing.assert_close(now, adapted, rtol=1e-5, atol=1e-5)


def test_lora_prune_is_peft_but_for_the_zeros() -> None:
    model, _, plain = lora("llama")
    pruned = PrunedLora(model, "lora_prune")
    train(model)
    name = "model.layers.0.mlp.down_proj"
    delta = model.base_model.model.get_submodule(name).get_delta_weight("default").detach()
    weight = plain[f"{name}.weight"]
    merged = dict(pruned.merge().named_parameters())[f"{name}.weight"]
    torch.testing.assert_close(merged.detach(), weight + delta * (weight != 0))
    assert (delta[weight == 0] != 0).any()


def test_what_cannot_be_merged_is_refused() -> None:
    model, _, _ = lora("llama")
    with pytest.raises(errors.HyperparameterError, match="variant='mask'"):
        PrunedLora(model, "mask")
    with pytest.raises(errors.EngineError, match="no LoRA layer with an adapter 'other'"):
        PrunedLora(model, "mask_lora", "other")
    model.merge_adapter()
    with pytest.raises(errors.EngineError, match="is merged"):
        PrunedLora(model, "mask_lora")
    dora, _, _ = lora("llama", use_dora=True)
    with pytest.raises(errors.EngineError, match="wanted plain LoRA over a linear layer"):
        PrunedLora(dora, "mask_lora")
    base = tiny.llama()
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    with pytest.raises(errors.HyperparameterError, match=r"lora_dropout=0\.0"):
        PrunedLora(get_peft_model(base, config), "mask_lora")
