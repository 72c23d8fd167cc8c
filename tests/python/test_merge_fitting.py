"""AdaMerging: the gradient of the weights, the same as through the merge itself, and real merges of it."""

import pytest
import torch
from deltas import llama
from safetensors.torch import load_file
from test_merge_collect import data, tuned
from torch import nn
from torch.func import functional_call

import retouch
from retouch.errors import BaseMismatchError, HyperparameterError, LayoutError, ScoreError
from retouch.merge import entropy, fit_weights


def base_model():
    return llama(tie_word_embeddings=False).eval()


def sparse(seed, share=0.05):
    """A model of which a share of the elements of each matrix differs from the base."""
    model = base_model()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p += (
                    0.5
                    * torch.randn(p.shape, generator=gen)
                    * (torch.rand(p.shape, generator=gen) < share)
                )
    return model


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def test_the_gradient_of_a_weight_is_the_gradient_along_the_task_vector():
    """The six elements of the sheet (merging.md §2.21.6): dL/dW = 1 everywhere."""
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    vectors = {
        "A": torch.tensor([[0.5, -0.25, 0, 1, -0.125, 0.25]]),
        "B": torch.tensor([[0.25, 0.5, -0.5, -0.25, -0.125, 0]]),
    }
    deltas = {}
    for name, vector in vectors.items():
        deltas[name] = retouch.Delta.between(
            {"weight": model.weight.detach()}, {"weight": model.weight.detach() + vector}
        )

    def total(model, batch):
        return model(batch).sum()

    # L = sum(W) is linear in the weights, with slopes 1.375 and -0.125: one goes down, the other up
    found = fit_weights(
        model, deltas, {"task": torch.ones(1, 6)}, steps=3, lr=0.1, loss_fn=total, clamp=False
    )
    assert found.losses[0] == pytest.approx(6 + 0.3 * (1.375 - 0.125))
    assert found.weights["A"]["weight"] == pytest.approx(0.0, abs=1e-5)
    assert found.weights["B"]["weight"] == pytest.approx(0.6, abs=1e-5)
    moved = 1.375 * -0.2 - 0.125 * 0.2
    assert found.losses[2] == pytest.approx(found.losses[0] + moved, abs=1e-5)
    clamped = fit_weights(
        model, deltas, {"task": torch.ones(1, 6)}, steps=20, lr=0.1, loss_fn=total
    )
    assert clamped.weights == {"A": {"weight": 0.0}, "B": {"weight": 1.0}}


@pytest.mark.parametrize("level", ["tensor", "task"])
def test_as_through_a_differentiable_merge(level):
    """Against torch's own autograd through base + sum of weighted task vectors."""
    model, others = base_model(), [tuned(1), sparse(2)]
    deltas = {f"m{i}": retouch.Delta.between(model, other) for i, other in enumerate(others)}
    tasks = {"a": data(1), "b": data(2, batches=1)}
    before = bits(model)
    got = fit_weights(model, deltas, tasks, level=level, steps=4, lr=0.05)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    base = {n: p.detach() for n, p in model.named_parameters()}
    vectors = [{n: p.detach() - base[n] for n, p in m.named_parameters()} for m in others]
    names = list(base)
    weights = torch.full((len(names) if level == "tensor" else 1, 2), 0.3, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.05)
    losses = []
    for step in range(4):
        rows = [i if level == "tensor" else 0 for i in range(len(names))]
        merged = {
            n: base[n] + sum(weights[i, t] * v[n] for t, v in enumerate(vectors))
            for i, n in zip(rows, names, strict=True)
        }
        loss = 0
        for batches in tasks.values():
            ids = batches[step % len(batches)]["input_ids"]
            logits = functional_call(model, merged, kwargs={"input_ids": ids}).logits
            loss = loss + torch.distributions.Categorical(logits=logits).entropy().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            weights.clamp_(0, 1)
        losses.append(loss.item())
    assert got.losses == pytest.approx(losses, rel=1e-4)
    for t in range(2):
        for i, name in zip(rows, names, strict=True):
            if name in got.weights[f"m{t}"]:
                assert got.weights[f"m{t}"][name] == pytest.approx(weights[i, t].item(), abs=2e-3)
    assert got.losses[-1] < got.losses[0]


def test_from_deltas_to_a_merged_checkpoint(tmp_path):
    """What it found is what `retouch.merge` is told, also where one name contains another."""
    model, others = base_model(), [sparse(3), sparse(4)]
    model.save_pretrained(tmp_path / "base")
    deltas = {}
    for i, other in enumerate(others):
        deltas[f"d{i}"] = retouch.Delta.between(model, other)
        deltas[f"d{i}"].save_pretrained(tmp_path / f"d{i}")
    found = fit_weights(model, deltas, {"a": data(5), "b": data(6)}, steps=6, lr=0.05)
    assert found.losses[-1] < found.losses[0]
    retouch.merge(
        [tmp_path / "d0", tmp_path / "d1"], tmp_path / "out", base=tmp_path / "base",
        method="task_arithmetic", parameters=found.parameters(), report=False,
    )  # fmt: skip
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = dict(model.named_parameters())
    for name, tensor in merged.items():
        want = base[name].detach().clone()
        for i, other in enumerate(others):
            weight = found.weights[f"d{i}"].get(name, 0.0)
            want += weight * (other.state_dict()[name] - base[name].detach())
        assert torch.allclose(tensor, want, atol=1e-6), name
    values = {v for weights in found.weights.values() for v in weights.values()}
    assert len(values) > 10  # the weights of tensors differ


def test_padding_does_not_count_and_tied_names_are_all_there():
    model = llama(tie_word_embeddings=True).eval()
    ids = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    every = torch.distributions.Categorical(logits=logits).entropy()
    got = entropy(model, {"input_ids": ids, "attention_mask": mask})
    assert got.item() == pytest.approx(every[mask.bool()].mean().item(), rel=1e-5)

    other = llama(tie_word_embeddings=True).eval()
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.1
    delta = {"d": retouch.Delta.between(model, other)}
    found = fit_weights(model, delta, {"a": {"input_ids": ids}}, steps=2, lr=0.1).weights["d"]
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] != 0.3


def test_refusals_leave_the_model_as_it_was():
    model, batches = base_model(), {"a": data(1)}
    delta = {"d": retouch.Delta.between(model, sparse(1))}
    before = bits(model)

    def refused(error, match, *args, **options):
        with pytest.raises(error, match=match):
            fit_weights(model, *args, **options)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    refused(HyperparameterError, "level='layer'", delta, batches, level="layer")
    refused(HyperparameterError, "at least one delta", {}, batches)
    refused(HyperparameterError, "at least one delta", delta, {})
    refused(HyperparameterError, "the data of at least one task", delta, data(1))
    refused(HyperparameterError, "d is no Delta: see Delta.load", {"d": "folder"}, batches)
    refused(HyperparameterError, "steps=0", delta, batches, steps=0)
    refused(ScoreError, "the data of a have no batch", delta, {"a": []})
    nan = lambda model, batch: model(**batch).loss * float("nan")  # noqa: E731
    refused(ScoreError, "the loss of a is nan at step 0", delta, batches, loss_fn=nan)
    refused(
        HyperparameterError, "change nothing", {"d": retouch.Delta.between(model, model)}, batches
    )
    elsewhere = {"d": retouch.Delta.between({"x": torch.zeros(2)}, {"x": torch.ones(2)})}
    refused(LayoutError, "x is no float parameter of LlamaForCausalLM", elsewhere, batches)
    other = {"d": retouch.Delta.between(tuned(1), tuned(2))}
    refused(BaseMismatchError, "not the base of the delta", other, batches)
