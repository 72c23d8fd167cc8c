"""The rows of the catalogue."""

from dataclasses import dataclass, field
from typing import Any

from retouch.config import BUDGETS, SelectConfig, register_preset
from retouch.errors import HyperparameterError
from retouch.names import close_to
from retouch.recipes._modules import WORDS

_rows: dict[str, "Recipe"] = {}

_STATES = {
    "heads": "heads", "output_embeddings": "output embedding", "embeddings": "embeddings",
    "norms": "norms", "norm_biases": "biases of norms", "biases": "biases", "convs": "convolutions",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A published method as a combination of this package's parts.

    Attributes:
        id: Its name for `retouch.select`.
        title: Name of the method.
        config: The fields of `SelectConfig` that make it.
        scores: What ranks the weights, in words.
        cost: What choosing costs.
        notes: What to know before use: what differs from the source, for which models it is.
        source: What it was written from.
        warning: What of it is uncertain, "" where our source is sure.
        when: When the mask is chosen.
        variant: "paper", or "released" where the authors' code differs and is followed.
        paper: Title of the paper, "" where there is none.
        authors: Of the paper, "" where we have no sure source for them.
        year: Of the paper.
        arxiv: Its number at arXiv.
    """

    id: str
    title: str
    config: dict[str, Any] = field(repr=False)
    scores: str
    cost: str
    notes: str
    source: str
    warning: str = ""
    when: str = "once, before training"
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

    @property
    def where(self) -> str:
        """What competes, in which units, what is trained whole or left out; from the config."""
        config = SelectConfig(**self.config)

        def named(state: str, *modules: Any) -> str:
            kinds = [words for name, words in _STATES.items() if getattr(config, name) == state]
            return ", ".join([WORDS.get(m, str(m)) for m in modules if m != []] + kinds)

        text = []
        if config.anything_competes():
            target = "all" if config.target_modules is None else config.target_modules
            first = f"{config.granularity}s of {named('masked', target)}"
            text.append(first + (f", in each {config.scope}" * (config.scope != "global")))
        if whole := named("full", config.modules_to_save or []):
            text.append(f"whole: {whole}")
        if left_out := named("frozen", config.exclude_modules or []):
            text.append(f"not: {left_out}")
        return "; ".join(text)

    @property
    def budget(self) -> str:
        """The default budget; from the config."""
        config = SelectConfig(**self.config)
        if config.direction == "bernoulli":
            return "each by its own chance"
        for name in BUDGETS:
            value = getattr(config, name)
            if value is not None:
                ends = f" {config.direction}" if config.direction in ("bottom", "weighted") else ""
                frozen = " frozen" if config.polarity == "freeze" else ""
                counted = ", all counted" if config.counted_in_budget is True else ""
                return f"{name}={value:g}{ends}{frozen}{counted}"
        return "all of them"


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
    fields = {
        "title": row.paper,
        "author": row.authors,
        "year": row.year,
        "eprint": row.arxiv,
        "archivePrefix": "arXiv",
    }
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items() if value]
    return "\n".join([f"@misc{{{row.id},", *lines, "}"])


def markdown() -> str:
    """All recipes as a table."""
    lines = ["| recipe | method | arXiv | scores | where | budget |", "|---|---|---|---|---|---|"]
    for row in rows():
        paper = f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else ""
        cells = (f"`{row.id}`", row.title, paper, row.scores, row.where, row.budget)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)
