"""Moving the mask of an engine: values, base and optimizer state go along.

A coordinate that leaves keeps what it holds, and its base is put aside (`Past`), so that deltas, reverts
and `verify_untouched` know for the whole run what the model was. A coordinate that stays keeps its
float32 value bit for bit.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.carrying import carry_, exchange_
from retouch.eligible import own_parameters
from retouch.errors import EngineError, FormatError
from retouch.masks import Mask
from retouch.routes import Path, plan
from retouch.schedules import Clock, StatePolicy
from retouch.selection import Selection
from retouch.slots import Slot, same_bits

if TYPE_CHECKING:
    from retouch.compact import Engine

__all__ = [
    "Kept",
    "Past",
    "Piece",
    "Seeds",
    "State",
    "carried",
    "merged",
    "move",
    "pack_pieces",
    "unpack_pieces",
]

State = dict[str, Any]
_VALUE = "value"  # in what is put aside: the float32 value itself

# (name of the weight, flat positions of newcomers) -> optimizer state of each, by key.
Seeds = Callable[[str, Tensor], dict[str, Tensor]]


class Piece(NamedTuple):
    """Selected coordinates of a parameter and what they held.

    Attributes:
        selection: Which.
        values: [count], in the order of ``selection.flat()``.
    """

    selection: Selection
    values: Tensor

    def only(self, selection: Selection) -> "Piece":
        """The part of it that a smaller selection has."""
        values = self.values.new_empty(selection.count)
        carry(self.selection, selection, [(self.values, values)])
        return Piece(selection, values)

    def put_(self, param: Tensor, name: str) -> None:
        """Writes it into its parameter, bit for bit."""
        shape = self.selection.value_shape
        self.selection.put_(param, self.values.to(param.device).view(shape), name)


def carried(old: Selection, new: Selection) -> tuple[Tensor, Tensor]:
    """Where the coordinates in both stand among the flattened values of either.

    Returns:
        int64 positions in the values of `old` and in those of `new`, on the CPU, ascending.
    """
    if old.kind == "none" or new.kind == "none":
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing
    a, b = old.flat(), new.flat()
    if old.kind == "all":
        return b.to(torch.int64), torch.arange(b.numel())
    if new.kind == "all":
        return torch.arange(a.numel()), a.to(torch.int64)
    return ops.places(a, b).to(torch.int64), ops.places(b, a).to(torch.int64)


def carry(old: Selection, new: Selection, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies values of the coordinates in both selections, in place.

    Args:
        old: A selection.
        new: A selection of the same parameter.
        pairs: Of values of `old`, and what they are written to: values of `new`; of any shape.
    """
    pairs = list(pairs)
    if old.kind == new.kind == "elements" and old.index is not None and new.index is not None:
        carry_([b for _, b in pairs], [a for a, _ in pairs], old.index, new.index, "the values")
        return
    stay = carried(old, new)
    for values, into in pairs:
        moved_to(values, into, *stay)


def merged(a: Piece, b: Piece) -> Piece:
    """Both parts together; where both have a coordinate it is that of `b`."""
    selection = a.selection | b.selection
    values = a.values.new_empty(selection.count)
    for part in (a, b):
        carry(part.selection, selection, [(part.values, values)])
    return Piece(selection, values)


def moved_to(values: Tensor, new: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`new` (any shape) with the flattened `values` at `source` written to `target`, in place."""
    flat = new.view(-1)
    flat[target.to(new.device)] = values.detach().reshape(-1)[source.to(values.device)].to(flat)
    return new


class Past(dict[str, Piece]):
    """The base of coordinates that have moved and are frozen now, by parameter."""

    def leave(self, slot: Slot, dropped: Selection) -> None:
        """Notes what coordinates of a slot held before they moved.

        Args:
            slot: As it is before it changes.
            dropped: Coordinates of its selection that will be frozen.
        """
        if not dropped.count:
            return
        base = Piece(slot.selection, slot.base.reshape(-1)).only(dropped).values
        now = dropped.take(slot.param).reshape(-1)
        moved = ~same_bits(now, base)
        if not bool(moved.any()):
            return
        if dropped.kind == "elements" and not bool(moved.all()):
            where = moved.nonzero().squeeze(1)
            index = dropped.flat()[where.cpu()]
            dropped, base = Selection("elements", dropped.shape, index), base[where]
        self.add(slot.name, Piece(dropped, base))

    def add(self, name: str, part: Piece) -> None:
        """Puts aside one more part of a parameter."""
        self[name] = merged(self[name], part) if name in self else part

    def exchange(self, name: str, slot: Slot | None, new: Selection, base: Tensor) -> int:
        """Takes up what leaves a selection, and gives back what enters it.

        Args:
            name: Of the parameter.
            slot: As it is before it changes; None for a parameter of which nothing was selected.
            new: The selection from now on.
            base: Of its values; those that were put aside are written into it, and forgotten.

        Returns:
            How many coordinates are selected before and after.
        """
        held = self.get(name)
        if slot is not None and slot.selection.kind == new.kind == "elements":
            if held is None or held.selection.kind == "elements":
                found = _exchanged(slot, held, new, base)
                if found is not None:
                    piece, shared = found
                    if piece.selection.count:
                        self[name] = piece
                    else:
                        self.pop(name, None)
                    return shared
        shared = 0
        if slot is not None:
            gone = slot.selection - new
            shared = slot.selection.count - gone.count
            self.leave(slot, gone)
        if name in self:
            held = self[name]
            carry(held.selection, new, [(held.values, base)])
            rest = held.selection - new
            if not rest.count:
                del self[name]
            elif rest.count < held.selection.count:
                self[name] = held.only(rest)
        return shared

    def put_back(self, name: str, param: Tensor) -> None:
        """Writes the base of a parameter's part into it, and forgets the part."""
        self.pop(name).put_(param, name)


def _exchanged(
    slot: Slot, held: Piece | None, new: Selection, base: Tensor
) -> tuple[Piece, int] | None:
    """`Past.exchange` of single coordinates by the kernel; None where it does not take the tensors."""
    old, param = slot.selection, slot.param.detach()
    assert old.index is not None and new.index is not None
    index, values = param.new_empty(0, dtype=old.index.dtype), param.new_empty(0)
    if held is not None and held.selection.index is not None:
        index, values = held.selection.index, held.values
    found = exchange_(base, new.index, old.index, slot.base, index, values, param, slot.name)
    if found is None:
        return None
    where, what, shared = found
    return Piece(Selection.known("elements", new.shape, where).simplest(), what), shared


def pack_pieces(pieces: Mapping[str, Piece]) -> dict[str, list[Any]]:
    """Pieces as lists of what a state dict can hold."""
    none = torch.empty(0, dtype=torch.int32)
    indexes = [p.selection.index for p in pieces.values()]
    return {
        "names": list(pieces),
        "kinds": [p.selection.kind for p in pieces.values()],
        "shapes": [list(p.selection.shape) for p in pieces.values()],
        "index": [none if index is None else index for index in indexes],
        "values": [p.values for p in pieces.values()],
    }


def unpack_pieces(packed: Mapping[str, Any] | None) -> dict[str, Piece]:
    """The pieces of `pack_pieces`.

    Raises:
        FormatError: Parts that do not fit together.
    """
    found: dict[str, Piece] = {}
    if not packed:
        return found
    try:
        for name, kind, shape, index, values in zip(
            *(packed[column] for column in ("names", "kinds", "shapes", "index", "values")),
            strict=True,
        ):
            where = None if kind in ("all", "none") else index.cpu()
            selection = Selection(kind, tuple(int(n) for n in shape), where)
            if values.numel() != selection.count:
                raise ValueError(f"{selection.count} positions, {values.numel()} values of {name}")
            found[name] = Piece(selection, values.detach().reshape(-1))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"the retouch entry of this optimizer state is damaged: {error}"
        ) from error
    return found


# --- the move --------------------------------------------------------------------------------------


def move(
    engine: "Engine", mask: Mask, *, state: StatePolicy, clock: Clock, seeds: Seeds | None
) -> None:
    """`Engine.move`."""
    model = engine.owner()
    mask.check(model)
    engine.check()
    chosen = {name: s for name, s in mask.items() if s.count}
    known = dict(own_parameters(model))
    for name in chosen:
        engine.check_trainable(name, known[name])
    engine.check_held(chosen)
    for slot in engine.slots.values():
        if slot.is_stale():
            slot.sync()
    paths = plan(model, chosen, engine.path_gradient)
    for name in [n for n in engine.slots if n not in chosen]:
        slot = engine.slots[name]
        engine.past.leave(slot, slot.selection)
        if state == "keep":
            _put_aside(engine, slot, slot.selection)
        engine.clear(name)
    for name, selection in chosen.items():
        _move_one(engine, name, known[name], selection, paths[name], state, clock, seeds)
    engine.freeze_rest(model)
    engine.mask = mask


def _move_one(
    engine: "Engine", name: str, param: nn.Parameter, new: Selection, path: Path,
    state: StatePolicy, clock: Clock, seeds: Seeds | None,
) -> None:  # fmt: skip
    slot = engine.slots.get(name)
    if slot is not None and slot.selection == new:
        if slot.path != path:
            slot.path = path
            slot.watch()
        if state == "reset":
            engine.reset_state(slot.value)
        return
    holders = engine.bindings(name)
    old = slot.selection if slot is not None else Selection("none", new.shape)
    value = new.gather(param.detach())
    if value.data_ptr() == param.data_ptr():
        value = value.clone()
    base = value.clone() if value.dtype == param.dtype else new.take(param.detach())
    stayed: list[tuple[Tensor, Tensor]] = []  # carried all at once, which finds their places once
    if slot is not None:
        if state == "keep":
            _put_aside(engine, slot, old - new)
        stayed += [(slot.value, value), (slot.base, base)]
    shared = engine.past.exchange(name, slot, new, base)
    states = []
    for binding in holders:
        back = binding.kept.enter(name, new) if state == "keep" else {}
        if _VALUE in back:
            _bring_back(value, new, param, back.pop(_VALUE))
        have = {} if state == "reset" or slot is None else binding.state_of(slot.value)
        states.append(
            moved_state(
                name, have, old, new, value, stayed if shared else None, clock=clock,
                own_clocks=binding.own_clocks, back=back,
                seeds=seeds if state == "seeded" else None,
            )
        )  # fmt: skip
    carry(old, new, stayed)
    engine.fill(name, param, new, value, base, path, owned=True)
    for binding, moved in zip(holders, states, strict=True):
        if moved:
            binding.set_state(engine.value_for(name), moved)


def _put_aside(engine: "Engine", slot: Slot, gone: Selection) -> None:
    if not gone.count:
        return
    for binding in engine.bindings(slot.name):
        state = binding.state_of(slot.value)
        binding.kept.leave(slot.name, state, slot.value, slot.selection, gone)


def _bring_back(value: Tensor, new: Selection, param: Tensor, held: Piece) -> None:
    """Writes float32 values of before into `value`, where the weight still is what they round to."""
    target = carried(held.selection, new)[1]
    now = new.take(param.detach()).reshape(-1)[target.to(param.device)]
    before = held.values.to(param.device)
    same = same_bits(now, before.to(now.dtype)).cpu()
    moved_to(before, value, same.nonzero().squeeze(1), target[same])


# --- optimizer state -----------------------------------------------------------------------------


class Kept(dict[str, dict[str, Piece]]):
    """Optimizer state, and float32 values, of coordinates that are frozen for now; on the CPU."""

    def leave(
        self, name: str, state: State, value: Tensor, old: Selection, gone: Selection
    ) -> None:
        """Puts the state of coordinates aside.

        Args:
            name: Of the weight.
            state: Of the whole selection.
            value: Its values.
            old: The selection.
            gone: Which of it leave.
        """
        parts = {_VALUE: value.detach()}
        for key, item in state.items():
            if not isinstance(item, Tensor):
                continue
            if key == "step" and item.dim() == 0:
                parts[key] = torch.full(old.value_shape, int(item), dtype=torch.int32)
            elif tuple(item.shape) == old.value_shape:
                parts[key] = item
        mine = self.setdefault(name, {})
        for key, item in parts.items():
            piece = Piece(old, item.reshape(-1)).only(gone)
            piece = Piece(gone, piece.values.cpu().clone())
            mine[key] = merged(mine[key], piece) if key in mine else piece

    def enter(self, name: str, selection: Selection) -> dict[str, Piece]:
        """Takes out what there is of the coordinates of a selection."""
        found: dict[str, Piece] = {}
        for key, piece in list(self.get(name, {}).items()):
            both, rest = piece.selection & selection, piece.selection - selection
            if both.count:
                found[key] = piece.only(both)
            if rest.count:
                self[name][key] = piece.only(rest)
            else:
                del self[name][key]
        if name in self and not self[name]:
            del self[name]
        return found


def moved_state(
    name: str,
    state: State,
    old: Selection,
    new: Selection,
    like: Tensor,
    stayed: list[tuple[Tensor, Tensor]] | None,
    *,
    clock: Clock,
    own_clocks: bool,
    back: dict[str, Piece],
    seeds: Seeds | None,
) -> State:
    """The optimizer state of a value after its selection has changed.

    Survivors keep theirs, and newcomers start at 0, unless they come `back` or are seeded.

    Args:
        name: Of the weight.
        state: Of the old selection; {} if the optimizer has not stepped it.
        old: Before.
        new: After.
        like: A tensor of the value's new shape, dtype and device.
        stayed: Receives what is still to be carried from the old selection to the new one, see
            `carry`; None where they have no coordinate in common.
        clock: See `Schedule.clock`.
        own_clocks: Whether the optimizer knows a clock for each coordinate.
        back: State that was put aside.
        seeds: What newcomers start with.

    Returns:
        The state; {} if all of it starts afresh.

    Raises:
        EngineError: Coordinates of different age would have to share one clock.
    """
    newcomers, sown = torch.empty(0, dtype=torch.int64), dict[str, Tensor]()
    if seeds is not None:
        known = [old] if state else []
        newcomers = _in_none(new, known + [piece.selection for piece in back.values()])
        sown = seeds(name, new.flat()[newcomers]) if newcomers.numel() else {}
    survivors = bool(state) and stayed is not None
    if not survivors and not back and not sown:
        return {}
    keys = {k: v for k, v in state.items()}
    for key in [*back, *sown]:
        if key != _VALUE:
            keys.setdefault(key, None)
    moved: State = {}
    done: set[str] = set()  # those that are as they should be
    for key, item in keys.items():
        scalar = not isinstance(item, Tensor) or item.dim() == 0
        if key == "step" and scalar:
            done.add(key)
            moved[key] = _clock(
                name, item, old if survivors else None, new, newcomers, back.get(key),
                sown.get(key), clock, own_clocks,
            )  # fmt: skip
            continue
        if item is not None and (scalar or tuple(item.shape) != old.value_shape):
            if scalar:
                moved[key] = item
                done.add(key)
                continue
            return {}  # factored statistics of another set of rows and columns mean nothing here
        dtype = like.dtype if item is None else item.dtype
        fill = torch.zeros(new.value_shape, dtype=dtype, device=like.device)
        if survivors and stayed is not None and item is not None:
            stayed.append((item, fill))
        moved[key] = fill
    for key, fill in moved.items():
        if key in back and key not in done:
            carry(back[key].selection, new, [(back[key].values, fill)])
        if key in sown and key not in done:
            moved_to(sown[key], fill, torch.arange(newcomers.numel()), newcomers)
    return moved


def _in_none(new: Selection, others: Iterable[Selection]) -> Tensor:
    """Where among the values of a selection the coordinates stand that no other one has; int64."""
    fresh = torch.ones(new.count, dtype=torch.bool)
    for other in others:
        fresh[carried(other, new)[1]] = False
    return fresh.nonzero().squeeze(1)


def _clock(
    name: str, item: Any, old: Selection | None, new: Selection, newcomers: Tensor,
    back: Piece | None, sown: Tensor | None, clock: Clock, own_clocks: bool,
) -> Any:  # fmt: skip
    """The clock of a value whose coordinates had one clock together."""
    step = 0 if item is None else int(item)
    ages = torch.zeros(new.value_shape, dtype=torch.int32)
    if old is not None:
        carry(old, new, [(torch.full(old.value_shape, step, dtype=torch.int32), ages)])
    if back is not None:
        carry(back.selection, new, [(back.values, ages)])
    if sown is not None:
        moved_to(sown, ages, torch.arange(newcomers.numel()), newcomers)
    least, most = (int(x) for x in ages.aminmax()) if ages.numel() else (0, 0)
    if clock == "shared" or least == most:
        most = max(most, step) if clock == "shared" else most
        return torch.tensor(float(most)) if isinstance(item, Tensor) or item is None else most
    if not own_clocks:
        raise EngineError(
            f"{name}: some of its weights have been trained for {most} steps and others for {least}, "
            "and this optimizer counts the steps of a tensor together, so that late joiners would "
            "overshoot: use retouch.AdamW, or Schedule(state='reset'), or accept that by "
            "Schedule(clock='shared')"
        )
    return ages
