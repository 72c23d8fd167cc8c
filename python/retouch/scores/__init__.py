"""Scores: how much each coordinate matters, as one float32 tensor per parameter.

A score is anything that can be called as ``score(model, eligible, data, loss_fn)`` and returns a
tensor of the parameter's shape for each name in `eligible` (a mapping of names to
`retouch.eligible.Candidate`). The classes here can also be added, subtracted, multiplied, divided
and raised to a power, with each other, with functions and with numbers, and `minimum`, `maximum`
and ``abs`` take them:

    >>> scores.Gradient() / (scores.Magnitude() + 1e-8) ** 0.5

`register` gives a function or class of yours a name that configs and files may use.
"""

from retouch.names import register_score as register
from retouch.names import score_names
from retouch.scores.activations import Activation, Wanda
from retouch.scores.base import Combined, Score, as_score, maximum, minimum
from retouch.scores.derived import HardExamples, Outliers, RowColumn
from retouch.scores.gradients import D3, Fisher, Gradient, GradStat, Sensitivity, TrueFisher
from retouch.scores.hidden import CosineGap
from retouch.scores.perturbed import Adversarial, Shifted, domain_fisher, robust_gradient
from retouch.scores.ranks import SoftRank
from retouch.scores.weights import (
    ConditionNumber,
    Constant,
    Difference,
    LowRankMagnitude,
    Magnitude,
    Moved,
    Probe,
    Random,
    Stripes,
)

__all__ = [
    "D3",
    "Activation",
    "Adversarial",
    "Combined",
    "ConditionNumber",
    "Constant",
    "CosineGap",
    "Difference",
    "Fisher",
    "GradStat",
    "Gradient",
    "HardExamples",
    "LowRankMagnitude",
    "Magnitude",
    "Moved",
    "Outliers",
    "Probe",
    "Random",
    "RowColumn",
    "Score",
    "Sensitivity",
    "Shifted",
    "SoftRank",
    "Stripes",
    "TrueFisher",
    "Wanda",
    "as_score",
    "domain_fisher",
    "maximum",
    "minimum",
    "register",
    "robust_gradient",
    "score_names",
]
