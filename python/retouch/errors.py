"""What retouch raises.

Every exception is a `RetouchError` and also the built-in that Python code would expect in its place
(`ValueError`, `TypeError`), so both ``except RetouchError`` and ``except ValueError`` work.
Failures of the operating system (no such file, no permission, full disk) stay `OSError`.
"""


class RetouchError(Exception):
    """Base of every error of this package."""


class ShapeError(RetouchError, ValueError):
    """Tensors whose sizes do not fit together."""


class LayoutError(RetouchError, TypeError):
    """A tensor of a dtype, device or stride that is not taken."""


class HyperparameterError(RetouchError, ValueError):
    """A number or an option out of its range."""


class ScoreError(RetouchError, ValueError):
    """Scores that cannot be ranked, such as NaN."""


class BudgetError(RetouchError, ValueError):
    """A budget that selects nothing, or more than there is."""


class MaskError(RetouchError, ValueError):
    """A mask that does not fit the model."""


class EngineError(RetouchError, RuntimeError):
    """A model that is not wrapped, is wrapped twice, or changed under the engine."""


class FrozenError(RetouchError, RuntimeError):
    """A weight that should be frozen has moved."""


class BaseMismatchError(RetouchError, ValueError):
    """A delta met a base that is not its own."""


class FormatError(RetouchError, ValueError):
    """A file that is damaged, truncated, or of an unknown format or version."""
