"""Selections that are made anew from data, in every round, epoch or step."""

from typing import Any

from retouch.recipes._modules import (
    BUT_FIRST_CONVS,
    FIRST_CONVS,
    IN_LAYERS,
    OUTSIDE_LAYERS,
)
from retouch.recipes._registry import Recipe
from retouch.schedules import Schedule
from retouch.scores import (
    Fisher,
    GradStat,
    HardExamples,
    Outliers,
    RowColumn,
    Sensitivity,
    SoftRank,
    Wanda,
    domain_fisher,
    robust_gradient,
)

_READS = " Needs data= in retouch.wrap; the Trainer gives its own."

Recipe(
    id="fishertune",
    title="FisherTune",
    config={
        "score": domain_fisher(),
        "density": 0.05,
        "target_modules": None,
        "heads": "full",
        "max_batches": 16,
        "schedule": Schedule(
            start=100, every=100, change="grow", ramp="exponential", density_from=0.005, rounds=10
        ),
    },
    scores="Fisher information, and its relative change under other statistics of the features",
    cost="16 batches, each twice, in every round",
    when="every 100 steps, growing",
    notes=(
        "Trains the head alone for `start` steps, then takes on more weights in each round, those "
        "whose Fisher information differs most between the data and data of shifted channel "
        "statistics; what is selected stays. 5 % is the 15 M of ViT-L that the paper trains. With "
        "score=retouch.scores.domain_fisher(eps=1.0) the score is the cheap form of the variational "
        "estimate, with prior variance 1." + _READS
    ),
    source="a summary of the paper with its equations, and a re-implementation",
    warning=(
        "No code was found. Strengths of the shift, eps, steps, rounds, first density and the global "
        "ranking are our choice; the second part of the score has another scale than the first."
    ),
    variant="paper",
    paper=(
        "FisherTune: Fisher-Guided Robust Tuning of Vision Foundation Models for Domain Generalized "
        "Segmentation"
    ),
    year=2025,
    arxiv="2503.17940",
)

_CURE: dict[str, Any] = {
    "cost": "12 forward and backward passes of a batch at every step",
    "when": "at every step",
    "paper": (
        "Conserve-Update-Revise to Cure Generalization and Robustness Trade-off in Adversarial "
        "Training"
    ),
    "year": 2024,
    "arxiv": "2401.14948",
}
_CONSERVES: dict[str, Any] = {
    "direction": "bottom",
    "polarity": "freeze",
    "quantile": 0.3,
    "scope": "tensor",
    "max_batches": 1,
    "schedule": Schedule(every=1, state="keep"),
}
_CURE_NOTES = (
    " The attack is that of TRADES, on what the model's input embedding gives, or else on its "
    "floating-point inputs: for images set bounds=(0, 1) in the score. Beside the mask the paper has "
    "an adversarial loss and a slow copy of the model, which are yours to add. The score is of the "
    "first batch of data=, read anew at every step: of a shuffled loader another batch each time; a "
    "list of one batch that you replace before each step makes it the batch of the next one. The "
    "simpler mode of the code, |gradient| of the whole loss of the very step: score='gradient', "
    "schedule={'collect': 1, 'now': True}. What is frozen stays, also under momentum and decay, which "
    "the released code lets move it."
)

Recipe(
    id="cure",
    title="CURE",
    config=_CONSERVES | {"score": robust_gradient(0.1), "target_modules": None},
    scores="0.1 |natural gradient| + 0.9 |gradient at adversarial inputs|",
    notes="Freezes the 30 % of each tensor that matter least for both kinds of inputs."
    + _CURE_NOTES,
    source="the paper and the released code",
    variant="paper",
    **_CURE,
)

Recipe(
    id="cure-released",
    title="CURE, released code",
    config=_CONSERVES
    | {
        "score": robust_gradient(0.1, signed=True),
        "target_modules": FIRST_CONVS,
        "modules_to_save": BUT_FIRST_CONVS,
    },
    scores="0.1 natural gradient + 0.9 gradient of the divergence at adversarial inputs, signed",
    notes=(
        "As `cure`, with signed gradients, so that it freezes the most negative 30 %; in the first "
        "convolution of each residual block alone, all else is trained whole. For ResNets."
        + _CURE_NOTES
    ),
    source="the released code",
    variant="released",
    **_CURE,
)

Recipe(
    id="fishdip",
    title="FISH-DIP",
    config={
        "score": HardExamples(Fisher(), samples=64),
        "density": 0.01,
        "target_modules": None,
        "heads": "full",
        "output_embeddings": "masked",
        "schedule": Schedule(every=100),
    },
    scores="sum of squared gradients of the samples with the largest losses",
    cost="a forward pass of all data and 64 backward passes, every 100 steps",
    when="every 100 steps",
    notes="As `fish`, of the samples that the model does worst on, chosen anew." + _READS,
    source="the abstract and a summary",
    warning="The density, the number of samples and the steps between changes are our choice.",
    variant="paper",
    paper=("Unified Low-Resource Sequence Labeling by Sample-Aware Dynamic Sparse Finetuning"),
    authors=(
        "Das, Sarkar Snigdha Sarathi and Zhang, Ranran Haoran and Shi, Peng and Yin, Wenpeng and "
        "Zhang, Rui"
    ),
    year=2023,
    arxiv="2311.03748",
)

Recipe(
    id="owlore",
    title="OwLore, layers",
    config={
        "score": Outliers(Wanda(), times=5.0),
        "granularity": "layer",
        "direction": "weighted",
        "k": 2,
        "modules_to_save": OUTSIDE_LAYERS,
        "samples": 128,
        "schedule": Schedule(every=20),
    },
    scores="fraction of |weight| * norm of input that is 5 times the mean of its layer",
    cost="a forward pass of 128 samples, every 20 steps",
    when="every 20 steps",
    notes=(
        "LISA with layers that have many outliers drawn more often; of each the linear weights. The "
        "paper also projects their gradients to a low rank, which is not in retouch, and its code "
        "counts outliers once, where here they are counted anew." + _READS
    ),
    source="the released code",
    warning="How far above the mean an outlier is, the layers and the steps are our choice.",
    variant="released",
    paper=(
        "OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM "
        "Fine-tuning"
    ),
    authors="Li, Pengxiang and Yin, Lu and Gao, Xiaowei and Liu, Shiwei",
    year=2024,
    arxiv="2405.18380",
)

Recipe(
    id="roast",
    title="RoAST",
    config={
        "score": SoftRank(Fisher(level="batch", outer="mean", training=True), alpha=0.9, beta=10.0),
        "direction": "bernoulli",
        "target_modules": IN_LAYERS,
        "modules_to_save": OUTSIDE_LAYERS,
        "schedule": Schedule(every=1, unit="epoch"),
    },
    scores="sigmoid of the rank of the mean of squared gradients of batches",
    cost="one pass over the training data, every epoch",
    when="every epoch",
    notes=(
        "As `roast-fixed`, scored and drawn anew in each epoch. The code takes the later scores of "
        "the gradients of the epoch before, with its adversarial loss: schedule={'collect': 'all', "
        "'initial': 'all'} does so too, and trains everything in the first." + _READS
    ),
    source="the released code",
    variant="released",
    paper=(
        "RoAST: Robustifying Language Models via Adversarial Perturbation with Selective Training"
    ),
    year=2023,
    arxiv="2312.04032",
)

Recipe(
    id="spiel-ma",
    title="SpIEL-MA",
    config={
        "score": RowColumn(GradStat(map="square")),
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
        ),
    },
    scores="largest squared gradient of the row * of the column, and the way from the base",
    cost="dense gradients in 5 of 100 steps",
    when="every 100 steps",
    notes=(
        "As `spiel`, with what is known of a gradient from one number for each row and column. There "
        "these are the accumulators of the optimizer SM3, which saves memory; here they are of the "
        "squared gradients of 5 steps, newcomers start with empty moments, and the optimizer is yours."
    ),
    source="the released code",
    warning="The accumulators of SM3 run over the whole training, ours over 5 steps.",
    variant="released",
    paper="Scaling Sparse Fine-Tuning to Large Language Models",
    year=2024,
    arxiv="2401.16405",
)

Recipe(
    id="snella",
    title="SNELLA, allocation",
    config={
        "score": Sensitivity(map="abs"),
        "density": 0.2,
        "scope": "tensor",
        "quota": "score",
        "schedule": Schedule(
            every=1,
            unit="epoch",
            collect="all",
            change="shrink",
            initial="all",
            ramp="cubic",
            rounds=100,
            density_from=1.0,
        ),
    },
    scores="sum of |gradient| * |weight|",
    cost="full fine-tuning of linear weights at first, dense gradients to the end",
    when="every epoch, shrinking",
    notes=(
        "Weights compete in two levels: matrices for shares of the budget, in proportion to their "
        "mean scores, and the weights of each matrix for its share. Starts with all and shrinks over "
        "`rounds` epochs. In the paper the change of each matrix is made by a kernel of two factors, "
        "and the scores, which are smoothed and multiplied by their uncertainty, are of these; here "
        "they are of the weights. The authors keep 20 % (CIFAR) to 70 % (CUB)."
    ),
    source="the released code",
    warning="The allocation alone is the authors'; scores of weights in its place are our choice.",
    variant="released",
    paper=("Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models"),
    authors="Shen, Shufan and Sun, Junshu and Wang, Shuhui and Huang, Qingming",
    year=2025,
    arxiv="2510.24037",
)

Recipe(
    id="increlora",
    title="IncreLoRA, growth for masks",
    config={
        "score": Sensitivity(map="abs"),
        "density": 0.02,
        "scope": "tensor",
        "quota": "score",
        "schedule": Schedule(
            every=100, collect=1, now=True, change="grow", ramp="linear", rounds=10
        ),
    },
    scores="|gradient of the step| * |weight|",
    cost="a dense gradient every 100 steps",
    when="every 100 steps, growing",
    notes=(
        "Starts with a tenth of the budget and adds a tenth in each of `rounds` changes, to each "
        "matrix in proportion to its mean score; what is selected stays. The paper grows the ranks of "
        "LoRAs, those of the best modules by one each; weights of a mask are here in the place of "
        "ranks, and scores are not smoothed over steps."
    ),
    source="the released code",
    warning="Masks in the place of ranks, and shares in the place of the best modules, are ours.",
    variant="released",
    paper="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
    authors=(
        "Zhang, Feiyu and Li, Liangzhi and Chen, Junhao and Jiang, Zhouqiang and Wang, Bowen and "
        "Qian, Yiming"
    ),
    year=2023,
    arxiv="2308.12043",
)
