"""Published methods, each as a set of config fields: `list`, `info`, `bibtex`, `markdown`.

    >>> retouch.recipes.info("fish").paper
    'Training Neural Networks with Fixed Sparse Masks'
    >>> mask = retouch.select(model, "fish", data=loader)

A recipe holds declarations only; whatever it computes is a score or a selector of this package.
"""

from retouch.recipes import (
    gates,
    gradients,
    inputs,
    lora,
    moving,
    plain,
    references,
    rounds,
    shira,
    updates,
    weights,
)
from retouch.recipes._registry import Recipe, bibtex, info, markdown, rows

__all__ = [
    "Recipe",
    "bibtex",
    "gates",
    "gradients",
    "info",
    "inputs",
    "list",
    "lora",
    "markdown",
    "moving",
    "plain",
    "references",
    "rounds",
    "shira",
    "updates",
    "weights",
]


def list() -> tuple[Recipe, ...]:
    """All recipes by id."""
    return rows()
