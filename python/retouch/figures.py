"""Figures of a selective run, for its log."""

import math
from typing import TYPE_CHECKING

from retouch.eligible import own_parameters

if TYPE_CHECKING:
    from retouch.compact import Engine

__all__ = ["figures"]


def figures(engine: "Engine") -> dict[str, float]:
    """Figures for a log.

    Returns:
        `density` (selected of all parameters), `selected`, `state_bytes` (of the optimizer, with what
        is put aside of it), `delta_bytes` (positions and values of an uncompressed delta), with
        several processes `sent_bytes` (gradients that each sends at a step), with a moving mask
        `changes` of it; and of the last step, if `measure` was on, `update_norm` (length of the
        step, in float32 values) and `lost_updates` (the fraction of the selected whose value moved
        and whose rounded weight did not).
    """
    slots = engine.slots.values()
    selected = sum(slot.selection.count for slot in slots)
    total = sum(p.numel() for _, p in own_parameters(engine.owner()))
    delta = 0
    for selection, base in (
        *((slot.selection, slot.base) for slot in slots),
        *((part.selection, part.values) for part in engine.past.values()),
    ):
        index = selection.index
        delta += selection.count * base.element_size()
        delta += index.numel() * index.element_size() if index is not None else 0
    live = engine.bindings()
    found = {
        "density": selected / max(total, 1),
        "selected": float(selected),
        "state_bytes": float(sum(b.state_bytes() for b in live)),
        "delta_bytes": float(delta),
    }
    if engine.reducer is not None:
        found["sent_bytes"] = float(engine.reducer.sent)
    if engine.mover is not None:
        found["changes"] = float(engine.mover.changes)
    measured = [b.measured for b in live if b.measured]
    if measured:
        found["update_norm"] = math.hypot(*(m["update_norm"] for m in measured))
        found["lost_updates"] = sum(m["lost"] for m in measured) / max(selected, 1)
    return found
