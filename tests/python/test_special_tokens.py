"""Vectors at special tokens (PASTA) on real encoders."""

import pytest
import tiny
import torch
from torch import Tensor, nn
from training import assert_same, snapshot
from transformers import BertConfig, BertModel

from retouch import errors
from retouch.special_tokens import SpecialTokenVectors

CLS, SEP = 1, 2


def batch() -> dict[str, Tensor]:
    ids = tiny.tokens(4, 8).clamp(min=3)
    ids[:, 0] = CLS
    ids[:, 4] = SEP
    ids[2, 7] = SEP
    return {"input_ids": ids, "labels": torch.arange(4) % 3}


def hidden(model) -> tuple[Tensor, ...]:
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    return model(**inputs, output_hidden_states=True).hidden_states


def test_the_count_of_the_paper() -> None:
    """24 layers, 3 special tokens, width 1024: 73 728."""
    with torch.device("meta"):
        model = BertModel(
            BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
        )
    assert SpecialTokenVectors(model, [101, 102], count=3).vectors.numel() == 73_728


@pytest.mark.parametrize("training", [False, True])
def test_zero_vectors_are_the_base(training: bool) -> None:
    model = tiny.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
    want = model(**batch()).logits
    before = snapshot(model)
    vectors = SpecialTokenVectors(model, [CLS, SEP], count=3, dropout=0.1)
    assert torch.equal(model(**batch()).logits, want)
    vectors.remove()
    assert_same(before, snapshot(model))
    assert torch.equal(model(**batch()).logits, want)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_vector_acts_at_its_token_and_from_its_layer_on() -> None:
    model = tiny.bert().eval()
    base = hidden(model)
    vectors = SpecialTokenVectors(model, [CLS, SEP], count=3)
    with torch.no_grad():
        vectors.vectors[1, 2] = 1.0  # the third special token, which sample 2 alone has
    now = hidden(model)
    assert torch.equal(base[0], now[0]) and torch.equal(base[1], now[1])
    changed = (base[2] != now[2]).any(-1).any(-1)
    assert changed.tolist() == [False, False, True, False]
    # in the last layer, without its attention, the vector would change its own position alone
    seen: list[Tensor] = []
    layer = model.bert.encoder.layer[1]
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    hidden(model)
    moved = (seen[0] != base[1]).any(-1)
    assert moved.nonzero().tolist() == [[2, 7]]
    torch.testing.assert_close(seen[0][2, 7], base[1][2, 7] + 1.0)


def test_it_learns_and_moves_nothing_else() -> None:
    model = tiny.bert().train()
    vectors = SpecialTokenVectors(model, [CLS, SEP], count=3)
    model.requires_grad_(False)
    vectors.requires_grad_(True)
    model.classifier.requires_grad_(True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"special_token_vectors.vectors", "classifier.weight", "classifier.bias"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with torch.no_grad():
        first = model.eval()(**batch()).loss.item()
    model.train()
    for _ in range(20):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.eval()(**batch()).loss.item() < first - 0.03
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name
    assert (vectors.vectors.detach().abs().amax(-1) > 0).all()
    other = tiny.bert()  # what was learned goes with the checkpoint
    SpecialTokenVectors(other, [CLS, SEP], count=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(**batch()).logits, model(**batch()).logits)


def test_mistakes() -> None:
    model = tiny.bert()
    with pytest.raises(errors.HyperparameterError, match="count=0"):
        SpecialTokenVectors(model, [CLS], count=0)
    with pytest.raises(errors.EngineError, match="wanted exactly one list"):
        SpecialTokenVectors(nn.Linear(2, 2), [CLS], count=1)
    vectors = SpecialTokenVectors(model, [CLS, SEP], count=3)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(errors.EngineError, match="do not work with gradient checkpointing"):
        model.train()(**batch())
    vectors.remove()
    model.eval()
    SpecialTokenVectors(model, [CLS, SEP], count=2)
    with pytest.raises(errors.EngineError, match="has vectors already"):
        SpecialTokenVectors(model, [CLS], count=1)
    with pytest.raises(errors.ShapeError, match="sample 2 of a batch has 3 special tokens"):
        model(**batch())
    with pytest.raises(errors.ShapeError, match="without input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(errors.EngineError, match="without its model"):
        model.bert(input_ids=batch()["input_ids"])
