"""The rows of the catalogue."""

from dataclasses import dataclass, field
from typing import Any

from retouch.config import register_preset
from retouch.errors import HyperparameterError
from retouch.names import close_to

_rows: dict[str, "Recipe"] = {}


@dataclass(frozen=True)
class Recipe:
    """A published method as a combination of this package's parts.

    Attributes:
        id: Its name for `retouch.select`.
        title: Name of the method.
        config: The fields of `SelectConfig` that make it.
        cost: What choosing costs.
        notes: What to know before use: what differs from the source, for which models it is.
        variant: "paper", or "released" where the authors' code differs and is followed.
        paper: Title of the paper, "" where there is none.
        authors: Of the paper.
        year: Of the paper.
        arxiv: Its number at arXiv.
    """

    id: str
    title: str
    config: dict[str, Any] = field(repr=False)
    cost: str
    notes: str
    variant: str = ""
    paper: str = ""
    authors: str = ""
    year: int | None = None
    arxiv: str = ""

    def __post_init__(self) -> None:
        if self.id in _rows:
            raise HyperparameterError(f"two recipes are named {self.id!r}")
        register_preset(self.id, **self.config)
        _rows[self.id] = self


def rows() -> tuple[Recipe, ...]:
    """All recipes by id."""
    return tuple(_rows[name] for name in sorted(_rows))


def info(name: str) -> Recipe:
    """The row of a recipe.

    Raises:
        HyperparameterError: There is none of this name.
    """
    if name not in _rows:
        raise HyperparameterError(
            f"no recipe is named {name!r}{close_to(name, _rows)}; recipes: "
            f"{', '.join(sorted(_rows))}"
        )
    return _rows[name]


def bibtex(name: str) -> str:
    """The paper of a recipe for a bibliography; "" if it has none.

    Raises:
        HyperparameterError: There is no recipe of this name.
    """
    row = info(name)
    if not row.paper:
        return ""
    return (
        f"@misc{{{row.id},\n"
        f"  title = {{{row.paper}}},\n"
        f"  author = {{{row.authors}}},\n"
        f"  year = {{{row.year}}},\n"
        f"  eprint = {{{row.arxiv}}},\n"
        "  archivePrefix = {arXiv},\n"
        "}"
    )
