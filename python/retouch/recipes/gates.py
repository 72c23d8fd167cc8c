"""Selections that are learned together with a change of the weights."""

from retouch.gates import LearnedGates
from retouch.recipes._registry import Recipe

_REST = (
    " Here the rest of the model, heads and norms among it, is as it was given while the gates are "
    "learned; in your own loop, with retouch.gates.install, all of it can be trained with them."
)
_DIFF_PRUNING = {
    "density": 0.005,
    "target_modules": None,
    "heads": "full",
    "output_embeddings": "masked",
}

Recipe(
    id="taps",
    title="TAPS",
    config={
        "score": LearnedGates(
            gate="straight_through", units="tensor", penalty=1.0, epochs=30, warmup=2, accumulate=8,
            optimizer="sgd", lr=0.01,
        ),
        "threshold": 0.1,
        "granularity": "tensor",
        "convs": "masked",
        "norms": "full",
        "heads": "full",
        "output_embeddings": "masked",
    },
    scores="trained gate of each matrix, straight-through, L1 penalty",
    cost="a training of 30 epochs with twice the weights",
    notes=(
        "The convolutions and linear layers whose gates stay open; norms and heads are trained whole. "
        "The weight of the penalty decides how many. The penalty is divided by the number of gates, as "
        "in the paper; the released code divides by 52 for all models (per=52), steps after the first "
        "batch and then after each eighth, with a cosine schedule." + _REST
    ),
    source="the released code",
    warning="How much of the paper's text agrees with its code we have not read.",
    when="after a training of the gates",
    variant="paper",
    paper="Task Adaptive Parameter Sharing for Multi-Task Learning",
    year=2022,
    arxiv="2203.16708",
)  # fmt: skip

Recipe(
    id="diff-pruning",
    title="Diff pruning",
    config={
        "score": LearnedGates(
            gate="hard_concrete", units="element", by="change", penalty=1.25e-7, per=1, epochs=3,
            optimizer="adamw", lr=1e-5, gate_lr=0.1,
        ),
    } | _DIFF_PRUNING,
    scores="|gate * change|, both trained, hard-concrete gates, L0 penalty",
    cost="a training of 3 epochs with three times the weights",
    notes=(
        "The weights whose learned change is largest after gates have closed on the others; a task "
        "head is trained whole. The released code trains the head with the gates, and lowers both "
        "learning rates linearly." + _REST
    ),
    source="the released code",
    when="after a training of the gates",
    variant="released",
    paper="Parameter-Efficient Transfer Learning with Diff Pruning",
    year=2020,
    arxiv="2012.07463",
)  # fmt: skip

Recipe(
    id="diff-pruning-structured",
    title="Structured diff pruning",
    config={
        "score": LearnedGates(
            gate="hard_concrete", units=("element", "tensor"), by="change", penalty=1.25e-7, per=1,
            epochs=3, optimizer="adamw", lr=1e-5, gate_lr=0.1,
        ),
    } | _DIFF_PRUNING,
    scores="|gate * gate of the tensor * change|, all trained, hard-concrete gates, L0 penalty",
    cost="a training of 3 epochs with three times the weights",
    notes=(
        "As diff-pruning, with a second gate for each tensor, which can close it as a whole. The "
        "penalty is the sum over all gates, as in the released code." + _REST
    ),
    source="the released code",
    when="after a training of the gates",
    variant="released",
    paper="Parameter-Efficient Transfer Learning with Diff Pruning",
    year=2020,
    arxiv="2012.07463",
)  # fmt: skip
