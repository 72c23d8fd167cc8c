"""Masks from gradient statistics that are taken once, before training."""

from retouch.recipes._modules import (
    ATTENTION_INPUTS,
    CLASS_TOKEN,
    FIRST_OF_MLP,
    IN_LAYERS,
    LAYER_SCALES,
    OUTSIDE_LAYERS,
    POSITIONS_AND_PATCHES,
    VISUAL_PROJECTION,
)
from retouch.recipes._registry import Recipe
from retouch.scores import Fisher, Gradient, GradStat, SoftRank

Recipe(
    id="fish",
    title="FISH Mask",
    config={
        "score": Fisher(),
        "density": 0.005,
        "target_modules": None,
        "heads": "full",
        "output_embeddings": "masked",
        "counted_in_budget": True,
        "samples": 1024,
    },
    scores="sum of squared gradients of samples",
    cost="a forward and a backward pass for each of 1024 samples",
    source="the released code",
    notes=(
        "The empirical Fisher with true labels (label-square), summed over samples in evaluation "
        "mode; one global top-k in which every parameter competes. A task head is trained whole and "
        "is part of the budget, so the density must exceed its share. The default of the released "
        "code, label-absolute, is GradStat(level='sample', map='abs')."
    ),
    variant="paper",
    paper="Training Neural Networks with Fixed Sparse Masks",
    authors="Sung, Yi-Lin and Nair, Varun and Raffel, Colin",
    year=2021,
    arxiv="2111.09839",
)

Recipe(
    id="gps",
    title="GPS",
    config={
        "score": Gradient(training=True),
        "k_per_row": 1,
        "convs": "masked",
        "heads": "full",
        "output_embeddings": "frozen",
        "biases": "full",
        "norms": "frozen",
        "modules_to_save": LAYER_SCALES,
    },
    scores="|sum of gradients|",
    cost="one pass over the data",
    source="the released code",
    notes=(
        "For each neuron the input with the largest |sum of gradients|; convolutions are flattened "
        "to [out, in * kernel]; heads, biases and layer scales are trained whole; norms, embeddings "
        "and class tokens are frozen. The scripts of the authors score with a supervised contrastive "
        "loss of two augmented views, so that a fresh head plays no part: pass it as loss_fn. "
        "k_per_row is 1 for VTAB, 1 to 20 for fine-grained classification."
    ),
    variant="paper",
    paper="Gradient-based Parameter Selection for Efficient Fine-Tuning",
    authors=(
        "Zhang, Zhi and Zhang, Qizhe and Gao, Zijun and Zhang, Renrui and Shutova, Ekaterina and "
        "Zhou, Shiji and Zhang, Shanghang"
    ),
    year=2023,
    arxiv="2312.10136",
)

Recipe(
    id="spu",
    title="SPU",
    config={
        "score": Gradient(training=True),
        "density": 0.1,
        "scope": "tensor",
        "target_modules": FIRST_OF_MLP,
        "biases": "full",
        "norm_biases": "full",
        "modules_to_save": VISUAL_PROJECTION,
    },
    scores="|sum of gradients|",
    cost="a pass over a quarter of the data of the task",
    source="the released code, and reviews of the paper",
    notes=(
        "A tenth of the first linear layer of each MLP by |sum of gradients|; all biases, and "
        "the visual projection of CLIP, are trained whole. The released code differs in its score "
        "(spu-released), and its weight decay also shrinks frozen weights, which retouch does not."
    ),
    variant="paper",
    paper="Overcoming Generic Knowledge Loss with Selective Parameter Update",
    authors="Zhang, Wenxuan and Janson, Paul and Aljundi, Rahaf and Elhoseiny, Mohamed",
    year=2023,
    arxiv="2308.12462",
)

Recipe(
    id="spu-released",
    title="SPU, released code",
    config={
        "score": GradStat(outer="cumulative", post="abs", training=True),
        "density": 0.1,
        "scope": "tensor",
        "target_modules": FIRST_OF_MLP,
        "biases": "full",
        "norm_biases": "full",
        "modules_to_save": VISUAL_PROJECTION,
    },
    scores="|sum of running sums of gradients|",
    cost="a pass over a quarter of the data of the task",
    notes=(
        "As spu, with gradients that are never zeroed while they are summed, so that early batches "
        "weigh more. That code scores with the squared norm of the logits of CLIP: pass it as "
        "loss_fn."
    ),
    source="the released code",
    variant="released",
    paper="Overcoming Generic Knowledge Loss with Selective Parameter Update",
    authors="Zhang, Wenxuan and Janson, Paul and Aljundi, Rahaf and Elhoseiny, Mohamed",
    year=2023,
    arxiv="2308.12462",
)

Recipe(
    id="neuroada-grad",
    title="NeuroAda, gradients",
    config={"score": Gradient(training=True), "k_per_row": 1},
    scores="|sum of gradients|",
    cost="one pass over the training data",
    notes="As neuroada, by the gradient that is summed over the whole training set.",
    source="the released code",
    variant="released",
    paper="NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning",
    year=2025,
    arxiv="2510.18940",
)

Recipe(
    id="tr-pts",
    title="TR-PTS, parameters",
    config={
        "score": Fisher(),
        "k_per_row": 1,
        "allocation": 0.01,
        "convs": "masked",
        "heads": "full",
        "output_embeddings": "frozen",
        "biases": "full",
        "norms": "frozen",
    },
    scores="sum of squared gradients of samples",
    cost="a forward and a backward pass for each sample",
    notes=(
        "GPS with a number of inputs for each neuron that differs by layer: layers that hold more "
        "of the best 1 % of all weights get more. The selection of tokens is not in retouch."
    ),
    source="a note on the paper; no code is published",
    warning=(
        "The size of the first selection (allocation), the rounding, and what happens to biases, "
        "norms and convolutions (here as in GPS) are our choice; layers are weighed by counts."
    ),
    variant="paper",
    paper="TR-PTS: Task-Relevant Parameter and Token Selection for Efficient Tuning",
    year=2025,
    arxiv="2507.22872",
)

Recipe(
    id="spt",
    title="SPT, unstructured",
    config={
        "score": Fisher(level="batch", training=True),
        "max_batches": 16,
        "density": 0.005,
        "target_modules": None,
        "exclude_modules": POSITIONS_AND_PATCHES,
        "modules_to_save": CLASS_TOKEN,
        "heads": "full",
        "output_embeddings": "frozen",
        "embeddings": "frozen",
    },
    scores="sum of squared gradients of batches",
    cost="16 batches",
    notes=(
        "The sensitive weights alone. The paper gives a LoRA to each matrix with many of them, and "
        "trains a bias or norm whole that has many: retouch.escalate(mask, model) says which. It "
        "tries 0.2 to 1.0 M weights "
        "of ViT-B/16 (0.2 to 1.2 %) and reports the best. Its weight decay pulls to the pretrained "
        "weights, ours to 0."
    ),
    source="the released code",
    variant="released",
    paper="Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning",
    year=2023,
    arxiv="2303.08566",
)

Recipe(
    id="child-tuning-d",
    title="Child-Tuning_D",
    config={
        "score": Fisher(level="batch", outer="mean", training=True),
        "density": 0.3,
        "target_modules": IN_LAYERS,
        "modules_to_save": OUTSIDE_LAYERS,
    },
    scores="mean of squared gradients of batches",
    cost="one pass over the training data",
    notes=(
        "Of all that is in layers the best 30 % (the paper goes down to 10 %); embeddings, pooler "
        "and head are trained whole. The released code clips each gradient to norm 1 before it "
        "squares it, which weighs batches and tensors differently."
    ),
    source="the released code",
    variant="paper",
    paper=(
        "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning"
    ),
    year=2021,
    arxiv="2109.05687",
)

Recipe(
    id="sam",
    title="SAM, second-order approximation",
    config={
        "score": Gradient(training=True),
        "max_batches": 500,
        "density": 0.005,
        "scope": "tensor",
        "target_modules": IN_LAYERS,
        "heads": "full",
        "output_embeddings": "frozen",
    },
    scores="|sum of gradients|",
    cost="500 batches",
    notes=(
        "In each tensor of the encoder the largest sums of gradients: the best subset of a quadratic "
        "whose curvature is the same everywhere. Tensors of fewer than 200 elements get none."
    ),
    source="the released code",
    variant="released",
    paper="On the Effectiveness of Parameter-Efficient Fine-Tuning",
    year=2022,
    arxiv="2211.15583",
)

Recipe(
    id="sift",
    title="SIFT",
    config={
        "score": Gradient(training=True),
        "max_batches": 1,
        "density": 0.01,
        "scope": "tensor",
    },
    scores="|gradient of the first batch|",
    cost="one batch",
    notes=(
        "The largest gradients of each linear layer at the first step. The released code takes one "
        "more in each tensor, and loses the last update of a run, which retouch does not."
    ),
    source="the released code",
    warning="Modules and density are chosen by the user there; those here are ours.",
    variant="released",
    paper="Sparse is Enough in Fine-tuning Pre-trained Large Language Models",
    year=2023,
    arxiv="2312.11875",
)

Recipe(
    id="rosa",
    title="RoSA, sparse part",
    config={
        "score": Fisher(level="batch", training=True),
        "max_batches": 1,
        "density": 0.003,
        "scope": "tensor",
    },
    scores="squared gradient of one batch",
    cost="one batch",
    notes=(
        "The sparse half alone, chosen before training. In the paper a LoRA is trained beside it, "
        "and for some steps before the gradient is taken."
    ),
    source="the released code",
    variant="released",
    paper="RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation",
    year=2024,
    arxiv="2401.04679",
)

Recipe(
    id="smt",
    title="SMT",
    config={
        "score": GradStat(outer="mean", training=True),
        "max_batches": 100,
        "granularity": "block",
        "block_size": 256,
        "aggregate": "abs_of_mean",
        "density": 0.07,
        "target_modules": ATTENTION_INPUTS,
    },
    scores="|mean gradient of a block|",
    cost="100 batches",
    notes=(
        "Blocks of 256 x 256 of queries, keys and values over all layers; 7 % of them is 0.7 % of "
        "Llama-3-8B. The released code takes the gradients of 100 steps of full fine-tuning, in "
        "which the weights move; here they stand still. Summaries of the paper have the mean of "
        "|gradient|: score=GradStat(post='abs', training=True). Blocks at an edge may be smaller."
    ),
    source="the released code",
    variant="released",
    paper="SMT: Fine-Tuning Large Language Models with Sparse Matrices",
    year=2024,
    arxiv="2405.15525",
)

Recipe(
    id="irepair-fixed",
    title="IRepair, fixed slice",
    config={
        "score": GradStat(outer="mean"),
        "granularity": "layer",
        "aggregate": "l2",
        "k": 1,
        "target_modules": IN_LAYERS,
    },
    scores="norm of a layer's gradient",
    cost="one pass over the data",
    notes=(
        "The layer that the loss is most sensitive to, whole. The method itself chooses anew in "
        "each batch, which the paper finds better than this; it also adds a KL term to the loss."
    ),
    source="the abstract and a summary",
    warning="How many layers, and whether norms are divided by sizes, we have not read.",
    variant="paper",
    paper=(
        "IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models"
    ),
    year=2025,
    arxiv="2502.07072",
)

Recipe(
    id="roast-fixed",
    title="RoAST, one draw",
    config={
        "score": SoftRank(Fisher(level="batch", outer="mean", training=True), alpha=0.9, beta=10.0),
        "direction": "bernoulli",
        "target_modules": IN_LAYERS,
        "modules_to_save": OUTSIDE_LAYERS,
    },
    scores="sigmoid of the rank of the mean of squared gradients of batches",
    cost="one pass over the training data",
    notes=(
        "Each weight in layers is drawn with a chance that rises with the rank of its score, 10.6 % "
        "of them in all; alpha=0.6 and beta=1 (45 %) for entailment. The method scores and draws "
        "anew in each epoch, can divide gradients by their chances, and trains against adversarial "
        "embeddings; here is one draw. Its code leaves the first batch out of the scores, and ranks "
        "equal scores at random: here they have the mean of their ranks."
    ),
    source="the released code",
    variant="released",
    paper=(
        "RoAST: Robustifying Language Models via Adversarial Perturbation with Selective Training"
    ),
    year=2023,
    arxiv="2312.04032",
)
