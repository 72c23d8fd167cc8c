"""Applying a delta to a model or a state dict, and taking it back: all is checked before any write."""

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.deltaentry import Entry
from retouch.deltasource import Key, memory, named
from retouch.eligible import PLACE
from retouch.errors import BaseMismatchError, EngineError, FormatError, ShapeError
from retouch.slots import same_bits

if TYPE_CHECKING:
    from retouch.delta import Delta

Target = nn.Module | dict[str, Tensor]


def move(delta: "Delta", target: Target, force: bool, *, forward: bool) -> None:
    """See `Delta.apply_` and `Delta.revert_`."""
    tensors = named(target)
    wrong: list[str] = []
    damaged: list[str] = []
    foreign: set[str] = set()
    todo: list[tuple[str, Entry, Tensor]] = []
    whole: list[tuple[str, Entry]] = []
    taken: dict[Key, Entry] = {}
    again: set[int] = set()
    for name, entry in delta.items():
        places = _places(delta, tensors, name)
        if entry.kind in ("added", "removed"):
            if isinstance(target, nn.Module):
                raise ShapeError(
                    f"{name} was {entry.kind}: a model cannot gain or lose a tensor; apply the "
                    "delta to a state dict or, with `retouch apply`, to a checkpoint"
                )
            want = entry.result_hash if entry.kind == "added" else entry.base_hash
            same = all(ops.fingerprint(t) == want for t in places) or want is None
            creates = (entry.kind == "added") == forward
            if places and not same:
                wrong.append(name)
                foreign.add(name)
            if bool(places) != creates or not same:
                whole.append((name, entry))
            continue
        if not places:
            raise ShapeError(f"the target has no tensor {name}")
        for tensor in places:
            check_shape(name, entry, tensor)
            before, after = entry.base_hash, entry.result_hash
            if not forward:
                before, after = after, before
            now = ops.fingerprint(tensor)
            if now == after or (
                forward and after is None and now != before and _holds(entry, tensor)
            ):
                continue
            values = _values(entry, tensor, forward)
            if before is not None and now != before:
                foreign.add(name)
            elif not force and after is not None and entry.leads_to(tensor, values) != after:
                # from the right base it must: else the values are not what they were
                (foreign.add if before is None else damaged.append)(name)
            if name in foreign and name not in wrong:
                wrong.append(name)
            other = taken.setdefault(memory(tensor), entry)
            if other is not entry:
                if not _same_change(entry, other, forward):
                    raise ShapeError(
                        f"{name} shares its memory with another tensor of the target, but the delta "
                        "changes the two differently"
                    )
                again.add(len(todo))
            todo.append((name, entry, tensor))
    if wrong and not force:
        raise BaseMismatchError(
            f"this is not the {'base' if forward else 'result'} of the delta: {len(wrong)} tensors "
            f"differ ({some(wrong)}); force=True goes on all the same"
        )
    if damaged:
        raise FormatError(
            f"the delta is damaged: its values for {some(damaged)} do not lead to the "
            "fingerprint that it has for them"
        )
    # all that is remembered is read before anything is written: two names may share memory
    for name, entry, tensor in todo:
        if forward and entry.old is None and name not in foreign:
            entry.old = entry.read(tensor).cpu()
    for i, (name, entry, tensor) in enumerate(todo):
        if i not in again:
            entry.write(tensor, _values(entry, tensor, forward), name)
    for name, entry in whole:
        _whole(delta, target, name, entry, forward, name not in foreign)
    resync(target)


def _values(entry: Entry, tensor: Tensor, forward: bool) -> Tensor:
    """What is to be written into a tensor that is not yet as it shall be."""
    values = entry.old
    if forward:
        values = entry.value if entry.change is None else entry.after(entry.read(tensor))
    assert values is not None
    return values


def _holds(entry: Entry, tensor: Tensor) -> bool:
    """Whether a tensor has what the entry makes of the old values that it knows."""
    new = entry.new if entry.change is not None else None
    if new is None:
        return False
    return bool(same_bits(entry.read(tensor).cpu().reshape(-1), new.cpu().reshape(-1)).all())


def _names(delta: "Delta", name: str) -> list[str]:
    return [name, *(alias for alias, n in delta.aliases.items() if n == name)]


def _places(delta: "Delta", tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The tensors that have this name or one tied to it; the same memory once."""
    found = [tensors[n] for n in _names(delta, name) if n in tensors]
    return list({memory(t): t for t in found}.values())


def _whole(
    delta: "Delta", target: Target, name: str, entry: Entry, forward: bool, remember: bool
) -> None:
    if not isinstance(target, MutableMapping):
        raise EngineError(f"wanted a model or a dict, got {type(target).__name__}")
    if (entry.kind == "added") == forward:
        new = entry.value if forward else entry.old
        assert new is not None
        new = new.clone()
        target.update({n: new for n in _names(delta, name)})
        return
    there = [n for n in _names(delta, name) if n in target]
    if entry.kind == "removed" and entry.old is None and remember:
        entry.old = target[there[0]].detach().clone().cpu()
    for n in there:
        del target[n]


def swap_out(delta: "Delta", model: Target) -> list[tuple[Tensor, Entry, str]]:
    """What `Delta.reverted` swaps; checked, nothing written.

    Raises:
        BaseMismatchError: The model does not hold the values of the delta.
        FormatError: Old values are not known.
        ShapeError: A tensor is missing, has another shape or dtype, or was added or removed.
    """
    tensors, held = named(model), []
    for name, entry in delta.items():
        if entry.kind in ("added", "removed"):
            raise ShapeError(f"{name} was {entry.kind}: a model cannot gain or lose a tensor")
        new = entry.new
        if entry.old is None or new is None:
            raise FormatError(f"this delta does not hold the old values of {name}")
        places = _places(delta, tensors, name)
        if not places:
            raise ShapeError(f"the target has no tensor {name}")
        for tensor in places:
            check_shape(name, entry, tensor)
            now = entry.read(tensor)
            if not bool(same_bits(now.reshape(-1), new.to(now.device).reshape(-1)).all()):
                raise BaseMismatchError(
                    f"{name} does not hold the values of this delta: apply it first"
                )
            held.append((tensor, entry, name))
    return held


def check_shape(name: str, entry: Entry, tensor: Tensor) -> None:
    """Raises ShapeError if a tensor is not of the entry's shape and dtype."""
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise ShapeError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; the delta is for "
            f"{entry.dtype} of shape {entry.shape}"
        )


def _same_change(a: Entry, b: Entry, forward: bool) -> bool:
    """Whether two entries write the same bits to the same places."""
    if a.change is not None and b.change is not None and forward:
        x: Tensor | None = a.change.decode()
        y: Tensor | None = b.change.decode()
    else:
        x, y = (a.value, b.value) if forward else (a.old, b.old)
    if a.kind != b.kind or x is None or y is None or x.numel() != y.numel():
        return False
    if a.index is not None and b.index is not None and not torch.equal(a.index, b.index):
        return False
    return bool(same_bits(x.reshape(-1), y.reshape(-1)).all())


def resync(target: Target) -> None:
    """Tells the engine of a wrapped model that its weights were written."""
    engine: Any = target._modules.get(PLACE) if isinstance(target, nn.Module) else None
    if engine is not None and hasattr(engine, "sync_from_weights"):
        engine.sync_from_weights()


def some(names: list[str]) -> str:
    """A few names, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
