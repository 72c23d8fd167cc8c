"""Published methods, each as a set of config fields: `list`, `info`, `bibtex`.

    >>> retouch.recipes.info("fish").paper
    'Training Neural Networks with Fixed Sparse Masks'
    >>> mask = retouch.select(model, "fish", data=loader)

A recipe holds declarations only; whatever it computes is a score or a selector of this package.
"""

from retouch import scores as _scores  # noqa: F401  (recipes use the names that it registers)
from retouch.recipes import gradients, plain
from retouch.recipes._registry import Recipe, bibtex, info, rows

__all__ = ["Recipe", "bibtex", "gradients", "info", "list", "plain"]


def list() -> tuple[Recipe, ...]:
    """All recipes by id."""
    return rows()
