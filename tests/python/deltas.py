"""Small models, changes to them and comparisons of bits, for the tests of deltas."""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip
STRANGE = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 1.0, 448.0]


def llama(**kwargs):
    """Tied, 2 layers; the same weights at every call."""
    torch.manual_seed(0)
    config = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | kwargs))


def bits(state):
    """The raw bytes of every tensor."""
    return {
        n: t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for n, t in state.items()
    }


def same(a, b):
    """Whether two state dicts hold the same bits."""
    a, b = bits(a), bits(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def nudged(model, fraction=0.01, seed=1):
    """A copy of a state dict in which a fraction of each float matrix differs."""
    gen = torch.Generator().manual_seed(seed)
    out = {}
    for name, t in model.state_dict().items():
        move = torch.rand(t.shape, generator=gen) < fraction
        out[name] = torch.where(move, t + 1, t)
    if "lm_head.weight" in out:  # tied
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


def llama_with(state):
    """Another model of these weights."""
    model = llama()
    model.load_state_dict(state)
    return model
