"""The training engine: compact values beside the weights.

For every masked weight a model gets one small float32 `nn.Parameter`, the *compact value*, that
holds the selected coordinates only. The optimizer, whatever its class, steps compact values and
nothing else:

* forward and backward are the model's own, since the weight always holds what it should;
* the gradient of a compact value comes from layers whose backward pass computes the selected
  entries only (*sampled*), or from a hook that gathers them from the weight's gradient and frees
  that at once (*dense*); `retouch.routes` says which;
* after each optimizer step the new values are rounded once and scattered into the weight.

So weight decay and momentum cannot reach a frozen coordinate, optimizer state exists for the
selected ones alone, 16-bit weights train with float32 masters, and clipping, `GradScaler`,
schedulers and accumulation see ordinary parameters. The compact values are registered in the model
(`model._retouch`, under the names of their weights) and are absent from its `state_dict()`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retouch import ops
from retouch.binding import Binding, innermost
from retouch.distributed import Reducer, processes
from retouch.eligible import PLACE, own_parameters
from retouch.errors import BudgetError, EngineError, MaskError
from retouch.figures import figures
from retouch.masks import Mask, Selection
from retouch.migrate import Past, Piece, Seeds, merged, move
from retouch.routes import Path, check_gradient, plan
from retouch.schedules import Clock, StatePolicy
from retouch.slots import (
    AGAIN,
    Container,
    Copy,
    Slot,
    buffers,
    lookup,
    register,
    some,
)

if TYPE_CHECKING:
    from retouch.moving import Mover


class Engine(Container):
    """The compact values of one model; lives at `model._retouch`.

    Attributes:
        slots: One `Slot` per masked parameter, by name.
        mask: The mask in force, None before the first.
        reducer: What averages gradients over processes; None where there is one process.
        gradient: How gradients are taken: "auto", "sampled" or "dense".
        narrow: Weights whose values have no more bits than they, see `retouch.optim.rounding`.
        measure: Measure the next optimizer steps (two O(k) copies a step); see `metrics`.
        hashes: Fingerprint of each parameter when the mask was set; empty without fingerprints.
        base_buffers: Persistent buffers of the model when the mask was set (copies on the CPU).
        past: What weights that have moved, and are frozen now, held before.
        mover: What changes the mask during training; None for a mask that stays.
    """

    def __init__(
        self, model: nn.Module, *, fingerprint: bool = True, gradient: str = "auto"
    ) -> None:
        super().__init__()
        check_gradient(gradient)
        self.gradient = gradient
        self.narrow: set[str] = set()
        self.slots: dict[str, Slot] = {}
        self.mask: Mask | None = None
        self.measure = False
        self.base_buffers: dict[str, Tensor] = {}
        self._owner = weakref.ref(model)
        self._fingerprint = fingerprint
        self.hashes: dict[str, str] = {}
        self.past = Past()
        self._at_base = False  # inside of base_weights()
        self.paused = False  # gradients are taken by a score for the moment
        self.mover: Mover | None = None
        self.path_gradient = gradient  # dense while a mover collects gradients
        self._values: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}  # id of a compact value -> name of its weight
        self._bindings: list[Binding] = []
        self._flags = [(p, p.requires_grad) for _, p in own_parameters(model)]
        self._weights = {id(p): name for name, p in own_parameters(model)}  # _flags holds them
        self.reducer: Reducer | None = None
        if processes() > 1:
            self.reducer = Reducer(self, model)
            self.register_parameter("anchor", self.reducer.anchor)
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    # --- the model -----------------------------------------------------------------------------

    def owner(self) -> nn.Module:
        """The wrapped model."""
        model = self._owner()
        if model is None:
            raise EngineError("the model of this engine is gone")
        return model

    def check(self) -> None:
        """Raises EngineError, naming the parameter, if the model changed since it was wrapped."""
        model = self.owner()
        for slot in self.slots.values():
            weight, value, what = slot.param, slot.value, ""
            if lookup(model, slot.name) is not weight:
                what = (
                    "is not the tensor that was wrapped: resize_token_embeddings, "
                    "load_state_dict(assign=True) or a new layer has replaced it"
                )
            elif tuple(weight.shape) != slot.selection.shape:
                what = f"was resized from {slot.selection.shape} to {tuple(weight.shape)}"
            elif weight.dtype != slot.base.dtype:
                what = f"was cast from {slot.base.dtype} to {weight.dtype}"
            elif (
                value.dtype != self.value_dtype(slot.name, weight) or value.shape != slot.base.shape
            ):
                what = f"has a compact value of {value.dtype} and shape {tuple(value.shape)}"
            elif value.device != weight.device:
                what = f"is on {weight.device}, its compact value on {value.device}"
            if what:
                raise EngineError(f"{slot.name} {what}; {AGAIN}")
            if slot.swapped:
                raise EngineError("optimizer step inside of base_weights()")

    def check_reduced(self) -> None:
        """Raises EngineError before a step on gradients of this process alone."""
        if processes() == 1:
            return
        if self.reducer is None:
            raise EngineError(
                "the model was wrapped before torch.distributed was initialised; call "
                "init_process_group first, then retouch.wrap, then DistributedDataParallel"
            )
        if not self.reducer.done:
            raise EngineError(
                f"the gradients of {processes()} processes were not averaged: wrap the model in "
                "DistributedDataParallel after retouch.wrap, call that, and leave no_sync() for the "
                "last backward pass before a step (FSDP and DeepSpeed are not supported)"
            )
        self.reducer.done = False

    def slot_of(self, value: Tensor) -> Slot | None:
        """The slot of a compact value of this engine."""
        return self.slots.get(self.name_of(value))

    def name_of(self, value: Tensor) -> str:
        """The name of the weight of a compact value of this engine, "" for other tensors."""
        name = self._names.get(id(value), "")
        return name if name and self._values[name] is value else ""

    def value_for(self, name: str) -> nn.Parameter:
        """The compact value of a parameter; without elements while nothing of it is selected."""
        if name not in self._values:
            param = lookup(self.owner(), name)
            if param is None:
                raise MaskError(f"the model has no parameter {name}")
            dtype = self.value_dtype(name, param)
            value = nn.Parameter(torch.empty(0, dtype=dtype, device=param.device))
            self.place(name, value)
            self._values[name] = value
            self._names[id(value)] = name
        return self._values[name]

    def value_dtype(self, name: str, weight: Tensor) -> torch.dtype:
        """The dtype of the values of a weight."""
        return weight.dtype if name in self.narrow else ops.value_dtype(weight.dtype)

    @property
    def paths(self) -> dict[str, Path]:
        """How the gradient of each masked parameter is taken."""
        return {name: slot.path for name, slot in self.slots.items()}

    def values(self) -> list[nn.Parameter]:
        """All compact values, also those that have no element yet."""
        return list(self._values.values())

    # --- the mask ------------------------------------------------------------------------------

    def set_mask(self, mask: Mask) -> None:
        """Makes `mask` the set of coordinates that may move; the present weights are the base.

        Compact values keep their identity, so an optimizer that was built over them stays valid.

        Args:
            mask: Over the parameters of this model.

        Raises:
            MaskError: The mask does not fit the model.
            BudgetError: It selects nothing.
            EngineError: Selected weights have already moved, or a bound optimizer does not hold the
                compact value of a newly selected parameter.
        """
        model = self.owner()
        mask.check(model)
        chosen = {name: s for name, s in mask.items() if s.count}
        if not chosen:
            raise BudgetError("the mask selects nothing, so nothing could be trained")
        self.check()
        moved = [slot.name for slot in self.slots.values() if slot.has_moved()] + [*self.past]
        if moved:
            raise EngineError(
                f"weights have moved since the mask was set ({some(moved)}): Engine.move keeps the "
                f"base of before; for a new base revert them, or {AGAIN}"
            )
        known = dict(own_parameters(model))
        for name in chosen:
            self.check_trainable(name, known[name])
        self.check_held(chosen)
        self.take_base(model)
        for name in [n for n in self.slots if n not in chosen]:
            self.clear(name)
        paths = plan(model, chosen, self.path_gradient)
        for name, selection in chosen.items():
            param = known[name]
            value, base = selection.gather(param.detach()), selection.take(param.detach())
            self.fill(name, param, selection, value, base, paths[name])
        self.freeze_rest(model)
        self.mask = mask

    def move(
        self,
        mask: Mask,
        *,
        state: StatePolicy = "intersect",
        clock: Clock = "coordinate",
        seeds: Seeds | None = None,
    ) -> None:
        """Changes which coordinates may move, in the middle of training.

        What is selected before and after goes on as if nothing had happened; what is selected no
        longer keeps what it holds, bit for bit. The base stays what it was, also of coordinates
        that are frozen again, so deltas and reverts are of the whole run.

        Args:
            mask: Over the parameters of this model; it may select nothing.
            state: What becomes of the optimizer's state, see `Schedule.state`.
            clock: See `Schedule.clock`.
            seeds: With "seeded": gives the state that newcomers start with.

        Raises:
            MaskError: The mask does not fit the model.
            EngineError: A bound optimizer does not hold the compact value of a newly selected
                parameter, or has one clock where several are needed.
        """
        if self._fingerprint and not self.hashes and not self.slots:
            self.take_base(self.owner())
        move(self, mask, state=state, clock=clock, seeds=seeds)

    def rewind(self) -> None:
        """Puts every weight that has moved back to its base, bit for bit; state is left as it is."""
        known = dict(own_parameters(self.owner()))
        for slot in self.slots.values():
            slot.selection.put_(slot.param, slot.base, slot.name)
            slot.sync()
        for name in [*self.past]:
            self.past.put_back(name, known[name])

    def base_of(self, name: str) -> Piece | None:
        """The base of all of a parameter that may move or has moved; None if it never could."""
        slot, past = self.slots.get(name), self.past.get(name)
        if slot is None:
            return past
        piece = Piece(slot.selection, slot.base.reshape(-1))
        return piece if past is None else merged(past, piece)

    def take_base(self, model: nn.Module) -> None:
        """Makes the present weights and buffers the base."""
        named = own_parameters(model) if self._fingerprint else ()
        self.hashes = {name: ops.fingerprint(p) for name, p in named}
        self.base_buffers = {n: b.detach().cpu().clone() for n, b in buffers(model)}

    def fill(
        self, name: str, param: nn.Parameter, selection: Selection, value: Tensor, base: Tensor,
        path: Path, base_hash: str | None = None, *, owned: bool = False,
    ) -> None:  # fmt: skip
        """Gives a parameter a slot with these values; `owned` says that nobody else holds them."""
        parameter = self.value_for(name)
        value = value.detach().to(device=param.device, dtype=parameter.dtype)
        old = self.slots.get(name)
        if old is not None:
            old.unwatch()
        if old is None or old.selection.kind != selection.kind or old.selection != selection:
            parameter.data = value if owned else value.clone()
            parameter.grad = None
            self.reset_state(parameter)
        else:
            with torch.no_grad():
                parameter.copy_(value)
        base = base.detach().to(param.device)
        slot = Slot(
            name, param, selection, parameter, base if owned else base.clone(),
            self.hashes.get(name, "") if base_hash is None else base_hash, path,
        )  # fmt: skip
        slot.version = param._version
        self.slots[name] = slot
        register(slot)
        param.requires_grad_(True)
        slot.watch()
        if self.mover is not None:
            self.mover.watch(slot)
        slot.collect()  # a gradient from before

    def clear(self, name: str) -> None:
        """Takes the slot of a parameter away; the weight keeps what it holds."""
        slot = self.slots.pop(name)
        slot.unwatch()
        slot.value.data = slot.value.data.new_empty(0)
        slot.value.grad = None
        self.reset_state(slot.value)

    def freeze_rest(self, model: nn.Module) -> None:
        """Lets only what has a slot, or is being scored by a mover, require gradients."""
        for name, param in own_parameters(model):
            if name not in self.slots:
                param.requires_grad_(False)
                param.grad = None  # else it would count in clip_grad_norm_
        if self.mover is not None:
            self.mover.watch_rest()
        if self.reducer is not None:
            self.reducer.mask_changed(model)

    def bindings(self, name: str | None = None) -> list[Binding]:
        """The bindings of optimizers that still exist; of those that step one compact value."""
        live = [b for b in self._bindings if b.optimizer is not None]
        value = self._values.get(name) if name is not None else None
        return [b for b in live if name is None or (value is not None and b.holds(value))]

    def reset_state(self, value: Tensor) -> None:
        """Starts the optimizer's state of a compact value afresh."""
        for binding in self._bindings:
            binding.reset(value)

    def check_held(self, names: Iterable[str]) -> None:
        """Raises EngineError if a bound optimizer was built without a compact value."""
        missing = [n for n in names if n not in self._values] if self.bindings() else []
        if missing:
            raise EngineError(f"the optimizer was built without {some(missing)}; {AGAIN}")

    def check_trainable(self, name: str, param: Tensor) -> None:
        """Raises MaskError for what is no dense floating-point parameter."""
        if type(param) is not nn.Parameter or not param.is_floating_point() or param.is_meta:
            raise MaskError(
                f"{name} is a {type(param).__name__} of {param.dtype} on {param.device}; wanted a "
                "dense floating-point parameter"
            )

    # --- the optimizer -------------------------------------------------------------------------

    def bind(self, optimizer: Any) -> None:
        """Puts this engine's hooks on an optimizer over its compact values.

        Args:
            optimizer: Any `torch.optim.Optimizer`, also inside Accelerate's wrapper. If it has
                loaded the state of a wrapped optimizer already, mask and values are restored from
                it.

        Raises:
            EngineError: It steps weights of the model itself.
        """
        inner = innermost(optimizer)
        self._bindings = [b for b in self._bindings if b.optimizer is not None]
        if any(b.optimizer is inner for b in self._bindings):
            return
        self.check_groups(inner)
        self._fit_dtypes(inner)
        self._bindings.append(Binding(self, inner))

    def _fit_dtypes(self, optimizer: Optimizer) -> None:
        """Gives the values of 16-bit weights float32, or no master where the optimizer rounds."""
        for group in optimizer.param_groups:
            for value in group["params"]:
                name = self.name_of(value)
                weight = lookup(self.owner(), name) if name else None
                if weight is None:
                    continue
                rounds = group.get("rounding", "master") != "master"
                (self.narrow.add if rounds else self.narrow.discard)(name)
                dtype, grad = self.value_dtype(name, weight), value.grad
                if value.dtype != dtype:
                    value.grad = None
                    value.data = value.data.to(dtype)
                    value.grad = None if grad is None else grad.to(dtype)

    def check_groups(self, optimizer: Optimizer) -> None:
        """Raises EngineError if an optimizer holds weights of the model themselves."""
        names = self._weights
        held = (id(p) for group in optimizer.param_groups for p in group["params"])
        direct = [names[key] for key in held if key in names]
        if direct:
            raise EngineError(
                f"the optimizer steps weights themselves ({some(direct)}), which would move "
                "frozen coordinates; build it over the compact values, or use retouch.wrap"
            )

    def sync_from_weights(self) -> None:
        """Takes over weights written from outside; masters that round to them are kept."""
        for slot in self.slots.values():
            slot.sync()

    # --- looking -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Inside, the model has the weights it started from: a reference for DPO or a KL term.

        Swaps the selected coordinates only, O(k) both ways, bit for bit; may be nested. A graph
        that was built before may still be differentiated afterwards, one that was built inside may
        not.
        """
        slots = [s for s in self.slots.values() if not s.swapped]
        known = dict(own_parameters(self.owner())) if self.past else {}
        past = dict(self.past) if not self._at_base else {}
        outermost, self._at_base = not self._at_base, True
        held = [slot.selection.take(slot.param) for slot in slots]
        before = [p.selection.take(known[name]) for name, p in past.items()]
        params = (*(slot.param for slot in slots), *(known[name] for name in past))
        versions = tuple(p._version for p in params)
        try:
            for slot in slots:
                slot.swapped = True
                slot.selection.put_(slot.param, slot.base, slot.name)
            for name, part in past.items():
                part.put_(known[name], name)
            yield
        finally:
            for slot, weights in zip(slots, held, strict=True):
                slot.selection.put_(slot.param, weights, slot.name)
                slot.swapped = False
            for (name, part), weights in zip(past.items(), before, strict=True):
                part.selection.put_(known[name], weights, name)
            self._at_base = not outermost
            # The weights are what they were, so graphs that saved them are still right.
            torch._C._autograd._unsafe_set_version_counter(params, versions)

    def metrics(self) -> dict[str, float]:
        """Figures for a log, see `retouch.figures`."""
        return figures(self)

    # --- torch.nn ------------------------------------------------------------------------------

    def remove(self) -> None:
        """Takes everything off the model (see `unwrap`)."""
        if any(slot.swapped for slot in self.slots.values()):
            raise EngineError("unwrap inside of base_weights()")
        if self.mover is not None:
            self.mover.remove()
        for binding in self._bindings:
            binding.remove()
        for slot in self.slots.values():
            slot.unwatch()
            slot.param.grad = None
        for param, flag in self._flags:
            param.requires_grad_(flag)
        if self.reducer is not None:
            self.reducer.remove(self.owner())
        self.owner()._modules.pop(PLACE, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Engine":
        """Follows the model to another device, and keeps the float32 of the values."""
        with torch.no_grad():
            for value in self.parameters():
                value.data = value.data.to(fn(value.data).device)
                if value.grad is not None:
                    value.grad = value.grad.to(value.device)
            for slot in self.slots.values():
                slot.base = slot.base.to(slot.value.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Copy, ()  # copies and pickles of the model are plain models

    def __repr__(self) -> str:
        selected = sum(slot.selection.count for slot in self.slots.values())
        return f"Engine({selected:,} weights of {len(self.slots)} parameters may move)"


def _after_load(engine: nn.Module, incompatible: Any) -> None:
    if isinstance(engine, Engine):
        engine.sync_from_weights()
