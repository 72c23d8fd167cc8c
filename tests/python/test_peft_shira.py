"""The same training as PEFT's SHiRA (Bhardwaj et al., arXiv 2406.13175), run beside it.

SHiRA adds a sparse tensor of changes to a copy of the weight in every forward pass; its gradient is
taken from the dense one. Another engine, so with one mask the losses must be the same.
"""

import peft
import pytest
import tiny
import torch
from torch import nn
from training import positions

import retouch
from retouch.masks import Mask, Selection

R, STEPS = 2, 12  # SHiRA trains r * (n_in + n_out) weights of a layer


def shira(model, mask):
    """PEFT's model with a mask of retouch."""
    names = {id(p): name for name, p in model.named_parameters()}

    def mask_fn(layer, r, **options):
        out = torch.zeros_like(layer.weight)
        out.view(-1)[mask[names[id(layer.weight)]].flat().long()] = 1
        return out

    config = peft.ShiraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM")
    config.mask_fn = mask_fn
    return peft.get_peft_model(model, config)


def losses(model, optimizer):
    out = []
    for step in range(STEPS):
        loss = model(**tiny.text(seed=step % 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("gradient", ["sampled", "dense"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, retouch.AdamW], ids=["torch", "retouch"])
def test_the_same_losses_and_weights_as_shira(gradient, optimizer):
    model = tiny.llama()
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    }
    chosen = {}
    for seed, (name, layer) in enumerate(layers.items()):
        shape = tuple(layer.weight.shape)
        index = positions(layer.weight.numel(), R * sum(shape), seed)
        chosen[name] = Selection("elements", shape, index)
    mask = Mask(chosen, model)
    theirs = shira(tiny.llama(), mask)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == mask.count
    options = {"lr": 3e-2, "weight_decay": 0.0}
    want = losses(theirs, torch.optim.AdamW(trained, **options))
    got = losses(model, retouch.wrap(optimizer, mask, model, gradient=gradient, **options))
    assert want[-1] < 0.97 * want[0]  # moves by far more than the two may differ
    assert got == pytest.approx(want, rel=1e-5)
    retouch.unwrap(model)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(model.state_dict(), merged.state_dict(), rtol=1e-4, atol=1e-5)
