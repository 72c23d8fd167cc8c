"""Which mask comes next: the changes that a `Schedule` may ask for, over `retouch.select`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.collected import Collected
from retouch.compact import Engine
from retouch.config import SelectConfig
from retouch.eligible import Candidate
from retouch.errors import EngineError, HyperparameterError
from retouch.made import Made
from retouch.masks import Mask
from retouch.migrate import Seeds
from retouch.passes import Eligible, LossFn
from retouch.schedules import Initial
from retouch.scores import GradStat, Score, as_score
from retouch.select import select
from retouch.selection import Selection

__all__ = ["NextMask", "maps_of"]


def maps_of(score: Any) -> set[str]:
    """Which maps of gradients ("id", "abs", "square") a score asks for, in any of its parts."""
    if score is None:
        return set()
    score = as_score(score)
    if isinstance(score, GradStat):
        return {score.map}
    if not dataclasses.is_dataclass(score):
        return set()
    parts = [getattr(score, f.name) for f in dataclasses.fields(score)]
    return set().union(*(maps_of(part) for part in parts if isinstance(part, Score)))


@dataclass(frozen=True)
class _Pinned(Score):
    """A score with some coordinates put before, or behind, all others.

    Attributes:
        score: The score.
        first: Selections that come first.
        last: Selections that come last.
        sign: 1 where large scores are best, -1 where small ones are.
    """

    score: Score
    first: Mapping[str, Selection] = field(repr=False)
    last: Mapping[str, Selection] = field(repr=False)
    sign: float

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`."""
        found = self.score(model, eligible, data, loss_fn)
        for pinned, value in ((self.first, math.inf), (self.last, -math.inf)):
            for name, selection in pinned.items():
                if name in found and selection.count:
                    score = found[name].contiguous()
                    where = selection.flat().to(device=score.device, dtype=torch.int64)
                    score.view(-1)[where] = self.sign * value
                    found[name] = score
        return found

    def made(self, eligible: Eligible, data: Any) -> Made | None:
        """See `Score`."""
        made = self.score.made(eligible, data)
        if made is None or (self.first and self.last):
            return None
        pinned = self.first or self.last
        value = self.sign * (math.inf if self.first else -math.inf)
        return dataclasses.replace(made, pinned={n: s.flat() for n, s in pinned.items()}, pin=value)


class NextMask:
    """Makes the masks of a schedule.

    Args:
        engine: Of the model.
        config: With the schedule.
        masked: What competes.
        found: All candidates.
        data: For scores that read data.
        loss_fn: For them.

    Attributes:
        before: Signals of the last check, by parameter (`Schedule.change` "freeze").
        frozen: Parameters that are frozen for good.
        reads_data: Whether the score reads data, or gradients of the training.
    """

    def __init__(
        self,
        engine: Engine,
        config: SelectConfig,
        masked: Mapping[str, Candidate],
        found: Mapping[str, Candidate],
        data: Any,
        loss_fn: LossFn | None,
    ) -> None:
        self.before: dict[str, Tensor] = {}
        self.frozen: list[str] = []
        self._now: dict[str, float] = {}
        self._engine = engine
        self._config = config
        self._plain = dataclasses.replace(config, schedule=None)
        self._masked, self._found = masked, found
        self._data, self._loss_fn = data, loss_fn
        score = as_score(config.score) if config.score is not None else None
        self.reads_data = bool(getattr(score, "needs_data", False))
        assert config.schedule is not None
        self._schedule = config.schedule
        if self._schedule.change in ("grow", "shrink", "drop_grow") and score is None:
            raise HyperparameterError(
                f"Schedule: change={self._schedule.change!r} ranks by a score; give one"
            )
        if self._schedule.change == "drop_grow" and config.granularity != "element":
            raise HyperparameterError("Schedule: change='drop_grow' is for granularity='element'")

    # --- masks ---------------------------------------------------------------------------------

    def initial(self, kind: Initial) -> Mask:
        """What trains before the first selection."""
        if kind == "random":
            return self._select(self._without_score(self._plain), None)
        whole = {n: Selection("all", c.shape) for n, c in self._found.items() if c.state == "full"}
        if kind == "all":
            whole |= {n: Selection("all", c.shape) for n, c in self._masked.items()}
        return self._mask({n: whole[n] for n in self._found if n in whole})

    def mask(self, number: int, collected: Collected | None) -> Mask:
        """The mask of a change.

        Args:
            number: Of the change, from 0.
            collected: Gradients of the training, for scores of them.
        """
        s = self._schedule
        if s.change == "cycle":
            return self._cycled(number)
        config = self._with_budget(number)
        # Draws, shuffled data and dropout differ between changes.
        config = dataclasses.replace(config, seed=_mixed(config.seed, number))
        if s.change in ("replace", "freeze") or (number == 0 and s.change == "shrink"):
            return self._select(config, collected)
        active = {n: s.selection for n, s in self._engine.slots.items() if n in self._masked}
        sign = -1.0 if config.direction == "bottom" else 1.0
        score = as_score("random" if config.score is None else config.score, config.seed)
        first: Mapping[str, Selection] = active
        last: Mapping[str, Selection] = {}
        if s.change == "shrink":
            shapes = {n: c.shape for n, c in self._masked.items()}
            none = {n: Selection("none", shape) for n, shape in shapes.items()}
            first, last = {}, {n: ~active.get(n, none[n]) for n in none}
        elif s.change == "drop_grow":
            first = self._survivors(active, s.dropped(number))
        pinned = _Pinned(score, first, last, sign)
        return self._select(dataclasses.replace(config, score=pinned), collected)

    def thawed(self) -> Mask:
        """The present mask without the tensors whose signal is below the threshold."""
        s, engine = self._schedule, self._engine
        assert s.threshold is not None
        if s.signal.startswith("weight_change"):
            self._note_weights()
        for name, value in self._now.items():
            if value < s.threshold:
                self.frozen.append(name)
        chosen = {n: s.selection for n, s in engine.slots.items() if n not in self.frozen}
        self.before = {n: t for n, t in self.before.items() if n in chosen}
        return self._mask(chosen)

    def _select(self, config: SelectConfig, collected: Collected | None) -> Mask:
        data = self._data if collected is None else collected
        found = select(self._engine.owner(), config, data, loss_fn=self._loss_fn)
        if collected is None and self.reads_data:
            found = found.broadcast()
        return self._mask(dict(found))

    def _mask(self, chosen: Mapping[str, Selection]) -> Mask:
        metadata = {"config": self._config.to_dict(), "seed": self._config.seed}
        return Mask(dict(chosen), self._engine.owner(), metadata)

    def _without_score(self, config: SelectConfig) -> SelectConfig:
        return dataclasses.replace(config, score=None, direction="random", threshold=None)

    # --- budgets -------------------------------------------------------------------------------

    def _with_budget(self, number: int) -> SelectConfig:
        """The config with the budget of a change."""
        config, s = self._plain, self._schedule
        if s.ramp == "constant" or s.change == "drop_grow" or s.rounds is None:
            return config
        numel = sum(c.numel for c in self._masked.values())
        if config.granularity == "element" and config.scope == "global":
            total = self._total(config)
            k = max(1, math.floor(numel * s.budget(number, total / numel)))
            if number + 1 >= s.rounds:
                k = total
            elif s.change == "grow" and s.ramp == "linear" and s.density_from is None:
                # The remainder goes to the first changes, as in ID3 (arXiv 2408.14470).
                done = number + 1
                k = done * (total // s.rounds) + min(done, total % s.rounds)
            return dataclasses.replace(config, density=None, k=k)
        if config.density is None:
            raise HyperparameterError(
                f"Schedule: ramp={s.ramp!r} with scope={config.scope!r} and "
                f"granularity={config.granularity!r} needs a density"
            )
        return dataclasses.replace(config, density=s.budget(number, config.density))

    def _total(self, config: SelectConfig) -> int:
        if config.k is not None:
            return config.k
        if config.density is None:
            raise HyperparameterError("Schedule: a ramp needs a density or k")
        numel = sum(c.numel for c in self._masked.values())
        return math.floor(Fraction(str(config.density)) * numel)

    # --- drop and grow -------------------------------------------------------------------------

    def _survivors(self, active: Mapping[str, Selection], drop: float) -> dict[str, Selection]:
        """The selected without the fraction that is nearest to its base, in each scope."""
        moved, names = [], list(active)
        for name in names:
            slot = self._engine.slots[name]
            moved.append((slot.value.detach() - slot.base.to(slot.value.dtype)).reshape(-1))
        groups = [[i] for i in range(len(names))]
        if self._config.scope == "global":
            groups = [list(range(len(names)))]
        survivors: dict[str, Selection] = {}
        for group in groups:
            values = [moved[i] for i in group]
            k = math.floor(sum(v.numel() for v in values) * drop)
            dropped = ops.topk(values, [names[i] for i in group], k, largest=False, absolute=True)
            for i, where in zip(group, dropped, strict=True):
                selection = active[names[i]]
                stay = torch.ones(selection.count, dtype=torch.bool)
                stay[where.cpu().to(torch.int64)] = False
                index = selection.flat()[stay]
                survivors[names[i]] = Selection("elements", selection.shape, index)
        return survivors

    def seeds(self, collected: Collected | None) -> Seeds:
        """Moments that newcomers start with: means of the collected gradients, as if seen so often.

        SpIEL (arXiv 2401.16405): ``m = mean(g) * (1 - beta1**age)``, ``v = mean(g**2) * (1 -
        beta2**age)`` with the number of steps as age, so that the bias correction is exact.
        """
        assert collected is not None
        steps = collected.steps
        sums = {m: dict(collected.sums[m]) for m in ("id", "square")}

        def of(name: str, positions: Tensor) -> dict[str, Tensor]:
            if name not in sums["id"]:
                return {}
            betas = self._betas(name)
            where = positions.to(torch.int64)
            found = {"step": torch.full((where.numel(),), steps, dtype=torch.int32)}
            for key, map_, beta in zip(("exp_avg", "exp_avg_sq"), sums, betas, strict=True):
                flat = sums[map_][name].reshape(-1)
                mean = (flat[where.to(flat.device)] + 0.0) / steps  # no -0, as in a sum
                found[key] = mean * (1 - beta**steps)
            return found

        return of

    def _betas(self, name: str) -> tuple[float, float]:
        for binding in self._engine.bindings(name):
            optimizer = binding.optimizer
            for group in optimizer.param_groups if optimizer is not None else ():
                if any(p is self._engine.value_for(name) for p in group["params"]):
                    if "betas" in group and binding.own_clocks:
                        first, second = group["betas"]
                        return float(first), float(second)
        raise EngineError(
            "Schedule(state='seeded') sets the moments of retouch.AdamW; this optimizer is another"
        )

    # --- cycles --------------------------------------------------------------------------------

    def _cycled(self, number: int) -> Mask:
        """The next units in their order."""
        config = self._plain
        chosen = {n: Selection("all", c.shape) for n, c in self._found.items() if c.state == "full"}
        if config.granularity == "element":
            for name, candidate in self._masked.items():
                chosen[name] = self._window(candidate, number)
        elif config.granularity in ("layer", "tensor"):
            units: dict[str, list[str]] = {}
            for name, candidate in self._masked.items():
                unit = candidate.layer or name if config.granularity == "layer" else name
                units.setdefault(unit, []).append(name)
            k = min(config.k or 1, len(units))
            for place in range(number * k, number * k + k):
                for name in units[self._in_order(list(units), *divmod(place, len(units)))]:
                    chosen[name] = Selection("all", self._masked[name].shape)
        else:
            raise HyperparameterError(
                f"Schedule: change='cycle' with granularity={config.granularity!r}; wanted layer, "
                "tensor or element"
            )
        return self._mask({n: chosen[n] for n in self._found if n in chosen})

    def _in_order(self, units: list[str], turn: int, place: int) -> str:
        order = self._schedule.order
        if order == "descending":
            return units[len(units) - 1 - place]
        if order == "ascending":
            return units[place]
        keys = ops.uniform((len(units),), _mixed(self._config.seed, turn), "order", "cpu")
        return units[int(torch.argsort(keys, stable=True)[place])]

    def _window(self, candidate: Candidate, number: int) -> Selection:
        """The elements of one tensor at a change: a window of its positions, or of their shuffle."""
        density, numel = self._plain.density, candidate.numel
        if density is None:
            raise HyperparameterError("Schedule: a cycle of elements needs a density")
        size = max(1, math.floor(Fraction(str(density)) * numel))
        windows = -(-numel // size)
        turn, place = divmod(number, windows)
        if self._schedule.order == "descending":
            place = windows - 1 - place
        first, end = place * size, min(place * size + size, numel)
        if self._schedule.order != "shuffled":
            index = torch.arange(first, end, dtype=ops.index_dtype(numel))
            return Selection("elements", candidate.shape, index)
        keys = ops.uniform((numel,), _mixed(self._config.seed, turn), candidate.name, "cpu")
        upto = [ops.topk([keys], [candidate.name], k)[0] for k in (first, end)]
        return Selection("elements", candidate.shape, ops.difference(upto[1], upto[0]))

    # --- signals of convergence ----------------------------------------------------------------

    def note_gradients(self, due: bool) -> None:
        """Takes the signals of the gradients of a step that a check follows."""
        s = self._schedule
        if not due or not s.signal.startswith("grad"):
            return
        self._now = {}
        for name, slot in self._engine.slots.items():
            grad = slot.value.grad
            if grad is None or name not in self._masked:
                continue
            if s.signal == "grad_change_l1":
                self._changed(name, grad)
            else:
                self._now[name] = ops.total(grad.abs()) / (
                    grad.numel() if s.signal.endswith("mean") else 1
                )

    def _note_weights(self) -> None:
        self._now = {}
        for name, slot in self._engine.slots.items():
            if name in self._masked:
                self._changed(name, slot.value.detach())
                if self._schedule.signal.endswith("mean") and name in self._now:
                    self._now[name] /= slot.value.numel()

    def _changed(self, name: str, value: Tensor) -> None:
        """Compares with the last check; the first one has nothing to compare with."""
        before = self.before.get(name)
        if before is not None and before.shape == value.shape:
            self._now[name] = ops.total((value - before.to(value.device)).abs())
        self.before[name] = value.detach().clone()


def _mixed(seed: int, number: int) -> int:
    """The seed of a change: none for two changes, and that of the config for the first."""
    return (seed + (number << 32)) % 2**63
