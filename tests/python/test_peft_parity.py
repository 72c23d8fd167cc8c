"""The same choice and the same training as the adapters of PEFT that train single weights."""

import copy

import peft
import pytest
import torch
from tiny_hf import llama, tokens

import retouch

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches() -> list[dict[str, torch.Tensor]]:
    samples = tokens(24)
    return [
        {k: torch.stack([s[k] for s in samples[i : i + 8]]) for k in samples[0]}
        for i in range(0, 24, 8)
    ]


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    seen = []
    for batch in batches() * 2:
        loss = model(**batch).loss
        seen.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def trained(model: torch.nn.Module, mask: retouch.Mask) -> list[float]:
    return losses(model, retouch.wrap(torch.optim.AdamW, mask, model, lr=1e-2, weight_decay=0.0))


def adapted(model: torch.nn.Module) -> list[float]:
    values = [p for p in model.parameters() if p.requires_grad]
    return losses(model, torch.optim.AdamW(values, lr=1e-2, weight_decay=0.0))


@pytest.mark.parametrize("direction", ["top", "bottom"])
def test_supertuning(direction: str) -> None:
    model = llama()
    mask = retouch.select(model, "supertuning", direction=direction)
    config = peft.SupertuningConfig(target_modules=LINEAR, select_top=direction == "top")
    other = peft.get_peft_model(copy.deepcopy(model), config)
    chosen = {
        n.removeprefix("base_model.model.") + ".weight": m.supertuning_indices["default"]
        for n, m in other.named_modules()
        if hasattr(m, "supertuning_indices")
    }
    assert chosen.keys() == set(mask)
    for name, positions in chosen.items():
        assert positions.sort().values.tolist() == mask[name].flat().tolist()
    assert trained(model, mask) == pytest.approx(adapted(other), abs=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_shira_with_the_same_mask() -> None:
    model = llama()
    mask = retouch.select(model, "shira-wm", lora_rank=1)
    by_weight = {id(p): mask[n] for n, p in model.named_parameters() if n in mask}

    def mask_fn(base_layer, r, **_):
        selection = by_weight[id(base_layer.weight)]
        on = torch.zeros(selection.numel)
        on[selection.flat().long()] = 1.0
        return on.view(selection.shape)

    config = peft.ShiraConfig(r=1, target_modules=LINEAR)
    config.mask_fn = mask_fn
    theirs = copy.deepcopy(model)
    by_weight |= {id(p): mask[n] for n, p in theirs.named_parameters() if n in mask}
    other = peft.get_peft_model(theirs, config)
    assert sum(p.numel() for p in other.parameters() if p.requires_grad) == mask.count
    assert trained(model, mask) == pytest.approx(adapted(other), abs=1e-4)


def test_kappatune_ranks_as_peft_does() -> None:
    model = llama()
    ranked = peft.helpers.KappaTuneSelector(model, show_progress=False).get_best_targets()
    ranked.remove("lm_head")  # PEFT ranks the output layer too
    for k in (2, 5, 14):
        mask = retouch.select(model, "kappatune", k=k)
        assert set(mask) == {f"{name}.weight" for name in ranked[:k]}
