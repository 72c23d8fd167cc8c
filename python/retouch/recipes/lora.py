"""Selections in PEFT models: of the factors of their LoRAs, or beside them."""

from typing import Any

from retouch.recipes._modules import LORA_BASES, LORA_FACTORS
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
