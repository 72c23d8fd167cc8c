"""Selections that need no data."""

from retouch.recipes._registry import Recipe

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
    cost="none",
    notes=(
        "All bias terms, those of normalisation layers too, and the task head. Llama and its like "
        "have no biases, so it is not for them."
    ),
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
    id="random",
    title="Random masking",
    config={"direction": "random", "density": 0.01},
    cost="none",
    notes=(
        "Uniform over all linear weights; depends on the seed and the names of the parameters "
        "alone, so it is the same on every machine. The paper goes down to a density of 0.00001 and "
        "raises the learning rate up to a hundredfold for it. Our source for its details is thin."
    ),
    variant="paper",
    paper="Random Masking Finds Winning Tickets for Parameter Efficient Fine-tuning",
    authors="Xu, Jing and Zhang, Jingzhao",
    year=2024,
    arxiv="2405.02596",
)

Recipe(
    id="magnitude",
    title="Largest weights",
    config={"score": "magnitude", "density": 0.01},
    cost="one pass over the weights",
    notes="A baseline: the largest of all linear weights; direction='bottom' takes the smallest.",
)
