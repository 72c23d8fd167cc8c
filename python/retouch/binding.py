"""Ties one optimizer to the compact values of an engine: steps, closures, state dicts.

An `Engine` owns the compact parameters; a `Binding` sits on one (innermost) optimizer and, by
torch's own hooks,

* before a step, makes sure that the model is still the one that was wrapped and that every
  gradient is in its compact parameter;
* after a backward pass, lets gates close that do so while gradients add up (`retouch.running`);
* after a step (and before each evaluation of a closure), writes the values into the weights;
* adds the masters, their positions and their base to `optimizer.state_dict()`, and takes them out
  again.

The extra entry is `param_groups[i]["retouch"]`, a dict of lists with one item per parameter of the
group. It is there, and not in the state of the parameters, because `Optimizer.load_state_dict`
casts every tensor of that state to the dtype of the parameter (an index becomes a float), while
tensors in a group survive `torch.save`, `weights_only` loading, Accelerate's round trip and DCP as
they are.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from retouch.eligible import own_parameters
from retouch.errors import EngineError, FormatError
from retouch.masks import Selection
from retouch.migrate import Kept, State, pack_pieces, unpack_pieces
from retouch.resume import Part, describe, restore, restore_past
from retouch.running import Running
from retouch.slots import Slot, same_bits, some

if TYPE_CHECKING:
    from retouch.compact import Engine

STATE_KEY = "retouch"
_STATE_VERSION = 2


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer that really steps, inside of wrappers such as Accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise EngineError(f"wanted a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def unpacked(optimizer: Optimizer, value: Tensor, selection: Selection) -> State:
    """The state of a value with one number for each coordinate, as far as the optimizer says how."""
    state: State = optimizer.state[value]
    unpack = getattr(optimizer, "unpack_state", None)
    return state if unpack is None else unpack(value, selection, state)


def packed(optimizer: Optimizer, value: Tensor, selection: Selection, state: State) -> State:
    """The state that `unpacked` gave, as the optimizer keeps it."""
    pack = getattr(optimizer, "pack_state", None)
    return state if pack is None else pack(value, selection, state)


class Binding:
    """The hooks of one engine on one optimizer."""

    def __init__(self, engine: "Engine", optimizer: Optimizer) -> None:
        self._engine = engine
        self._optimizer = weakref.ref(optimizer)
        self._before_step: list[tuple[Slot, Tensor, Tensor]] = []
        self._dry_run = False
        self._held: set[int] = set()  # ids of what the last step found in the groups
        self.measured: dict[str, float] = {}
        self.kept = Kept()
        self._running = Running(engine, optimizer)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
            optimizer.register_load_state_dict_post_hook(lambda _: self._running.listen()),
        ]
        # Schedule-free optimizers change their parameters between training and evaluation.
        self._switches = [n for n in ("train", "eval") if callable(getattr(optimizer, n, None))]
        for name in self._switches:
            setattr(optimizer, name, self._then_write(getattr(optimizer, name)))
        self._adopt_loaded(optimizer)
        self._running.listen()

    @property
    def optimizer(self) -> Optimizer | None:
        """The bound optimizer, None once it is gone."""
        return self._optimizer()

    def slots(self) -> Iterator[Slot]:
        """The slots whose values this optimizer steps, in its order."""
        optimizer = self._optimizer()
        for group in optimizer.param_groups if optimizer is not None else ():
            for param in group["params"]:
                slot = self._engine.slot_of(param)
                if slot is not None:
                    yield slot

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state of the compact values."""
        optimizer = self._optimizer()
        if optimizer is None:
            return 0
        return sum(
            x.numel() * x.element_size()
            for slot in self.slots()
            for x in optimizer.state.get(slot.value, {}).values()
            if isinstance(x, Tensor)
        ) + sum(
            piece.values.numel() * piece.values.element_size()
            for state in self.kept.values()
            for piece in state.values()
        )

    @property
    def own_clocks(self) -> bool:
        """Whether the optimizer takes a clock for each coordinate (`AdamW`, `Adafactor`)."""
        return bool(getattr(self._optimizer(), "own_clocks", False))

    def holds(self, value: Tensor) -> bool:
        """Whether the optimizer steps a compact value."""
        optimizer = self._optimizer()
        groups = optimizer.param_groups if optimizer is not None else []
        return any(p is value for group in groups for p in group["params"])

    def state_of(self, value: Tensor) -> State:
        """The optimizer's state of a compact value by coordinates; {} before its first step."""
        optimizer, slot = self._optimizer(), self._engine.slot_of(value)
        if optimizer is None or slot is None or not optimizer.state.get(value):
            return {}
        return unpacked(optimizer, value, slot.selection)

    def set_state(self, value: Tensor, state: State) -> None:
        """Replaces the optimizer's state of a compact value by one by coordinates."""
        optimizer, slot = self._optimizer(), self._engine.slot_of(value)
        if optimizer is not None and slot is not None:
            optimizer.state[value] = packed(optimizer, value, slot.selection, state)

    def remove(self) -> None:
        """Takes the hooks off; a later step is an error instead of a silent no-op."""
        self._running.remove()
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            for name in self._switches:
                del optimizer.__dict__[name]
            optimizer.register_step_pre_hook(_refuse)

    def reset(self, value: Tensor) -> None:
        """Starts the optimizer's state of one compact value afresh, at the value's present size."""
        optimizer = self._optimizer()
        if optimizer is None or value not in optimizer.state:
            return
        for group in optimizer.param_groups:
            if any(p is value for p in group["params"]) and "initial_accumulator_value" in group:
                # Adagrad makes its state when it is built and never again.
                for key, old in optimizer.state[value].items():
                    fill = group["initial_accumulator_value"] if key == "sum" else 0.0
                    like = value if key == "sum" else old
                    optimizer.state[value][key] = torch.full_like(like, fill)
                return
        del optimizer.state[value]

    # --- stepping ------------------------------------------------------------------------------

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._engine.check()
        self._engine.check_groups(optimizer)
        self._check_kept(optimizer)
        self._running.listen()  # groups may have been given other gates
        slots = list(self.slots())
        for slot in slots:
            slot.fused = None
            slot.collect()  # a gradient that was set by hand
            if slot.is_stale():  # written by load_state_dict, a delta or the user
                slot.sync()
        self._dry_run = is_dry_run(optimizer)
        if not self._dry_run:
            self._engine.check_reduced()
            if self._engine.mover is not None:
                self._engine.mover.before_step()
                slots = list(self.slots())
        self._before_step = (
            [(s, s.value.detach().clone(), s.selection.take(s.param)) for s in slots]
            if self._engine.measure
            else []
        )
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._after_write(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._after_write(kwargs["closure"])}
        return None

    def _check_kept(self, optimizer: Optimizer) -> None:
        """Raises EngineError if values have been taken out of the groups: nobody would step them."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gone = self._held - held
        lost = [n for n, s in self._engine.slots.items()
                if id(s.value) in gone and not self._engine.bindings(n)]  # fmt: skip
        if lost:
            raise EngineError(
                f"the optimizer no longer holds the compact values of {some(lost)}, though the mask "
                "selects them: have its groups been given other tensors? To freeze them, change the "
                "mask (Engine.move)"
            )
        self._held = held

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for slot in self.slots():
            if slot.fused != slot.value._version:
                slot.write()
            slot.fused = None
        dry = self._dry_run
        if self._dry_run:
            # DCP makes the state by a step with zero gradients and lr 0; no step was taken.
            self._dry_run = False
            for state in optimizer.state.values():
                step = state.get("step")
                if step is not None:
                    state["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0
            for group in optimizer.param_groups:
                if "rounding_step" in group:
                    group["rounding_step"] = 0
        if self._before_step:
            self.measured = _measure(self._before_step)
            self._before_step = []
        if self._engine.mover is not None and not dry:
            self._engine.mover.after_step()

    def _after_write(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that sees the weights which its optimizer has just tried."""

        def evaluate() -> Any:
            for slot in self.slots():
                slot.write()
            return closure()

        return evaluate

    def _then_write(self, switch: Callable[..., Any]) -> Callable[..., Any]:
        def switched(*args: Any, **kwargs: Any) -> Any:
            result = switch(*args, **kwargs)
            for slot in self.slots():
                slot.write()
            return result

        return switched

    # --- state dicts ---------------------------------------------------------------------------

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        for slot in self.slots():
            if slot.is_stale():
                slot.sync()
        for i, (group, packed) in enumerate(
            zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        ):
            names = [self._engine.name_of(p) for p in group["params"]]
            slots = [self._engine.slots.get(n) for n in names]
            none = torch.empty(0, dtype=torch.int32)
            nothing = torch.empty(0)
            entry: dict[str, Any] = {
                "version": _STATE_VERSION,
                "names": names,  # "" for a parameter of somebody else
                "kinds": [s.selection.kind if s else "none" for s in slots],
                "shapes": [list(s.selection.shape) if s else [] for s in slots],
                "index": [none if not s or s.selection.index is None else s.selection.index
                          for s in slots],
                "value": [s.value.detach() if s else nothing for s in slots],
                "base": [s.base if s else nothing for s in slots],
                "base_hash": [s.base_hash if s else "" for s in slots],
            }  # fmt: skip
            if i == 0:
                entry["run"] = json.dumps(describe(self._engine), default=str)
                entry["past"] = self._pack_past()
                entry["kept"] = pack_pieces(
                    {f"{key} {name}": p for name, s in self.kept.items() for key, p in s.items()}
                )
                mover = self._engine.mover
                entry["moving"] = mover.tensors() if mover is not None else {}
            packed[STATE_KEY] = entry

    def _pack_past(self) -> dict[str, list[Any]]:
        """What has moved and is frozen now: base and present values, since nobody else saves them."""
        past = {n: p for n, p in self._engine.past.items() if self.holds(self._engine.value_for(n))}
        known = dict(own_parameters(self._engine.owner())) if past else {}
        now = [p.selection.take(known[n].detach()).reshape(-1) for n, p in past.items()]
        return {**pack_pieces(past), "now": now}

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict["param_groups"]
        if len(groups) != len(optimizer.param_groups):
            return state_dict  # torch says what is wrong
        if not all(STATE_KEY in group for group in groups):
            raise EngineError(
                "this optimizer state has no retouch entry in its parameter groups, so mask and "
                "float32 values cannot be restored: it was saved by an optimizer that was not "
                "wrapped, or flattened (use flatten_optimizer_state_dict=False)"
            )
        self._restore(optimizer, [group[STATE_KEY] for group in groups])
        plain = [{k: v for k, v in group.items() if k != STATE_KEY} for group in groups]
        return {**state_dict, "param_groups": plain}

    def _adopt_loaded(self, optimizer: Optimizer) -> None:
        """Restores from a state dict that was loaded before the optimizer was bound."""
        if not any(STATE_KEY in group for group in optimizer.param_groups):
            return
        entries = [group.pop(STATE_KEY, None) for group in optimizer.param_groups]
        for entry, group in zip(entries, optimizer.param_groups, strict=True):
            have = [self._engine.name_of(p) for p in group["params"]]
            if entry is None or list(entry["names"]) != have:
                raise EngineError(
                    "the optimizer has loaded the state of other parameters than it holds; bind it "
                    "to the engine first and load the state then"
                )
        self._restore(optimizer, entries)

    def _restore(self, optimizer: Optimizer, entries: list[dict[str, Any]]) -> None:
        parts: dict[str, Part] = {}
        groups: list[list[Any]] = []
        for entry, group in zip(entries, optimizer.param_groups, strict=True):
            names, found = _parse(entry)
            parts.update(found)
            foreign = iter([p for p in group["params"] if not self._engine.name_of(p)])
            params = [self._engine.value_for(n) if n else next(foreign, None) for n in names]
            if None in params or next(foreign, None) is not None:
                raise EngineError(
                    "the optimizer state was saved with other parameters beside the model's than "
                    "this optimizer holds"
                )
            groups.append(params)
        before = {slot.name for slot in self.slots()}
        first = entries[0]
        past, kept = unpack_pieces(first.get("past")), unpack_pieces(first.get("kept"))
        run = json.loads(first["run"])
        restore(self._engine, parts, before, run)
        restore_past(self._engine, past, list((first.get("past") or {}).get("now", ())))
        self.kept = Kept()
        for both, piece in kept.items():
            key, _, name = both.partition(" ")
            self.kept.setdefault(name, {})[key] = piece
        if self._engine.mover is not None:
            self._engine.mover.restore(run.get("moving"), first.get("moving") or {})
        for params, group in zip(groups, optimizer.param_groups, strict=True):
            group["params"][:] = params


def _parse(entry: dict[str, Any]) -> tuple[list[str], dict[str, Part]]:
    """The parameters of a saved group, and what was selected of each."""
    if entry.get("version") not in (1, _STATE_VERSION):  # 1 had no moving masks
        raise FormatError(
            f"optimizer state of retouch version {entry.get('version')!r}; "
            f"this package reads versions 1 to {_STATE_VERSION}"
        )
    parts: dict[str, Part] = {}
    columns = ("names", "kinds", "shapes", "index", "value", "base", "base_hash")
    try:
        for name, kind, shape, index, value, base, base_hash in zip(
            *(entry[column] for column in columns), strict=True
        ):
            if kind != "none":
                where = None if kind == "all" else index.cpu()
                selection = Selection(kind, tuple(int(n) for n in shape), where)
                parts[name] = Part(selection, value.detach(), base.detach(), str(base_hash))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"the retouch entry of this optimizer state is damaged: {error}"
        ) from error
    return list(entry["names"]), parts


def _refuse(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise EngineError(
        "this optimizer steps the compact values of a model that has been unwrapped; "
        "make a new optimizer, or wrap the model again"
    )


def is_dry_run(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint takes this step, to have the state made."""
    if optimizer.state or any(float(g.get("lr", 1.0)) != 0 for g in optimizer.param_groups):
        return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return bool(grads) and not any(bool(torch.count_nonzero(g)) for g in grads)


def _measure(before: list[tuple[Slot, Tensor, Tensor]]) -> dict[str, float]:
    """How far the last step went, and how much of it the rounding of the weights swallowed."""
    square, lost = 0.0, 0
    for slot, value, weight in before:
        change = slot.value.detach() - value
        square += float(change.double().square().sum())
        kept = same_bits(slot.selection.take(slot.param), weight)
        lost += int(((change != 0) & kept).sum())
    return {"update_norm": square**0.5, "lost": float(lost)}
