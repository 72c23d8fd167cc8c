"""Selections in PEFT models: of the factors of their LoRAs, or beside them."""

from typing import Any

from retouch.gates import LearnedGates
from retouch.recipes._modules import LORA_A, LORA_B, LORA_BASES, LORA_FACTORS
from retouch.recipes._registry import Recipe
from retouch.schedules import Schedule
from retouch.scores import Fisher

_LORA_SP: dict[str, Any] = {
    "scores": "chance",
    "cost": "none",
    "source": "the abstract, and an account of the paper",
    "paper": (
        "LoRA-SP: Streamlined Partial Parameter Adaptation for Resource-Efficient Fine-Tuning of "
        "Large Language Models"
    ),
    "year": 2024,
    "arxiv": "2403.08822",
    "variant": "paper",
}
_HALF: dict[str, Any] = {
    "direction": "random",
    "density": 0.5,
    "scope": "tensor",
    "target_modules": LORA_FACTORS,
}
_HALF_NOTES = (
    " For a model of PEFT. What is frozen keeps its first value, which is 0 in B. Whole rank indices: "
    "granularity='row', exclude_modules of B; with A frozen and B trained it is LoRA-FA: "
    "density=1.0, exclude_modules=r'.*lora_A.*'."
)

Recipe(
    id="lora-sp",
    title="LoRA-SP",
    config=_HALF,
    notes="Trains a random half of each factor of the LoRAs." + _HALF_NOTES,
    warning="The abstract speaks of a half; that single elements of each factor are drawn is ours.",
    **_LORA_SP,
)

Recipe(
    id="lora-sp-redrawn",
    title="LoRA-SP, drawn at every step",
    config=_HALF | {"schedule": Schedule(every=1, state="keep")},
    when="at every step",
    notes="As `lora-sp`, another half at every step; moments of what is frozen wait." + _HALF_NOTES,
    warning="That the half is drawn again at every step is from one account of the paper.",
    **_LORA_SP,
)

Recipe(
    id="rosa-warmup",
    title="RoSA, LoRA and sparse",
    config={
        "score": Fisher(level="batch"),
        "density": 0.003,
        "scope": "tensor",
        "target_modules": LORA_BASES,
        "modules_to_save": LORA_FACTORS,
        "schedule": Schedule(start=64, collect=1),
    },
    scores="squared gradient of one step",
    cost="one dense gradient",
    when="once, after 64 steps",
    notes=(
        "For a model of PEFT with LoRAs: trains their factors alone for `start` steps, takes the "
        "gradient of the weights beneath them in the last of these, and then trains the best of each "
        "too: the schedule wl64 of the authors. Without a LoRA: `rosa`. The mean of several steps: "
        "score=GradStat(outer='mean', post='abs'), schedule={'collect': 4}."
    ),
    source="the released code",
    warning="How many steps the LoRA is trained alone is set by the user there; 64 is ours.",
    variant="released",
    paper="RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation",
    year=2024,
    arxiv="2401.04679",
)

_CODYRA: dict[str, Any] = {
    "cost": "a training of 10 epochs of the factors B",
    "when": "after a training of the gates",
    "source": "the released code",
    "paper": (
        "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning "
        "Vision-Language Models with Dynamic Rank-Selective LoRA"
    ),
    "year": 2024,
    "arxiv": "2412.01004",
}
_OPEN_RANKS: dict[str, Any] = {
    "threshold": 1e-45,  # the smallest float32 above 0
    "granularity": "column",
    "target_modules": LORA_B,
    "modules_to_save": LORA_A,
}
_CODYRA_NOTES = (
    " For a model of PEFT: a gate on each column of B, which is a rank, is trained with B and closed "
    "by soft thresholds that rise in the second half; what is open is then trained, with all of A. In "
    "the paper A, B and gates are trained together and merged after each task: "
    "retouch.gates.install(model, 'codyra'), gates.shrink(kappa) after each step, and at the end "
    "gates.remove(keep=mask), which keeps what was learned."
)

Recipe(
    id="codyra",
    title="CoDyRA, ranks",
    config=_OPEN_RANKS
    | {
        "score": LearnedGates(
            gate="proximal", units="column", penalty=0.005, epochs=10, warmup=5, optimizer="adamw",
            lr=5e-4,
        ),
    },
    scores="trained gate of each rank, soft-thresholded",
    notes="Ranks whose gates are not 0 after proximal steps." + _CODYRA_NOTES,
    warning=(
        "The paper's gates start from normal noise, ours from 1; thresholds rise by epochs, not in 50 "
        "levels of the second half of 500 steps."
    ),
    variant="paper",
    **_CODYRA,
)  # fmt: skip

Recipe(
    id="codyra-released",
    title="CoDyRA, released code",
    config=_OPEN_RANKS
    | {
        "score": LearnedGates(
            gate="proximal_released", units="column", penalty=0.005, epochs=10, warmup=5,
            optimizer="adamw", lr=5e-4,
        ),
    },
    scores="trained gate of each rank, soft-thresholded, then cut",
    notes="As `codyra`, in the order of the code, which closes gates up to twice the threshold."
    + _CODYRA_NOTES,
    warning="As of `codyra`.",
    variant="released",
    **_CODYRA,
)  # fmt: skip
