"""Merging: several models of one shape become one.

A `Plan` says which tensors of which sources become which output tensor by which method; `build` makes one
for models whose tensors have the same names, `run` carries it out tensor by tensor. `merge_state_dicts`
merges what is in memory. Methods are registered by name: `method_names`, `method_named`.
"""

from retouch.merge import (  # noqa: F401  they register
    averages,
    factormethods,
    geometry,
    measured,
    sparse,
    spectral,
    votes,
)
from retouch.merge.base import Job, Method, Param, method_named, method_names, register
from retouch.merge.build import build
from retouch.merge.collect import collect_fisher, collect_gram
from retouch.merge.engine import Result, TensorResult, run
from retouch.merge.fitting import FittedWeights, entropy, fit_weights
from retouch.merge.memory import merge_state_dicts
from retouch.merge.plan import Input, Plan, Source, TensorPlan
from retouch.merge.sources import Reader, open_sources

__all__ = [
    "FittedWeights",
    "Input",
    "Job",
    "Method",
    "Param",
    "Plan",
    "Reader",
    "Result",
    "Source",
    "TensorPlan",
    "TensorResult",
    "build",
    "collect_fisher",
    "collect_gram",
    "entropy",
    "fit_weights",
    "merge_state_dicts",
    "method_named",
    "method_names",
    "open_sources",
    "register",
    "run",
]
