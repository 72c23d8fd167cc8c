"""What a tensor outside of the layers is, by its name."""

import re

__all__ = ["AFTER", "BEFORE", "EMBEDDING", "HEAD", "role"]

# Embedding and head have one row for each token.
EMBEDDING, HEAD, BEFORE, AFTER = "embedding", "head", "before", "after"

_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$"
)
_HEAD = re.compile(  # GPT-NeoX's embed_out is a head
    r"(?:^|\.)(?:(?:lm_head|embed_out|output|predictions\.decoder)\.(?:weight|bias)"
    r"|predictions\.bias|final_logits_bias)$"
)
_BEFORE = re.compile(r"(?:^|[._])(?:emb|embed|embeddings?|wpe)(?:[._]|$)")


def role(name: str) -> str:
    """What a tensor that is in no layer is, by its name: EMBEDDING, HEAD, BEFORE or AFTER."""
    if _EMBEDDING.search(name):
        return EMBEDDING
    if _HEAD.search(name):
        return HEAD
    return BEFORE if _BEFORE.search(name) else AFTER
