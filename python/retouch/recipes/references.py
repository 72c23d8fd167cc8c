"""Selections by the difference to another model."""

from retouch.recipes._registry import Recipe
from retouch.scores import Difference

_HOW = (
    " Select on the base and pass the tuned model: select(base, ..., "
    "score=retouch.scores.Difference(tuned))."
)

Recipe(
    id="lt-sft",
    title="LT-SFT, one round",
    config={
        "score": Difference(),
        "density": 0.01,
        "target_modules": None,
        "heads": "full",
        "output_embeddings": "masked",
    },
    scores="|tuned - base|",
    cost="a full fine-tuning before",
    notes=(
        "The weights that a full fine-tuning moved most; a task head is trained whole. The released "
        "code can do this in several rounds, and adds an L1 penalty." + _HOW
    ),
    source="the released code",
    variant="released",
    paper="Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
    year=2021,
    arxiv="2110.07560",
)

Recipe(
    id="lota",
    title="LoTA",
    config={"score": Difference(), "density": 0.1},
    scores="|tuned - base|",
    cost="a full fine-tuning before, or its first steps",
    notes="The tenth of the weights of attention and MLPs that a full fine-tuning moved most."
    + _HOW,
    source="the released code",
    variant="released",
    paper="Lottery Ticket Adaptation: Mitigating Destructive Interference in LLMs",
    year=2024,
    arxiv="2406.16797",
)

Recipe(
    id="rl-subnetwork",
    title="Subnetwork of RL",
    config={
        "score": Difference(),
        "threshold": 1e-45,  # the smallest float32 above 0
        "target_modules": None,
    },
    scores="|tuned - base|",
    cost="a reinforcement learning before",
    notes=(
        "Every weight that a run of reinforcement learning has changed at all, to train those alone "
        "from the base again. In 16 bits far fewer weights change than in 32: give both models in "
        "the dtype of the run." + _HOW
    ),
    source="the released code",
    variant="released",
    paper="Reinforcement Learning Finetunes Small Subnetworks in Large Language Models",
    year=2025,
    arxiv="2505.11711",
)
