"""The mover: follows a `Schedule`, collects gradients where the score needs them, moves the mask."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from retouch.collected import Collected
from retouch.compact import Engine
from retouch.config import SelectConfig
from retouch.distributed import processes
from retouch.eligible import Candidate, candidates
from retouch.errors import EngineError, HyperparameterError
from retouch.masks import Mask
from retouch.nextmask import NextMask, maps_of
from retouch.passes import LossFn
from retouch.routes import plan
from retouch.schedules import EVERYTHING, Schedule
from retouch.slots import Slot

__all__ = ["Mover"]


class Mover:
    """Changes the mask of an engine as a config and its schedule say.

    The binding of the optimizer calls `before_step` and `after_step`, whoever runs the epochs calls
    `new_epoch` where the schedule counts epochs.

    Args:
        engine: Of the model.
        config: With the schedule.
        data: For scores that read data, see `retouch.select`.
        loss_fn: For them.
        around: A context in which data are read for scores.

    Attributes:
        steps: Optimizer steps taken.
        changes: Selections made by the schedule.
        finished: Whether everything is frozen (`Schedule.change` "freeze").

    Raises:
        HyperparameterError: A score that cannot be taken of the training's gradients.
        EngineError: A schedule that this run cannot follow.
    """

    def __init__(
        self,
        engine: Engine,
        config: SelectConfig,
        data: Any = None,
        loss_fn: LossFn | None = None,
        around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.config = config
        self.schedule = config.schedule or Schedule()
        if config.schedule is None:
            config = dataclasses.replace(config, schedule=self.schedule)
        self.steps = 0
        self.changes = 0
        self.epochs = 0
        self._engine = engine
        found = candidates(engine.owner(), config)
        self._masked: dict[str, Candidate] = {n: c for n, c in found.items() if c.state == "masked"}
        self._next = NextMask(engine, config, self._masked, found, data, loss_fn)
        self._around = around
        self._hooks: list[RemovableHandle] = []
        self._open = False
        self._collected: Collected | None = None
        if self.schedule.collect:
            maps = maps_of(config.score)
            if not maps:
                raise HyperparameterError(
                    f"Schedule: collect={self.schedule.collect}, but the score {config.score!r} has "
                    "no part that is a gradient (`Gradient`, `GradStat`...)"
                )
            if self.schedule.state == "seeded":
                maps |= {"id", "square"}
            self._collected = Collected({n: c.param for n, c in self._masked.items()}, maps)
        if self.schedule.now and processes() > 1:
            raise EngineError(
                "Schedule(now=True) selects by gradients that are not yet averaged over the "
                f"{processes()} processes: leave out now, the change then holds from the next step"
            )

    # --- when ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Sets the first mask."""
        s = self.schedule
        at_once = s.change == "freeze" or (self._due_at() == 0 and not s.now)
        if at_once and s.unit == "epoch" and s.collect:
            at_once = False
        if at_once:
            self._change(first=True)
        else:
            self._engine.move(self._next.initial(s.initial))
        self._look()
        if not self._engine.slots and not self._open:
            raise HyperparameterError(
                f"Schedule: with start={s.start} and initial={s.initial!r} nothing is trained before "
                "the first selection, and no gradient collected: set initial='all' or 'random', "
                "train something whole (modules_to_save), or start with less"
            )

    def before_step(self) -> None:
        """Called when all gradients of a step are there, before the optimizer takes it."""
        if self.schedule.now:
            if self._open:
                self._change_now()
            return
        if self._open and self._collected is not None:
            self._collected.step_done(processes())
        if self.schedule.change == "freeze":
            self._next.note_gradients(due=self._due_at() == self.steps + 1)

    def after_step(self) -> None:
        """Called when a step has been taken and written into the weights."""
        self.steps += 1
        if not self.schedule.now and self.schedule.unit == "step" and self._due_at() == self.steps:
            self._change()
        self._look()

    def new_epoch(self) -> None:
        """Called when an epoch is over."""
        self.epochs += 1
        s = self.schedule
        late = s.stop is not None and self.steps >= s.stop
        if s.unit == "epoch" and s.every and self.epochs % s.every == 0 and not late:
            if self._collected is None or self._collected.steps:
                self._change()
                self._look()

    @property
    def finished(self) -> bool:
        """Whether nothing is left that may move."""
        return self.changes > 0 and not self._engine.slots and self.schedule.change == "freeze"

    def _due_at(self) -> int | None:
        """How many steps have been taken when the next change happens; with `now` it is in that step."""
        s = self.schedule
        if s.unit == "epoch":
            return 0 if not self.changes and not s.collect else None
        first = s.start
        if s.change == "freeze":
            first, every = max(s.start, s.every or 1), s.every
            checks = max(self.changes - 1, 0)
            at = first + checks * (every or 1)
        else:
            if not first and s.collect and not s.now:
                first = (s.every or 1) if s.collect == EVERYTHING else int(s.collect)
            if self.changes and s.every is None:
                return None
            at = first + self.changes * (s.every or 0)
        return None if s.stop is not None and at >= s.stop else at

    # --- changing ------------------------------------------------------------------------------

    def _change(self, first: bool = False) -> None:
        s, engine = self.schedule, self._engine
        number = self.changes
        old = engine.mask
        with self._paused(self._next.reads_data and self._collected is None):
            if first or s.change != "freeze":
                mask = self._next.mask(number, self._collected)
            else:
                mask = self._next.thawed()
        if s.rewind == "all":
            engine.rewind()
        elif s.rewind == "dropped" and old is not None:
            self._put_back(mask)
        seeds = self._next.seeds(self._collected) if s.state == "seeded" else None
        engine.move(
            mask, state="reset" if s.rewind == "all" else s.state, clock=s.clock, seeds=seeds
        )
        self.changes += 1
        if self._collected is not None:
            self._collected.restore(0, {})

    def _put_back(self, mask: Mask) -> None:
        """Writes the base into what a mask selects no longer."""
        for name, slot in self._engine.slots.items():
            gone = slot.selection - mask[name] if name in mask else slot.selection
            base = self._engine.base_of(name)
            if gone.count and base is not None:
                base.only(gone).put_(slot.param, name)
                slot.sync()

    def _change_now(self) -> None:
        """Selects by the gradients that wait with the weights, and hands them to the selected."""
        assert self._collected is not None
        grads = {name: c.param.grad for name, c in self._masked.items()}
        self._collected.borrow({n: g for n, g in grads.items() if g is not None})
        self._change()
        slots = self._engine.slots
        for slot in slots.values():
            slot.waits = False
            slot.collect()
        for name, candidate in self._masked.items():
            if name not in slots:
                candidate.param.grad = None

    @contextlib.contextmanager
    def _paused(self, pause: bool) -> Iterator[None]:
        """Inside, the model is plain for scoring passes."""
        if not pause:
            yield
            return
        engine = self._engine
        for slot in engine.slots.values():
            slot.unwatch()
        engine.paused = True
        try:
            with self._around():
                yield
        finally:
            engine.paused = False
            for slot in engine.slots.values():
                slot.watch()

    # --- watching gradients --------------------------------------------------------------------

    def _look(self) -> None:
        """Opens or closes the view on dense gradients for the step to come."""
        s = self.schedule
        at = self._due_at()
        if s.now:
            wanted = at == self.steps
        elif not s.collect:
            wanted = False
        elif s.unit == "epoch" or s.collect == EVERYTHING:
            wanted = s.stop is None or self.steps < s.stop
            wanted = wanted and (s.unit == "epoch" or at is not None)
        else:
            wanted = at is not None and at - int(s.collect) <= self.steps < at
        if wanted != self._open:
            self._open = wanted
            self._set_paths()
        for slot in self._engine.slots.values():
            self.watch(slot)
        self.watch_rest()

    def _set_paths(self) -> None:
        engine = self._engine
        engine.path_gradient = "dense" if self._open else engine.gradient
        chosen = {name: slot.selection for name, slot in engine.slots.items()}
        paths = plan(engine.owner(), chosen, engine.path_gradient) if chosen else {}
        for name, slot in engine.slots.items():
            if slot.path != paths[name]:
                slot.path = paths[name]
                slot.watch()

    def watch(self, slot: Slot) -> None:
        """Lets a slot show its dense gradients, if they are wanted now."""
        wanted = self._open and slot.name in self._masked
        slot.waits = wanted and self.schedule.now
        slot.tap = self._tap if wanted and not self.schedule.now else None

    def watch_rest(self) -> None:
        """Has the gradients of frozen parameters computed that compete, if they are wanted now."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, candidate in self._masked.items():
            if name in self._engine.slots:
                continue
            param = candidate.param
            param.requires_grad_(self._open)
            if self._open and not self.schedule.now:
                self._hooks.append(
                    param.register_post_accumulate_grad_hook(
                        lambda p, name=name: self._take(name, p)
                    )
                )

    def _tap(self, name: str, grad: Tensor) -> None:
        assert self._collected is not None
        self._collected.add(name, grad)

    def _take(self, name: str, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is not None:
            with torch.no_grad():
                self._tap(name, grad.to_dense() if grad.is_sparse else grad)

    # --- checkpoints ---------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What is saved beside tensors: JSON-able."""
        collected = self._collected.steps if self._collected is not None else 0
        return {
            "steps": self.steps, "changes": self.changes, "epochs": self.epochs,
            "collected": collected, "frozen": self._next.frozen,
            "schedule": self.schedule.to_dict(),
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of collected gradients and signals, by key."""
        found = {f"signal {n}": t for n, t in self._next.before.items()}
        if self._collected is not None:
            found |= {f"collected {n}": t for n, t in self._collected.tensors().items()}
        return found

    def restore(self, saved: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to a checkpoint.

        Raises:
            EngineError: It was saved by a run without a schedule.
        """
        if saved is None:
            raise EngineError(
                "this optimizer state is of a run whose mask did not move, and this run has a "
                "schedule: use the same config"
            )
        self.steps, self.changes = int(saved["steps"]), int(saved["changes"])
        self.epochs, self._next.frozen = int(saved["epochs"]), list(saved["frozen"])
        parts: dict[str, dict[str, Tensor]] = {"signal": {}, "collected": {}}
        for both, tensor in tensors.items():
            key, _, name = both.partition(" ")
            parts[key][name] = tensor.clone()
        self._next.before = parts["signal"]
        if self._collected is not None:
            self._collected.restore(int(saved["collected"]), parts["collected"])
        self._look()

    def remove(self) -> None:
        """Takes the hooks off."""
        self._open = False
        for slot in self._engine.slots.values():
            slot.tap, slot.waits = None, False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
