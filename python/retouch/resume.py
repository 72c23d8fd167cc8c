"""Going back to a saved state of a run: masks, values, bases, and what has moved and is frozen now."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from retouch.eligible import own_parameters
from retouch.errors import FormatError, MaskError
from retouch.masks import Mask
from retouch.migrate import Piece
from retouch.routes import plan
from retouch.selection import Selection

if TYPE_CHECKING:
    from retouch.compact import Engine

__all__ = ["Part", "describe", "restore", "restore_past"]


class Part(NamedTuple):
    """What is saved of one masked parameter; see `Slot`."""

    selection: Selection
    value: Tensor
    base: Tensor
    base_hash: str


def describe(engine: "Engine") -> dict[str, Any]:
    """What is saved of a run beside masks and values: JSON-able."""
    metadata = engine.mask.metadata if engine.mask is not None else {}
    moving = engine.mover.describe() if engine.mover is not None else None
    return {"hashes": engine.hashes, "metadata": metadata, "moving": moving}


def restore(
    engine: "Engine",
    parts: dict[str, Part],
    before: Iterable[str],
    run: dict[str, Any],
) -> None:
    """Goes back to a saved mask, its values and its base.

    Args:
        engine: Of the model.
        parts: Of each selected parameter the selection, values, base and hash of the base.
        before: Parameters of the same optimizer, which are frozen again unless in `parts`.
        run: What `describe` returned when the state was saved.

    Raises:
        MaskError: The model has no such parameter, or one of another shape.
        FormatError: Sizes or dtypes that do not fit together.
    """
    model = engine.owner()
    known = dict(own_parameters(model))
    for name, (selection, value, base, _) in parts.items():
        param = known.get(name)
        if param is None or tuple(param.shape) != selection.shape:
            have = "no such parameter" if param is None else f"shape {tuple(param.shape)}"
            raise MaskError(f"saved {name} has shape {selection.shape}; the model has {have}")
        if base.dtype != param.dtype:
            raise MaskError(f"saved {name} is {base.dtype}, in this model {param.dtype}")
        engine.check_trainable(name, param)
        if value.shape != base.shape or value.numel() != selection.count:
            raise FormatError(
                f"saved {name}: {selection.count} selected, but {value.numel()} values and "
                f"{base.numel()} base values"
            )
    for name in before:
        slot = engine.slots[name]
        slot.selection.put_(slot.param, slot.base, name)  # what is not restored is frozen
        if name not in parts:
            engine.clear(name)
    engine.hashes = dict(run.get("hashes") or engine.hashes)
    paths = plan(model, {n: p.selection for n, p in parts.items()}, engine.path_gradient)
    for name, (selection, value, base, base_hash) in parts.items():
        engine.fill(name, known[name], selection, value, base, paths[name], base_hash)
        engine.slots[name].write()
    engine.freeze_rest(model)
    metadata = dict(run.get("metadata") or {})
    engine.mask = Mask({n: s.selection for n, s in engine.slots.items()}, model, metadata)


def restore_past(engine: "Engine", past: dict[str, Piece], now: list[Tensor]) -> None:
    """Goes back to what had moved and was frozen when a state was saved.

    Raises:
        MaskError: The model has no such parameter, or another one.
        FormatError: Sizes or dtypes that do not fit together.
    """
    known = dict(own_parameters(engine.owner()))
    for name, piece in past.items():
        param = known.get(name)
        if param is None or tuple(param.shape) != piece.selection.shape:
            raise MaskError(f"saved {name} has shape {piece.selection.shape}; not so the model")
        if piece.values.dtype != param.dtype:
            raise MaskError(f"saved {name} is {piece.values.dtype}, in this model {param.dtype}")
    if len(now) != len(past):
        raise FormatError(f"{len(past)} frozen parameters with the values of {len(now)}")
    for name in [*engine.past]:
        if name not in past:
            engine.past.put_back(name, known[name])
    for (name, piece), values in zip(past.items(), now, strict=True):
        if name in engine.past:
            engine.past.put_back(name, known[name])
        Piece(piece.selection, values).put_(known[name], name)
        if name in engine.slots:
            engine.slots[name].version = known[name]._version
        engine.past[name] = Piece(piece.selection, piece.values.to(known[name].device))
