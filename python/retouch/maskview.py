"""How a mask looks: the line of figures, a table by kind of module, HTML, a plot."""

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retouch.eligible import PLACE
from retouch.maskfile import Layout
from retouch.routes import plan
from retouch.selection import Selection

if TYPE_CHECKING:
    from retouch.masks import Mask

MIB = 2**20
_ADAM = 8  # bytes of two float32 moments
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Group:
    """Parameters that differ only in the number of their layer.

    Attributes:
        name: Their name with ``*`` for the number.
        selected: Elements that may move.
        numel: All elements.
    """

    name: str
    selected: int
    numel: int

    @property
    def density(self) -> float:
        """Selected fraction."""
        return self.selected / max(self.numel, 1)


def split(name: str) -> tuple[str, int | None]:
    """A parameter's name with ``*`` for the first number in it, and that number."""
    found = _LAYER.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start(1)]}*{name[found.end(1) :]}", int(found[1])


def cells(mask: "Mask") -> Iterator[tuple[str, int | None, int, int]]:
    """Of every parameter: group, layer number, selected, numel."""
    for name, one in mask.layout.items():
        selection = mask.get(name)
        group, layer = split(name)
        yield group, layer, selection.count if selection is not None else 0, one.numel


def groups(mask: "Mask") -> list[Group]:
    """The groups of a mask in the order of the model."""
    found: dict[str, Group] = {}
    for name, _, selected, numel in cells(mask):
        old = found.get(name, Group(name, 0, 0))
        found[name] = Group(name, old.selected + selected, old.numel + numel)
    return list(found.values())


def delta_bytes(selections: Mapping[str, Selection], layout: Mapping[str, Layout]) -> int:
    """Bytes of positions and values of an uncompressed delta."""
    total = 0
    for name, selection in selections.items():
        total += selection.count * layout[name].torch_dtype.itemsize
        if selection.index is not None:
            total += selection.index.numel() * selection.index.itemsize
    return total


def line(mask: "Mask") -> str:
    """The figures of a mask, as PEFT prints them."""
    return (
        f"trainable params: {mask.count:,} || all params: {mask.numel:,} || "
        f"trainable%: {100 * mask.density:.4f} || "
        f"optimizer state: {_ADAM * mask.count / MIB:.2f} MiB || "
        f"delta: {delta_bytes(mask, mask.layout) / MIB:.2f} MiB"
    )


def summary(mask: "Mask", modules: bool) -> str:
    """The figures and, if wanted, a table of the groups with any selection."""
    lines = [line(mask)]
    shown = [g for g in groups(mask) if g.selected] if modules else []
    width = max((len(g.name) for g in shown), default=0)
    ways = gradients(mask)
    for g in shown:
        row = f"  {g.name:<{width}}  {g.selected:>13,} of {g.numel:>15,}  {g.density:8.3%}"
        lines.append(f"{row}  {ways.get(g.name, '')}".rstrip())
    return "\n".join(lines)


def gradients(mask: "Mask") -> dict[str, str]:
    """How the gradients of each group are taken, and why; empty if the mask knows no model.

    What holds is asked of the engine if the model is wrapped, else of the rule for "auto".
    """
    model = mask.model()
    if model is None:
        return {}
    engine: Any = model._modules.get(PLACE)
    paths = getattr(engine, "paths", None) or plan(model, mask, "auto")
    found: dict[str, dict[str, int]] = {}
    for name, path in paths.items():
        counts = found.setdefault(split(name)[0], {})
        said = f"{path.gradient} ({path.why})"
        counts[said] = counts.get(said, 0) + 1
    return {
        group: ", ".join(f"{n} {said}" if len(counts) > 1 else said for said, n in counts.items())
        for group, counts in found.items()
    }


def as_html(mask: "Mask") -> str:
    """A table for notebooks, with a bar for the density of each group."""
    found = groups(mask)
    top = max((g.density for g in found), default=0.0) or 1.0
    rows = []
    for g in found:
        bar = f'<div style="background:#4c78a8;height:0.8em;width:{100 * g.density / top:.1f}%"></div>'
        rows.append(
            f'<tr><td style="text-align:left"><code>{html.escape(g.name)}</code></td>'
            f"<td>{g.selected:,}</td><td>{g.numel:,}</td><td>{g.density:.3%}</td>"
            f'<td style="width:10em">{bar}</td></tr>'
        )
    return (
        f"<div><b>Mask</b>: {mask.count:,} of {mask.numel:,} weights may move "
        f"({mask.density:.3%})<table><tr><th>parameters</th><th>selected</th><th>of</th>"
        f"<th>density</th><th></th></tr>{''.join(rows)}</table></div>"
    )


def plot(mask: "Mask", ax: Any = None) -> Any:
    """Density per layer and kind of parameter; see `Mask.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: `pip install "retouch[plot]"`') from error
    names = [g.name for g in groups(mask)]
    numbers = sorted({layer for _, layer, _, _ in cells(mask) if layer is not None})
    outside = any(layer is None for _, layer, _, _ in cells(mask))
    columns: list[int | None] = [*([None] if outside else []), *numbers]
    grid = [[float("nan")] * len(columns) for _ in names]
    for name, layer, selected, numel in cells(mask):
        grid[names.index(name)][columns.index(layer)] = selected / max(numel, 1)
    if ax is None:
        size = (
            2.5 + 0.3 * len(columns) + 0.07 * max(map(len, names), default=0),
            1 + 0.25 * len(names),
        )
        _, ax = plt.subplots(figsize=size, layout="constrained")
    image = ax.imshow(grid, aspect="auto", vmin=0)
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(len(columns)), ["-" if c is None else str(c) for c in columns])
    ax.set_xlabel("layer (-: outside of any)")
    ax.set_title(f"{mask.count:,} of {mask.numel:,} weights may move ({mask.density:.3%})")
    ax.figure.colorbar(image, ax=ax, label="density")
    return ax
