"""SHiRA, sparse high-rank adapters: five ways to choose 1 % of each matrix."""

from typing import Any

from retouch.recipes._registry import Recipe
from retouch.scores import Gradient, Sensitivity, Stripes

_PAPER: dict[str, Any] = {
    "source": "the paper, and its port in PEFT",
    "variant": "paper",
    "paper": "Sparse High Rank Adapters",
    "year": 2024,
    "arxiv": "2406.13175",
}
_ADDS = " The paper's adapter is the difference to the base, which is retouch's delta."

Recipe(
    id="shira-rand",
    title="SHiRA-Rand",
    config={"direction": "random", "density": 0.01, "scope": "tensor"},
    scores="chance",
    cost="none",
    notes=(
        "A fixed number in each linear weight; the paper draws each weight on its own. The port in "
        "PEFT draws the same mask for all matrices of one shape; here each has its own. PEFT's size "
        "is lora_rank=32 instead of the density." + _ADDS
    ),
    **_PAPER,
)

Recipe(
    id="shira-wm",
    title="SHiRA-WM",
    config={"score": "magnitude", "density": 0.01, "scope": "tensor"},
    scores="|weight|",
    cost="one pass over the weights",
    notes="The largest weights of each linear layer." + _ADDS,
    **_PAPER,
)

Recipe(
    id="shira-grad",
    title="SHiRA-Grad",
    config={"score": Gradient(), "density": 0.01, "scope": "tensor"},
    scores="|sum of gradients|",
    cost="one pass over calibration data",
    notes="The largest gradients of each linear layer, on calibration data." + _ADDS,
    warning="How the paper sums gradients over its calibration data we have not read.",
    **_PAPER,
)

Recipe(
    id="shira-snip",
    title="SHiRA-SNIP",
    config={"score": Sensitivity(), "density": 0.01, "scope": "tensor"},
    scores="|sum of gradients * weight|",
    cost="one pass over calibration data",
    notes="The largest products of gradient and weight of each linear layer." + _ADDS,
    warning="How the paper sums gradients over its calibration data we have not read.",
    **_PAPER,
)

Recipe(
    id="shira-struct",
    title="SHiRA-Struct",
    config={"score": Stripes(every=100), "threshold": 1.0},
    scores="position",
    cost="none",
    notes=(
        "Every hundredth row and the diagonal of each linear layer: a little more than 1 % of "
        "large matrices. The paper takes rows or columns, as far apart as the budget wants: "
        "Stripes(every, axis='column')." + _ADDS
    ),
    **_PAPER,
)
