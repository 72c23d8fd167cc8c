"""How a mask looks: a table for notebooks, a plot per layer."""

import html as escape
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retouch.masks import Mask

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def place(name: str) -> tuple[str, int | None]:
    """A parameter's name without its first number, and that number: (kind of module, layer)."""
    found = _LAYER.search(name)
    if found is None:
        return name, None
    return (name[: found.start()] + name[found.end() :]).strip("."), int(found.group(1))


def grid(mask: "Mask") -> tuple[list[str], list[int], dict[tuple[str, int], float]]:
    """Densities by module kind and layer, of the parameters that lie in numbered layers."""
    selected: dict[tuple[str, int], int] = {}
    total: dict[tuple[str, int], int] = {}
    for name, selection in mask.items():
        kind, layer = place(name)
        key = (kind, 0 if layer is None else layer)
        selected[key] = selected.get(key, 0) + selection.count
        total[key] = total.get(key, 0) + selection.numel
    kinds = list(dict.fromkeys(kind for kind, _ in total))
    layers = sorted({layer for _, layer in total})
    return kinds, layers, {key: selected[key] / max(total[key], 1) for key in total}


def plot(mask: "Mask", ax: Any = None) -> Any:
    """See `Mask.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("Mask.plot needs matplotlib: pip install 'retouch[plot]'") from e
    kinds, layers, density = grid(mask)
    if ax is None:
        size = (2 + 0.35 * len(layers), 1 + 0.35 * len(kinds))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    nan = float("nan")
    cells = [[100 * density.get((k, i), nan) for i in layers] for k in kinds]
    image = ax.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_xticks(range(len(layers)), layers)
    ax.set_xlabel("layer")
    ax.set_title(f"{mask.count:,} of {mask.numel:,} weights may move")
    ax.figure.colorbar(image, ax=ax, label="selected, %")
    return ax


def html(mask: "Mask") -> str:
    """A table of module kinds: selected, all, density."""
    selected: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, selection in mask.items():
        kind, _ = place(name)
        selected[kind] = selected.get(kind, 0) + selection.count
        total[kind] = total.get(kind, 0) + selection.numel
    rows = "".join(
        f"<tr><td>{escape.escape(kind)}</td><td>{selected[kind]:,}</td><td>{total[kind]:,}</td>"
        f"<td>{selected[kind] / max(total[kind], 1):.3%}</td></tr>"
        for kind in total
    )
    return (
        f"<p><b>Mask</b>: {mask.count:,} of {mask.numel:,} weights may move ({mask.density:.4%})</p>"
        "<table><tr><th>module</th><th>selected</th><th>weights</th><th>density</th></tr>"
        f"{rows}</table>"
    )
