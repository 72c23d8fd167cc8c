"""Selections that move during training: rows with a schedule.

`retouch.wrap(retouch.AdamW, "lisa", model)` and the Trainer follow it. Change parts of it by
`SelectConfig.named("lisa", k=4, schedule={"every": 5})`.
"""

from typing import Any

from retouch.recipes._modules import ATTENTION_INPUTS, IN_LAYERS, OUTSIDE_LAYERS
from retouch.recipes._registry import Recipe
from retouch.schedules import Schedule
from retouch.scores import D3, Fisher, Gradient, GradStat, LowRankMagnitude, Moved

_LAYERS: dict[str, Any] = {"target_modules": IN_LAYERS, "granularity": "layer"}
_FREES = " The state of layers that are frozen again is freed."

Recipe(
    id="lisa",
    title="LISA",
    config=_LAYERS
    | {
        "direction": "random",
        "k": 2,
        "modules_to_save": OUTSIDE_LAYERS,
        "schedule": Schedule(every=20),
    },
    scores="chance",
    cost="none",
    when="every 20 steps",
    notes=(
        "Two layers at random, and all that is in no layer. The released code leaves the state of "
        "every layer that was ever active in memory; here it is freed. To keep it, on the CPU: "
        "schedule={'state': 'keep'}."
    ),
    source="the paper and the released code",
    variant="paper",
    paper="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    year=2024,
    arxiv="2403.17919",
)

_BADAM: dict[str, Any] = {
    "source": "the released code",
    "variant": "released",
    "paper": "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    "year": 2024,
    "arxiv": "2404.02827",
}

Recipe(
    id="badam",
    title="BAdam",
    config=_LAYERS
    | {
        "direction": "random",
        "k": 1,
        "schedule": Schedule(every=50, change="cycle", order="descending", state="reset"),
    },
    scores="position",
    cost="none",
    when="every 50 steps",
    notes=(
        "One layer after the other, from the last to the first, each with fresh state. Embeddings "
        "and head are frozen, unless modules_to_save says otherwise. Other orders: "
        "schedule={'order': 'shuffled'}. The code's own checkpoints hold the active block alone; "
        "here a run resumes bit for bit."
    ),
    **_BADAM,
)

Recipe(
    id="badam-ratio",
    title="BAdam, ratio",
    config={
        "direction": "random",
        "density": 0.1,
        "scope": "tensor",
        "schedule": Schedule(every=100, change="cycle", order="shuffled", state="reset"),
    },
    scores="chance",
    cost="none",
    when="every 100 steps",
    notes=(
        "A tenth of every linear weight, another each time, until all have had their turn: the "
        "code's 'scatter'. Its 'adjacent': schedule={'order': 'ascending'}."
    ),
    **_BADAM,
)

Recipe(
    id="spiel",
    title="SpIEL-AG",
    config={
        "score": Gradient(),
        "density": 0.01,
        "scope": "tensor",
        "schedule": Schedule(
            every=100,
            collect=5,
            change="drop_grow",
            initial="random",
            rewind="dropped",
            drop_first=1.0,
            drop=0.2,
            ramp="linear",
            rounds=30,
            state="seeded",
        ),
    },
    scores="|sum of 5 gradients|, and the way from the base",
    cost="dense gradients in 5 of 100 steps",
    when="every 100 steps",
    notes=(
        "Drops what has moved least, which goes back to the base, and takes on as many with the "
        "largest gradients, whose moments start from those; each weight has a clock of its own. All "
        "of the random start is replaced at first, later a fifth, down to nothing after `rounds` "
        "changes: set it to the number of steps / 100. The released code looks only at the best of "
        "the first gradient, to save memory; its clocks stand still for 16-bit values."
    ),
    source="the released code",
    variant="released",
    paper="Scaling Sparse Fine-Tuning to Large Language Models",
    year=2024,
    arxiv="2401.16405",
)

Recipe(
    id="sift-first-step",
    title="SIFT, first gradient",
    config={
        "score": Gradient(),
        "density": 0.05,
        "scope": "tensor",
        "schedule": Schedule(collect=1, now=True),
    },
    scores="|gradient of the first step|",
    cost="one dense gradient",
    when="at the first step",
    notes=(
        "As in the released code, the first batch of the training chooses; there, it is not trained "
        "on, and the last step is lost. Gradient clipping sees the dense gradient at that step."
    ),
    source="the released code",
    variant="released",
    paper="Sparse is Enough in Fine-tuning Pre-trained Large Language Models",
    year=2023,
    arxiv="2312.11875",
)

_ID3: dict[str, Any] = {
    "cost": "a dense gradient at every step of the growth",
    "when": "at every step, growing",
    "source": "the released code",
    "paper": "Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models",
    "year": 2024,
    "arxiv": "2408.14470",
}
_GROWS = Schedule(every=1, collect=1, now=True, change="grow", ramp="linear", rounds=1000)
_ID3_NOTES = (
    " The budget is reached after `rounds` steps, of which each adds the same number: set it to "
    "the number of steps. The released code lets momentum and decay move what is masked, and "
    "selects too many where scores are equal. Gradient clipping sees dense gradients."
)

Recipe(
    id="id3",
    title="ID3",
    config={
        "score": D3(),
        "density": 0.005,
        "target_modules": None,
        "schedule": _GROWS,
    },
    scores="|gradient| / (|weight| + 0.001)",
    variant="paper",
    notes="Exponent 1 of the score D3: the relative change." + _ID3_NOTES,
    **_ID3,
)

Recipe(
    id="id3-released",
    title="ID3, exponent 0",
    config={
        "score": Gradient(),
        "density": 0.005,
        "target_modules": None,
        "schedule": _GROWS,
    },
    scores="|gradient|",
    variant="released",
    notes="Exponent 0, as in the examples of the code." + _ID3_NOTES,
    **_ID3,
)

Recipe(
    id="gmt",
    title="GMT",
    config={
        "score": Gradient(),
        "density": 0.2,
        "scope": "tensor",
        "schedule": Schedule(every=1, collect=1, now=True, state="keep"),
    },
    scores="|gradient of the step|",
    cost="a dense gradient at every step",
    when="at every step",
    notes=(
        "The largest fifth of each matrix's accumulated gradient moves, at every step anew. What is "
        "masked is frozen with its moments, exactly; in re-implementations it drifts by momentum and "
        "decay. All moments are held after a while, most of them on the CPU."
    ),
    source="summaries of the paper, and a re-implementation",
    variant="paper",
    warning="We have not read the paper itself.",
    paper="Enhancing Large Language Model Performance with Gradient-Based Parameter Selection",
    year=2024,
    arxiv="2406.15330",
)

_GRADES: dict[str, Any] = {
    "cost": "a sum over the selected at every step",
    "when": "at every step, freezing",
    "paper": "GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping",
    "year": 2025,
    "arxiv": "2509.01842",
}
_WHOLE: dict[str, Any] = {"direction": "random", "granularity": "tensor", "density": 1.0}
_THRESHOLD = (
    " No threshold fits another model or learning rate: watch a run and set threshold and start, "
    "which is a third to a half of the steps in the paper. State is freed; the Trainer stops when "
    "all is frozen. Mean per weight, which does not grow with the matrix: signal='grad_l1_mean'."
)

Recipe(
    id="grades",
    title="GradES",
    config=_WHOLE
    | {"schedule": Schedule(every=1, start=100, change="freeze", signal="grad_l1", threshold=0.02)},
    scores="L1 norm of the gradient",
    notes="Freezes each linear weight for good when its gradient has become small." + _THRESHOLD,
    source="summaries of the first version of the paper",
    variant="paper",
    warning="Later versions of the paper take the change of the gradient: signal='grad_change_l1'.",
    **_GRADES,
)

Recipe(
    id="grades-released",
    title="GradES, released code",
    config=_WHOLE
    | {
        "schedule": Schedule(
            every=1, start=100, change="freeze", signal="weight_change_l1", threshold=1e-4
        )
    },
    scores="L1 norm of the last change of the weights",
    notes=(
        "As `grades`, by how far a step has moved the matrix, which a falling learning rate makes "
        "small as well." + _THRESHOLD
    ),
    source="the released code",
    variant="released",
    **_GRADES,
)

Recipe(
    id="lt-sft-rewind",
    title="LT-SFT",
    config={
        "score": Moved(),
        "density": 0.01,
        "target_modules": None,
        "schedule": Schedule(start=100, initial="all", rewind="all"),
    },
    scores="|change by dense training|",
    cost="full fine-tuning for `start` steps",
    when="once, after `start` steps",
    notes=(
        "Trains everything, selects what has moved most, puts all weights back and trains those. "
        "Set start to the length of the first phase. With a tuned model at hand: `lt-sft`."
    ),
    source="the released code",
    variant="released",
    paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
    year=2021,
    arxiv="2110.07560",
)

Recipe(
    id="smt-warmup",
    title="SMT, warm-up",
    config={
        "score": GradStat(outer="mean"),
        "granularity": "block",
        "block_size": 256,
        "aggregate": "abs_of_mean",
        "density": 0.07,
        "target_modules": ATTENTION_INPUTS,
        "schedule": Schedule(start=100, collect=100, initial="all"),
    },
    scores="|mean gradient of a block|",
    cost="full fine-tuning of queries, keys and values for 100 steps",
    when="once, after 100 steps",
    notes="As `smt`, with the gradients of a warm-up in which all candidates are trained.",
    source="the released code",
    variant="released",
    warning="Whether the authors keep what the warm-up has trained is not clear; here it is kept.",
    paper="SMT: Fine-Tuning Large Language Models with Sparse Matrices",
    year=2024,
    arxiv="2405.15525",
)

Recipe(
    id="lift-refresh",
    title="LIFT",
    config={
        "score": LowRankMagnitude(rank=128),
        "lora_rank": 128,
        "schedule": Schedule(every=200),
    },
    scores="|weight| at rank 128",
    cost="an eigendecomposition for each weight matrix, every 200 steps",
    when="every 200 steps",
    notes=(
        "As `lift`, chosen anew from the trained weights. Survivors keep their moments, newcomers "
        "start at 0 with a clock of their own."
    ),
    source="the released code",
    variant="released",
    paper=(
        "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for "
        "Reasoning-Focused Supervised Fine-Tuning"
    ),
    year=2025,
    arxiv="2506.00772",
)

Recipe(
    id="fish-epochs",
    title="FISH Mask, every epoch",
    config={
        "score": Fisher(),
        "density": 0.005,
        "target_modules": None,
        "heads": "full",
        "output_embeddings": "masked",
        "counted_in_budget": True,
        "samples": 1024,
        "schedule": Schedule(every=1, unit="epoch"),
    },
    scores="sum of squared gradients of samples",
    cost="1024 samples, every epoch",
    when="every epoch",
    notes=(
        "As `fish`, chosen anew at the end of every epoch: what the authors do from scratch, where a "
        "fixed mask is bad. Needs data= in retouch.wrap, and its loop calls "
        "get_engine(model).mover.new_epoch(); the Trainer does both."
    ),
    source="the released code",
    variant="released",
    paper="Training Neural Networks with Fixed Sparse Masks",
    year=2021,
    arxiv="2111.09839",
)

Recipe(
    id="irepair",
    title="IRepair",
    config=_LAYERS
    | {
        "score": GradStat(outer="mean"),
        "aggregate": "l2",
        "k": 1,
        "schedule": Schedule(every=1, collect=1, now=True),
    },
    scores="norm of a layer's gradient",
    cost="a dense gradient at every step",
    when="at every step",
    notes=(
        "The one layer that the loss of this very batch is most sensitive to. One selection for all "
        "of its layers: `irepair-fixed`." + _FREES
    ),
    source="summaries of the paper",
    variant="paper",
    warning="No code was found.",
    paper="IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models",
    year=2025,
    arxiv="2502.07072",
)
