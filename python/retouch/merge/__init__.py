"""Merging: several models of one shape become one.

A `Plan` says which tensors of which sources become which output tensor by which method; `run` carries
it out tensor by tensor. Methods are registered by name: `method_names`, `method_named`.
"""

from retouch.merge.base import Job, Method, Param, method_named, method_names, register
from retouch.merge.plan import Input, Plan, Source, TensorPlan

__all__ = [
    "Input",
    "Job",
    "Method",
    "Param",
    "Plan",
    "Source",
    "TensorPlan",
    "method_named",
    "method_names",
    "register",
]
