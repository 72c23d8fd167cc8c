"""Selections by kind or by chance: no scores, no data."""

from typing import Any

from retouch.recipes._modules import (
    EVERYTHING,
    IN_LAYERS,
    LAST_OF_MLP,
    LAYERS_9_TO_14,
    OUTSIDE_LAYERS,
)
from retouch.recipes._registry import Recipe
from retouch.schedules import Schedule
from retouch.scores import CosineGap

_HFT: dict[str, Any] = {
    "scores": "chance",
    "cost": "none",
    "source": "summaries of the paper, and a re-implementation",
    "warning": (
        "We have not read the paper itself; that floor(L / 2) of L layers freeze two matrices of the "
        "MLP is from a re-implementation."
    ),
    "variant": "paper",
    "paper": "HFT: Half Fine-Tuning for Large Language Models",
    "year": 2024,
    "arxiv": "2404.18466",
}
_HALVES: dict[str, Any] = {
    "direction": "random",
    "polarity": "freeze",
    "density": 0.5,
}
_CATEGORIES: dict[str, Any] = _HALVES | {
    "granularity": "tensor",
    "scope": "siblings",
    "norms": "masked",
    "embeddings": "full",
    "heads": "full",
}
_ROUNDS = " The paper draws anew in each round or task: `hft-rounds`, or another seed."

Recipe(
    id="bitfit",
    title="BitFit",
    config={
        "target_modules": [],
        "biases": "full",
        "norm_biases": "full",
        "heads": "full",
        "output_embeddings": "frozen",
    },
    scores="nothing",
    cost="none",
    notes=(
        "All bias terms, those of normalisation layers too, and the task head. Llama and its like "
        "have no biases, so it is not for them."
    ),
    source="the paper, and parts of its code",
    variant="paper",
    paper=(
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models"
    ),
    authors="Ben Zaken, Elad and Ravfogel, Shauli and Goldberg, Yoav",
    year=2021,
    arxiv="2106.10199",
)

Recipe(
    id="ln-tuning",
    title="LN-tuning",
    config={
        "target_modules": [],
        "norms": "full",
        "heads": "full",
        "output_embeddings": "frozen",
    },
    scores="nothing",
    cost="none",
    notes="Gains and biases of all normalisation layers, and the task head.",
    source="the abstract",
    warning="How the paper treats the task head we have not read.",
    variant="paper",
    paper="Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models",
    year=2022,
    arxiv="2211.08682",
)

Recipe(
    id="perp",
    title="PERP, biases and norms",
    config={"target_modules": [], "biases": "full", "norms": "full"},
    scores="nothing",
    cost="none",
    notes=(
        "For retraining after pruning: weights that were pruned stay 0 because all linear weights "
        "are frozen. The groups of the paper that need no adapter; it also has LoRA for the linear "
        "layers and the head, which are frozen here."
    ),
    source="the released code",
    variant="released",
    paper="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
    year=2023,
    arxiv="2312.15230",
)

Recipe(
    id="cu-icu",
    title="CU-ICU, a preset of ours",
    config={"target_modules": [], "norms": "full"},
    scores="nothing",
    cost="none",
    notes=(
        "The gains of the norms of a T5, less than 1 % of it, to be used with few-shot prompts. The "
        "paper compares known parameter-efficient methods on T5 models; what is readable of it gives "
        "no selection of its own, so this row is a preset of that size and not its algorithm."
    ),
    source="the abstract",
    warning="The paper describes no selection that could be followed; norms are our choice.",
    variant="paper",
    paper=(
        "CU-ICU: Customizing Unsupervised Instruction-Finetuned Language Models for ICU Datasets "
        "via Text-to-Text Transfer Transformer"
    ),
    year=2025,
    arxiv="2507.13655",
)

Recipe(
    id="sppft-gap",
    title="SPPFT, cosine gap",
    config={
        "score": CosineGap(),
        "granularity": "layer",
        "polarity": "freeze",
        "k": 6,
        "target_modules": IN_LAYERS,
        "modules_to_save": OUTSIDE_LAYERS,
    },
    scores="growth of the angle between harmful and normal prompts",
    cost="a forward pass of both kinds of prompts",
    notes=(
        "Freezes the layers in which harmful prompts part most from normal ones, of any chat model: "
        "pass score=retouch.scores.CosineGap(harmful prompts), and normal prompts as data. The paper "
        "takes a range of layers, from where the gap appears to where it stops growing, and then "
        "moves its ends by counting over-rejections. 6 of 32 layers in Llama-2-7b-chat."
    ),
    source="the abstract and reviews",
    warning="Taking the k layers of largest growth, which need not be one range, is our reading.",
    variant="paper",
    paper="Safety Layers in Aligned Large Language Models: The Key to LLM Security",
    year=2024,
    arxiv="2408.17003",
)

Recipe(
    id="sppft",
    title="SPPFT, safety layers",
    config={
        "target_modules": [],
        "modules_to_save": EVERYTHING,
        "exclude_modules": LAYERS_9_TO_14,
    },
    scores="nothing",
    cost="none",
    notes=(
        "Everything is trained but the layers that keep a chat model safe. The range is that of "
        "Llama-2-7b-chat; for any other model find its own and pass exclude_modules. The paper "
        "finds it from hidden states (`sppft-gap`) and from over-rejection, which is not in retouch. "
        "Nearly the whole model is selected, so nothing is saved in memory."
    ),
    source="a reproduction and reviews",
    warning="The range, and whether it counts layers from 0, are from third parties.",
    variant="paper",
    paper="Safety Layers in Aligned Large Language Models: The Key to LLM Security",
    year=2024,
    arxiv="2408.17003",
)

Recipe(
    id="random",
    title="Random masking",
    config={"direction": "random", "density": 0.01},
    scores="chance",
    cost="none",
    notes=(
        "Uniform over all linear weights; depends on the seed and the names of the parameters "
        "alone, so it is the same on every machine. The paper goes down to a density of 0.00001 and "
        "raises the learning rate up to a hundredfold for it."
    ),
    source="notes on the paper",
    warning="Our source for its details is thin; the paper draws each weight on its own.",
    variant="paper",
    paper="Random Masking Finds Winning Tickets for Parameter Efficient Fine-tuning",
    authors="Xu, Jing and Zhang, Jingzhao",
    year=2024,
    arxiv="2405.02596",
)

Recipe(
    id="s2ft",
    title="S2FT, down projections",
    config={
        "direction": "random",
        "granularity": "column",
        "density": 0.03,
        "target_modules": LAST_OF_MLP,
    },
    scores="chance",
    cost="none",
    notes=(
        "Channels of the MLPs, drawn over all layers together; of each the column of the down "
        "projection moves. The paper sorts the channels of a model so that the chosen ones are "
        "contiguous, which a mask does not need; it can also train attention heads, and choose by "
        "statistics. 0.06 for small models."
    ),
    source="the released code",
    variant="released",
    paper=("S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity"),
    year=2024,
    arxiv="2412.06289",
)

Recipe(
    id="rocoft-row",
    title="RoCoFT, rows",
    config={"score": "constant", "granularity": "row", "scope": "tensor", "k": 1},
    scores="nothing: the first",
    cost="none",
    notes="The first rows (output features) of each linear layer, k from 1 to 3.",
    source="the released code",
    variant="released",
    paper="RoCoFT: Efficient Finetuning of Large Language Models with Row-Column Updates",
    year=2024,
    arxiv="2410.10075",
)

Recipe(
    id="rocoft-column",
    title="RoCoFT, columns",
    config={"score": "constant", "granularity": "column", "scope": "tensor", "k": 1},
    scores="nothing: the first",
    cost="none",
    notes="The first columns (input features) of each linear layer, k from 1 to 3.",
    source="the released code",
    variant="released",
    paper="RoCoFT: Efficient Finetuning of Large Language Models with Row-Column Updates",
    year=2024,
    arxiv="2410.10075",
)

Recipe(
    id="hft",
    title="HFT, by category",
    config=_CATEGORIES,
    notes=(
        "Freezes two of the four matrices of each attention, one or two of the three of each MLP (in "
        "half of the layers each) and one norm of two; embeddings and output are trained whole. A "
        "module that fuses several projections counts as one; biases of linear layers are frozen."
        + _ROUNDS
    ),
    **_HFT,
)

Recipe(
    id="hft-rounds",
    title="HFT, by category, in rounds",
    config=_CATEGORIES | {"schedule": Schedule(every=1, unit="epoch", state="reset")},
    when="every epoch",
    notes=(
        "As `hft`, another half in each epoch, with a new optimizer state. In the paper a round is a "
        "task or a part of the data: call get_engine(model).mover.new_epoch() where one ends."
    ),
    **_HFT,
)

Recipe(
    id="hft-layer",
    title="HFT, by layer",
    config=_HALVES
    | {
        "granularity": "layer",
        "target_modules": IN_LAYERS,
        "modules_to_save": OUTSIDE_LAYERS,
    },
    notes="Freezes half of the layers; all else is trained whole. An ablation of the paper."
    + _ROUNDS,
    **_HFT,
)

Recipe(
    id="hft-model",
    title="HFT, by model",
    config=_HALVES
    | {"granularity": "tensor", "norms": "masked", "embeddings": "full", "heads": "full"},
    notes="Freezes half of all matrices and norms, wherever they are. An ablation of the paper."
    + _ROUNDS,
    **_HFT,
)
