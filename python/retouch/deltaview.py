"""How a delta looks: figures of each tensor, HTML, the model card."""

import html
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retouch.deltaentry import Entry
from retouch.deltafile import encode
from retouch.maskview import split

if TYPE_CHECKING:
    from retouch.delta import Delta

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MOST = torch.iinfo(torch.int64).max


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many floats lie between two of one dtype, plus one; 0 where they are equal (-0 is 0).

    Args:
        a: Finite floats of any dtype.
        b: Of the same dtype and shape.

    Returns:
        int64, the largest integer where the distance of two float64 does not fit.
    """

    def ordered(t: Tensor) -> tuple[Tensor, Tensor]:
        bits = t.contiguous().view(_INTEGER[t.element_size()]).to(torch.int64)
        magnitude = bits & torch.iinfo(_INTEGER[t.element_size()]).max
        return bits < 0, magnitude

    (negative, x), (other, y) = ordered(a), ordered(b)
    across = x + y
    across = torch.where(across < 0, torch.full_like(across, _MOST), across)
    return torch.where(negative == other, (x - y).abs(), across)


def stored_bytes(entry: Entry) -> int:
    """Bytes of an entry in its file, without old values and names."""
    if entry.index is None:
        return entry.nbytes
    kept = entry.index.numel() * entry.index.element_size()
    index = encode(entry.index)[1]
    return entry.nbytes - kept + index.numel() * index.element_size()


def figures(entry: Entry) -> dict[str, Any]:
    """See `Delta.stats`."""
    numel = torch.Size(entry.shape).numel()
    row: dict[str, Any] = {
        "kind": entry.kind, "changed": entry.count, "numel": numel,
        "fraction": entry.count / max(numel, 1), "bytes": stored_bytes(entry),
    }  # fmt: skip
    if entry.error is not None:
        row["error"] = entry.error
    # float8_e8m0fnu is all exponent: no sign, so no distance in the sense of `ulps`
    exponents = entry.dtype == torch.float8_e8m0fnu
    value = entry.new
    if entry.old is None or value is None or not entry.dtype.is_floating_point or exponents:
        return row
    old, new = entry.old.detach().reshape(-1).cpu(), value.detach().reshape(-1).cpu()
    finite = old.double().isfinite() & new.double().isfinite()
    row["not_finite"] = int((~finite).sum())
    if not bool(finite.any()):
        return row
    width = _INTEGER[old.element_size()]
    # not every float dtype can be indexed by a mask, every integer dtype can
    old, new = (t.view(width)[finite].view(t.dtype) for t in (old, new))
    change = new.double() - old.double()
    steps = ulps(old, new)
    row["max_abs"], row["l2"] = float(change.abs().max()), float(change.norm())
    row["max_ulp"], row["median_ulp"] = int(steps.max()), int(steps.median())
    row["one_ulp"] = float((steps == 1).double().mean())
    return row


def as_html(delta: "Delta", limit: int = 40) -> str:
    """A table for notebooks: tensors that differ only in the number of their layer share a row."""
    rows: dict[str, list[Any]] = {}
    for name, entry in delta.items():
        group = rows.setdefault(split(name)[0], [0, 0, 0, 0.0])
        found = figures(entry)
        group[0] += 1
        group[1] += found["changed"]
        group[2] += found["numel"]
        group[3] = max(group[3], found.get("max_abs", 0.0))
    known = any(e.old is not None for e in delta.values())
    lines = []
    for name, (tensors, changed, numel, most) in list(rows.items())[:limit]:
        largest = f"<td>{most:.3g}</td>" if known else ""
        lines.append(
            f'<tr><td style="text-align:left"><code>{html.escape(name)}</code></td>'
            f"<td>{tensors}</td><td>{changed:,}</td><td>{numel:,}</td>"
            f"<td>{changed / max(numel, 1):.3%}</td>{largest}</tr>"
        )
    if len(rows) > limit:
        lines.append(f"<tr><td>{len(rows) - limit} more</td></tr>")
    base = f" of {html.escape(delta.base_model)}" if delta.base_model else ""
    largest = "<th>largest change</th>" if known else ""
    return (
        f"<div><b>Delta</b>{base}: {delta.count:,} values in {len(delta)} tensors, "
        f"{delta.nbytes / 2**20:.2f} MiB<table><tr><th>tensors</th><th></th><th>changed</th>"
        f"<th>of</th><th>share</th>{largest}</tr>{''.join(lines)}</table></div>"
    )


def card(delta: "Delta") -> str:
    """The model card, in Markdown."""
    head = ["library_name: retouch", "tags: [retouch, selective-fine-tuning]"]
    # the Hub takes its own ids here, and no paths
    if delta.base_model and _ID.fullmatch(delta.base_model):
        head += [f"base_model: {delta.base_model}", "base_model_relation: adapter"]
    body = (
        f"{delta.count:,} weights in {len(delta)} tensors differ from the base.\n\n"
        "```python\nretouch.Delta.load(folder).apply_(model)\n```\n"
    )
    return "---\n" + "\n".join(head) + "\n---\n\n# Delta\n\n" + body
