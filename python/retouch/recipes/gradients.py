"""Masks from gradient statistics that are taken once, before training."""

from retouch.recipes._registry import Recipe
from retouch.scores import Fisher, Gradient

# The first linear map of the MLP in each block: GPT-2 and OpenCLIP, CLIP and OPT, BERT and ViT,
# Llama and its like, T5, DistilBERT, GPT-NeoX and Falcon, torch.nn.TransformerEncoderLayer.
_FIRST_OF_MLP = (
    r"(.*\.)?(c_fc|fc1|intermediate\.dense|up_proj|gate_proj|"
    r"wi|wi_0|wi_1|lin1|dense_h_to_4h|linear1)"
)

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
    cost="a forward and a backward pass for each of 1024 samples",
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
        "modules_to_save": r"(.*\.)?(gamma|lambda_?[12]?|layer_scale_parameter)",
    },
    cost="one pass over the data",
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
        "target_modules": _FIRST_OF_MLP,
        "biases": "full",
        "norm_biases": "full",
        "modules_to_save": r"(.*\.)?(visual\.proj|visual_projection)",
    },
    cost="a pass over a quarter of the data of the task",
    notes=(
        "A tenth of the first linear layer of each MLP by |sum of gradients|; all biases, and "
        "the visual projection of CLIP, are trained whole. The released code never "
        "zeroes gradients while it sums them, which is GradStat(outer='cumulative', post='abs', "
        "training=True), scores with the squared norm of the logits (pass it as loss_fn), and its "
        "weight decay also shrinks frozen weights, which retouch does not."
    ),
    variant="paper",
    paper="Overcoming Generic Knowledge Loss with Selective Parameter Update",
    authors="Zhang, Wenxuan and Janson, Paul and Aljundi, Rahaf and Elhoseiny, Mohamed",
    year=2023,
    arxiv="2308.12462",
)
