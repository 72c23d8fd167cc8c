"""Selections by the weights alone."""

from retouch.recipes._modules import GATES_OF_MLP
from retouch.recipes._registry import Recipe
from retouch.scores import ConditionNumber, LowRankMagnitude, Probe

Recipe(
    id="magnitude",
    title="Largest weights",
    config={"score": "magnitude", "density": 0.01},
    scores="|weight|",
    cost="one pass over the weights",
    notes="A baseline: the largest of all linear weights; direction='bottom' takes the smallest.",
    source="common practice",
)

Recipe(
    id="neuroada",
    title="NeuroAda",
    config={"score": "magnitude", "k_per_row": 1},
    scores="|weight|",
    cost="one pass over the weights",
    notes=(
        "For each neuron its largest weights: k_per_row from 1 (0.02 % of LLaMA-7B, learning rate "
        "8e-3) to 20 (0.4 %, 7e-4). The released code adds a trained vector to frozen weights; "
        "moving the weights is the same."
    ),
    source="the released code",
    variant="released",
    paper="NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning",
    year=2025,
    arxiv="2510.18940",
)

Recipe(
    id="supertuning",
    title="Super-Tuning, magnitude",
    config={"score": "magnitude", "density": 0.01, "scope": "tensor"},
    scores="|weight|",
    cost="one pass over the weights",
    notes=(
        "The largest 1 % of each linear layer, as in PEFT; direction='bottom' takes the smallest. "
        "Without the LoRA beside it that the paper calls Supra."
    ),
    source="its port in PEFT",
    variant="released",
    paper="Super-Tuning: From Activation-Aware Pruning to Sparse Fine-Tuning",
    year=2026,
    arxiv="2607.09287",
)

Recipe(
    id="sara",
    title="SaRA",
    config={
        "score": "magnitude",
        "direction": "bottom",
        # the largest float32 below 2e-3: the paper's bound is not itself selected
        "threshold": 0.00199999986,
        "target_modules": None,
    },
    scores="|weight|",
    cost="one pass over the weights",
    notes=(
        "All parameters below 2e-3 in magnitude, biases and norms too; made for the UNet of a "
        "diffusion model. The density follows from the model: look at it. The paper chooses again "
        "half-way among the weights that are still small, and adds a penalty on the rank of the "
        "change; both are left out."
    ),
    source="the released code",
    variant="released",
    paper=(
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank "
        "Adaptation"
    ),
    year=2024,
    arxiv="2409.06633",
)

Recipe(
    id="pafi",
    title="PaFi",
    config={
        "score": "magnitude",
        "direction": "bottom",
        "density": 0.005,
        "target_modules": None,
        "heads": "full",
        "output_embeddings": "masked",
    },
    scores="|weight|",
    cost="one pass over the weights",
    notes=(
        "The smallest weights of the whole model, one mask for all tasks; ties go to the first, as "
        "in the released code. A fresh model has biases of 0, which come first."
    ),
    source="notes on the released code",
    warning="The density, and that a task head is trained whole, are our choice.",
    variant="released",
    paper="Parameter-Efficient Fine-Tuning without Introducing New Latency",
    year=2023,
    arxiv="2305.16742",
)

Recipe(
    id="lift",
    title="LIFT, once",
    config={"score": LowRankMagnitude(rank=128), "lora_rank": 128},
    scores="|weight| at rank 128",
    cost="an eigendecomposition for each weight matrix",
    notes=(
        "In each linear layer as many as a LoRA of rank 128 has, 6 % of a 4096 x 4096 matrix: the "
        "largest of its best approximation of rank 128. The released code chooses again every few "
        "hundred steps; here the mask stays as it is. Where 128 reaches the size of a matrix, all "
        "of it is selected."
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
    id="kappatune",
    title="KappaTune",
    config={
        "score": ConditionNumber(),
        "granularity": "tensor",
        "direction": "bottom",
        "density": 0.2,
    },
    scores="condition number",
    cost="the singular values of each weight matrix",
    notes=(
        "The fifth of all linear layers with the lowest condition number, whole, as in PEFT, which "
        "also ranks the output layer and puts fused experts in a ranking of their own; the authors' "
        "code takes a number of tensors instead (k from 20 to 300). The budget counts "
        "tensors, so the number of weights follows from the model. The smallest singular value of a "
        "large matrix in 16 bits is mostly rounding."
    ),
    source="the released code and PEFT",
    variant="released",
    paper=(
        "The Condition Number as a Scale-Invariant Proxy for Information Encoding in Neural Units"
    ),
    year=2025,
    arxiv="2506.16289",
)

Recipe(
    id="model-surgery",
    title="Model Surgery, rows",
    config={
        "score": Probe(),
        "direction": "bottom",
        "granularity": "row",
        "density": 0.0465,
        "target_modules": GATES_OF_MLP,
    },
    scores="cosine of a row and a behaviour probe",
    cost="a linear probe of hidden states, trained before",
    notes=(
        "The rows of the gate projections that point away from a direction, 16384 of those of "
        "Llama-2-7B: pass score=retouch.scores.Probe(vector), where vector is the probe's weight for "
        "the unwanted class. The paper trains nothing: it adds alpha * vector to these rows, with "
        "alpha=1, weight.data[mask[name].index] += alpha * vector; the length of the vector depends "
        "on how the probe was trained."
    ),
    source="the released code",
    variant="released",
    paper="Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing",
    year=2024,
    arxiv="2407.08770",
)
