"""Selections by what goes into the layers, without gradients."""

from typing import Any

from retouch.recipes._registry import Recipe
from retouch.scores import Wanda

_SSU: dict[str, Any] = {
    "cost": "a forward pass of 500 samples",
    "paper": (
        "Mitigating Catastrophic Forgetting in Target Language Adaptation of LLMs via "
        "Source-Shielded Updates"
    ),
    "year": 2025,
    "arxiv": "2512.04844",
}
_SHIELD: dict[str, Any] = {
    "granularity": "column",
    "polarity": "freeze",
    "density": 0.5,
    "scope": "tensor",
    "embeddings": "full",
    "heads": "full",
    "samples": 500,
}
_SHIELD_NOTES = (
    "Freezes the half of the input features of each linear layer that matter most for what the "
    "model knows, and trains the rest: data are samples of the source, not of the target. "
    "Embeddings and the output are trained whole; the paper freezes the rows of special tokens in "
    "them: mask - Mask.from_tokens(model, ids). The paper also trains half of each norm; here "
    "they are frozen."
)

Recipe(
    id="ssu",
    title="SSU",
    config={"score": Wanda(), "aggregate": "sum"} | _SHIELD,
    scores="sum of |weight| * norm of input",
    notes=_SHIELD_NOTES,
    source="notes on the paper, and the released code",
    variant="paper",
    **_SSU,
)

Recipe(
    id="ssu-released",
    title="SSU, released code",
    config={"score": Wanda(statistic="mean_square"), "aggregate": "l2"} | _SHIELD,
    scores="norm of weights * mean square of input",
    notes=_SHIELD_NOTES
    + " The code scores a column by its norm times the mean square of its input.",
    source="the released code",
    variant="released",
    **_SSU,
)

Recipe(
    id="supertuning-wanda",
    title="Super-Tuning, Wanda",
    config={"score": Wanda(), "density": 0.01, "scope": "tensor", "samples": 128},
    scores="|weight| * norm of input",
    cost="a forward pass of 128 samples",
    notes=(
        "The 1 % of each linear layer that Wanda would prune last; direction='bottom' takes those "
        "that it would prune first, which the authors try too. Calibrated on C4 in the paper; the "
        "budget there is lora_rank=8, over all layers together."
    ),
    source="the readme of the released code",
    warning="That the scores are ranked within each matrix is our reading.",
    variant="released",
    paper="Super-Tuning: From Activation-Aware Pruning to Sparse Fine-Tuning",
    year=2026,
    arxiv="2607.09287",
)
