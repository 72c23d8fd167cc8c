"""Methods that change the step and not the selection: gates inside of it, and ways back to the base.

`retouch.wrap(retouch.AdamW, "cautious", model)` and the Trainer follow them; the selection is all
there is, unless told otherwise: `SelectConfig.named("cautious", score="fisher", density=0.01,
granularity="element", direction="top", gate={"scale": "paper"})`.
"""

from typing import Any

from retouch.optim.gates import AlphaAdam, Bernoulli, Cautious, Magma, SkipUpdate, TopK
from retouch.recipes._registry import Recipe

_EVERYTHING: dict[str, Any] = {
    "target_modules": None, "direction": "random", "granularity": "tensor", "density": 1.0,
}  # fmt: skip
_EACH_STEP: dict[str, Any] = {"when": "all once; what moves, at every step"}
_DENSE = " Nothing is saved: all that is selected has its state."

Recipe(
    id="cautious",
    title="Cautious AdamW",
    config=_EVERYTHING | {"gate": Cautious()},
    scores="nothing; moves where step and gradient agree",
    cost="one more product",
    notes=(
        "Steps that go against the gradient wait, and the others make up for them: by "
        "1 / max(mean(open), 1e-3) as in the authors' code now, or gate={'scale': 'paper'}. Decay "
        "reaches all. In the code's default path the mask compares the momentum with itself and is "
        "always open, which is AdamW; here it compares with the gradient." + _DENSE
    ),
    source="the released code",
    variant="released",
    paper="Cautious Optimizers: Improving Training with One Line of Code",
    year=2024,
    arxiv="2411.16085",
    **_EACH_STEP,
)

Recipe(
    id="alphaadam",
    title="AlphaAdam",
    config=_EVERYTHING | {"gate": AlphaAdam()},
    scores="nothing; moves where last momentum and gradient agree",
    cost="one more product and two norms",
    notes=(
        "As `cautious`, with the momentum of before the step, and the step scaled so that its norm "
        "stays: gate={'alpha': 'count'} scales by numbers instead, 'none' not at all; "
        "gate={'decay_closed': False} spares what waits the decay." + _DENSE
    ),
    source="summaries of the paper",
    variant="paper",
    warning="How the factor is taken, and whether what waits decays, is our reading; no code was found.",
    paper="AlphaAdam: Asynchronous Masked Optimization with Dynamic Alpha for Selective Updates",
    year=2025,
    arxiv="2501.18094",
    **_EACH_STEP,
)

Recipe(
    id="gmt-gate",
    title="GMT, as a gate",
    config=_EVERYTHING | {"target_modules": "all-linear", "gate": TopK(0.2)},
    scores="|gradient of the step|",
    cost="a selection of the largest gradients at every step",
    notes=(
        "As `gmt`, with the moments of all weights held and going on under the true gradient, so that "
        "none is moved around: gate={'policy': 'P2'} stops those of what waits. In re-implementations "
        "the gradient is zeroed and momentum and decay still move all: gate={'policy': 'P0', 'leaky': "
        "True}. The fraction: gate={'density': 0.1}."
    ),
    source="summaries of the paper, and a re-implementation",
    variant="paper",
    warning="We have not read the paper itself.",
    paper="Enhancing Large Language Model Performance with Gradient-Based Parameter Selection",
    year=2024,
    arxiv="2406.15330",
    **_EACH_STEP,
)

Recipe(
    id="gmt-micro",
    title="GMT, after each micro-batch",
    config=_EVERYTHING
    | {
        "target_modules": "all-linear",
        "gate": TopK(0.2, per="backward", policy="P0", leaky=True),
    },
    scores="|running sum of the micro-batches' gradients|",
    cost="a selection of the largest gradients after every backward pass",
    notes=(
        "As the re-implementation does it: all but the largest fifth of each matrix's gradient is set "
        "to 0 after every micro-batch, so that the first one decides much of what the step can move; "
        "momentum and decay still move all. With one micro-batch in a step it is `gmt-gate` with "
        "gate={'policy': 'P0', 'leaky': True}. The number is exact here, where the source lets ties "
        "in; clipping sees what is left, where the source does not clip. With several processes a "
        "micro-batch in no_sync() is masked by each process alone."
    ),
    source="a re-implementation",
    variant="released",
    warning="The authors' code was not found; the paper masks once a step, as `gmt` and `gmt-gate` do.",
    paper="Enhancing Large Language Model Performance with Gradient-Based Parameter Selection",
    year=2024,
    arxiv="2406.15330",
    **_EACH_STEP | {"when": "all once; what moves, after every micro-batch"},
)

_MASKED_UPDATES: dict[str, Any] = {
    "source": "summaries of the paper, and a re-implementation",
    "variant": "paper",
    "paper": "On Surprising Effectiveness of Masking Updates in Adaptive Optimizers",
    "authors": "Taejong Joo and Wenhan Xia and Cheolmin Kim and Ming Zhang and Eugene Ie",
    "year": 2026,
    "arxiv": "2602.15322",
} | _EACH_STEP

Recipe(
    id="magma",
    title="Magma",
    config=_EVERYTHING | {"gate": Magma()},
    scores="nothing; each tensor moves by chance, as far as momentum and gradient agree",
    cost="two norms and a product",
    notes=(
        "Half of the tensors step, each by its running agreement of momentum and gradient, without "
        "making up for the chance. Decay is AdamW's where a tensor steps, and is not scaled; a "
        "re-implementation scales it too." + _DENSE
    ),
    warning="With which agreement the average starts the paper does not say: gate={'start': 0.0}.",
    **_MASKED_UPDATES,
)

Recipe(
    id="skipupdate",
    title="SkipUpdate",
    config=_EVERYTHING | {"gate": SkipUpdate()},
    scores="nothing; each tensor moves by chance",
    cost="none",
    notes=(
        "Half of the tensors step, each twice as far, so that the mean step is AdamW's; moments go on "
        "in all. Decay is that of one step." + _DENSE
    ),
    **_MASKED_UPDATES,
)

Recipe(
    id="child-tuning-f",
    title="Child-Tuning_F",
    config=_EVERYTHING | {"gate": Bernoulli(0.3, policy="P0", leaky=True)},
    scores="nothing; each gradient counts by chance",
    cost="a random number for each weight",
    notes=(
        "Every gradient is kept with probability 0.3 and divided by it, or taken for 0: momentum and "
        "decay move all weights in every step, as in the released code (its AdamW has betas 0.9 and "
        "0.98 and eps 1e-6). gate={'p': 0.2} changes the chance." + _DENSE
    ),
    source="the released code",
    variant="released",
    paper=(
        "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning"
    ),
    year=2021,
    arxiv="2109.05687",
    **_EACH_STEP,
)

Recipe(
    id="mos",
    title="MOS, merging during training",
    config=_EVERYTHING | {"pull": 0.1},
    scores="nothing; all goes a tenth of the way back after every step",
    cost="one pass over the values",
    notes=(
        "After every step of a later task the trained weights go a tenth of the way to the mean of what "
        "earlier tasks have given, which is the base here: wrap a model that holds that mean (`retouch "
        "merge`, linear), then load the weights to start from. The method trains adapters; give their "
        "names as target_modules. The released code goes back in every forward pass as well, "
        "evaluations included, which drags stored adapters along; here it is once a step. Any "
        "optimizer of this package; the source takes SGD with 0.03."
    ),
    source="the released code",
    variant="paper",
    paper="MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning",
    year=2024,
    arxiv="2412.09441",
    **_EACH_STEP,
)

Recipe(
    id="l2-sp",
    title="L2-SP",
    config=_EVERYTHING | {"decay": "base"},
    scores="nothing; weight decay leads to the base",
    cost="one pass over the values",
    notes=(
        "Weight decay towards the pretrained weights instead of 0: with retouch.SGD it is the gradient "
        "of the penalty, as in the paper, with AdamW and Lion it is decoupled. The paper gives heads a "
        "decay to 0 of their own: a group with decay='weight'. weight_decay is that of the optimizer."
    ),
    source="memory of the paper",
    warning="We have not read the paper again.",
    variant="paper",
    paper="Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    year=2018,
    arxiv="1802.01483",
    **_EACH_STEP,
)
