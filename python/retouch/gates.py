"""Learned gates: which weights should move is itself trained, by gradient descent, before a mask is made.

Each unit (an element, row, column, tensor or layer) gets a gate z, and the model computes with

    weight = base + z * change

where gates and changes are trained together under a penalty on open gates. In the end the gates are
ranked by the selection of this package like any other score, the base comes back bit for bit, and what
follows is the ordinary engine:

    >>> mask = retouch.select(model, "taps", data=loader)         # trains gates, leaves the model as it was

or in a training loop of your own:

    >>> gates = retouch.gates.install(model, "taps")
    >>> optimizer = torch.optim.SGD(gates.groups(lr=0.01), momentum=0.9)
    >>> for batch in loader:
    ...     (model(**batch).loss + gates.penalty()).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> mask = gates.mask()
    >>> gates.remove()                                            # the base, bit for bit

As in the engine, the weight itself always holds the sum, written before each forward pass, and a hook on
its gradient hands it on to the gate and the change. So models need no change, tied weights and gradient
checkpointing are ordinary cases, and `state_dict()` has the model's own keys.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.batches import Batches, to_device
from retouch.config import SelectConfig, resolve
from retouch.eligible import PLACE, Candidate, candidates
from retouch.errors import EngineError, HyperparameterError, ScoreError
from retouch.gaterules import RULES, HardConcrete, Proximal, Rule, StraightThrough
from retouch.masks import Mask
from retouch.names import register_score
from retouch.passes import Eligible, LossFn, kept, loss_of, undisturbed
from retouch.scores import Score
from retouch.select import select

__all__ = [
    "Gates",
    "HardConcrete",
    "LearnedGates",
    "Proximal",
    "Rule",
    "StraightThrough",
    "install",
]

Gate = Literal["straight_through", "raw", "hard_concrete", "proximal", "proximal_released"]
Unit = Literal["element", "row", "column", "tensor", "layer"]


# --- the score ---------------------------------------------------------------------------------------


@register_score("gates")
@dataclass(frozen=True)
class LearnedGates(Score):
    """What gates, trained on the data, say about each coordinate; the model is left as it was.

    In selections only the weights that compete are trained here, with the rest of the model as it is:
    train a new head before, or all of it in your own loop with `install`.

    Attributes:
        gate: "straight_through" (TAPS), "raw" (z is the trained number itself), "hard_concrete" (Diff
            pruning), "proximal" (CoDyRA) or "proximal_released" (its code).
        units: What has a gate: element, row, column, tensor, layer, or several, whose product is
            the gate of an element (the structured variant of Diff pruning: element and tensor).
        by: The score: "gate" (the number of the gate; of a product of straight-through gates the
            smallest, of hard-concrete gates the log of the probability to be open) or "change", the
            magnitude |z * change|.
        penalty: Weight of the penalty, which is summed over gates; of proximal gates the kappa of the
            last epoch, to which it rises by the epoch after the warmup.
        per: What the sum is divided by; None is the number of gates.
        epochs: Times that the data are gone through.
        warmup: Epochs before the penalty counts.
        accumulate: Batches whose gradients are added up for a step.
        optimizer: "sgd" with momentum 0.9, or "adamw"; both without weight decay, which would close
            gates.
        lr: Of the changes.
        gate_lr: Of the gates; None is `lr`.
        seed: Of the noise of hard-concrete gates.

    Raises:
        HyperparameterError: An unknown word, or a number out of its range.
    """

    needs_data: ClassVar[bool] = True
    gate: Gate = "straight_through"
    units: Unit | tuple[Unit, ...] = "tensor"
    by: Literal["gate", "change"] = "gate"
    penalty: float = 1.0
    per: int | None = None
    epochs: int = 1
    warmup: int = 0
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    gate_lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        units = (self.units,) if isinstance(self.units, str) else tuple(self.units)
        for name, got, known in (
            ("gate", (self.gate,), tuple(RULES)), ("units", units, get_args(Unit)),
            ("by", (self.by,), ("gate", "change")),
            ("optimizer", (self.optimizer,), ("sgd", "adamw")),
        ):  # fmt: skip
            if not got or any(g not in known for g in got) or len(set(got)) < len(got):
                raise HyperparameterError(
                    f"LearnedGates: {name}={getattr(self, name)!r}; wanted {', '.join(known)}"
                )
        for name, least in (
            ("penalty", 0), ("per", 1), ("epochs", 1), ("warmup", 0), ("accumulate", 1), ("lr", 0),
            ("gate_lr", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise HyperparameterError(f"LearnedGates: {name}={value!r}; wanted >= {least}")
        object.__setattr__(self, "units", units[0] if len(units) == 1 else units)

    @property
    def levels(self) -> tuple[Unit, ...]:
        """The units as a tuple."""
        return self.units if isinstance(self.units, tuple) else (self.units,)

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`.

        Raises:
            ScoreError: No data, or a loss that is no finite number.
            EngineError: The model is wrapped.
        """
        if data is None:
            raise ScoreError(f"the score {self!r} needs data: pass data= (batches)")
        batches = data if isinstance(data, Batches) else Batches(data)
        with kept(model), undisturbed(model), torch.inference_mode(False), torch.enable_grad():
            for param in model.parameters():
                param.requires_grad_(False)
            gates = Gates(model, eligible, self)
            try:
                model.train()
                self._train(model, gates, batches, loss_fn)
                return gates.scores()
            finally:
                gates.remove()

    def _train(
        self, model: nn.Module, gates: "Gates", batches: Batches, loss_fn: LossFn | None
    ) -> None:
        groups = gates.groups(lr=self.lr, gate_lr=self.gate_lr)
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        device = next(iter(gates.parameters())).device
        seen = 0

        def step() -> None:
            optimizer.step()
            done = (epoch + 1 - self.warmup) / max(self.epochs - self.warmup, 1)
            gates.shrink(self.penalty * done)
            optimizer.zero_grad()

        for epoch in range(self.epochs):
            number = -1
            for number, batch in enumerate(batches):
                loss = loss_of(model, to_device(batch, device), loss_fn, number)
                if epoch >= self.warmup:
                    loss = loss + gates.penalty()
                loss.backward()
                seen += 1
                if seen % self.accumulate == 0:
                    step()
            if number < 0:
                raise ScoreError(f"the data hold no batch in epoch {epoch}")
        if seen % self.accumulate:
            step()


# --- gates on a model --------------------------------------------------------------------------------


@dataclass(eq=False)
class _Gated:
    """One gated parameter: its candidate, base, change, and gates with the names of their noise."""

    candidate: Candidate
    base: Tensor
    change: nn.Parameter
    gates: list[tuple[str, nn.Parameter]]
    version: int = -1  # of the weight, after our last write


def install(model: nn.Module, config: SelectConfig | str, **overrides: Any) -> "Gates":
    """Puts gates on the weights of a model that compete in a config, for a training loop of your own.

    Step 0 is the identity: the outputs of the model do not change by a bit.

    Args:
        model: The model; not wrapped, on its device already. Always call it itself, not a part.
        config: As for `retouch.select`, with a `LearnedGates` as its score ("taps", say).
        **overrides: Fields of `SelectConfig`.

    Returns:
        The gates.

    Raises:
        HyperparameterError: Another score, or nothing that could be selected.
        EngineError: The model is wrapped, or has gates already.
    """
    resolved = resolve(config, overrides)
    score = LearnedGates() if resolved.score in ("gates", LearnedGates) else resolved.score
    if not isinstance(score, LearnedGates):
        raise HyperparameterError(
            f"SelectConfig: score={resolved.score!r}; wanted a retouch.gates.LearnedGates"
        )
    masked = {n: c for n, c in candidates(model, resolved).items() if c.state == "masked"}
    if not masked:
        raise HyperparameterError("no parameter competes with this config, so none has a gate")
    return Gates(model, masked, score, replace(resolved, score=score))


class Gates(nn.Module):
    """Gates and changes of some parameters of one model, as float32 parameters of their own.

    A module for the sake of `state_dict`, and no part of the model. Made by `install`.

    Attributes:
        rule: What a gate computes.
        options: The score that it was made for.
    """

    def __init__(
        self,
        model: nn.Module,
        eligible: Eligible,
        options: LearnedGates,
        config: SelectConfig | None = None,
    ) -> None:
        super().__init__()
        if any(isinstance(m._modules.get(PLACE), nn.Module) for m in model.modules()):
            raise EngineError(
                f"{type(model).__name__} is wrapped: learn gates before retouch.wrap, or after "
                "retouch.unwrap"
            )
        hooks = [getattr(h, "__self__", None) for h in model._forward_pre_hooks.values()]
        if any(isinstance(owner, Gates) for owner in hooks):
            raise EngineError(f"{type(model).__name__} has gates already: remove() them first")
        self.rule = RULES[options.gate]
        self.options = options
        self._model = weakref.ref(model)
        self._config = config
        self.changes = nn.ParameterList()
        self.gates = nn.ParameterList()
        self._gated: dict[str, _Gated] = {}
        shared: dict[str, nn.Parameter] = {}
        for name, candidate in eligible.items():
            param = candidate.param
            if type(param) is not nn.Parameter or not param.is_floating_point() or param.is_meta:
                raise EngineError(
                    f"{name} is a {type(param).__name__} of {param.dtype} on {param.device}; "
                    "wanted a dense floating-point parameter"
                )
            dtype = ops.value_dtype(param.dtype)
            change = nn.Parameter(torch.zeros_like(param, dtype=dtype, requires_grad=False))
            self.changes.append(change)
            found = []
            for unit in options.levels:
                shape, key = _shape(candidate, unit)
                if key not in shared:
                    value = torch.full(shape, self.rule.init, dtype=dtype, device=param.device)
                    shared[key] = nn.Parameter(value)
                    self.gates.append(shared[key])
                found.append((key, shared[key]))
            self._gated[name] = _Gated(candidate, param.detach().clone(), change, found)
        self._draw, self._used = 0, False
        self._written: Any = None
        self._flags = [(g.candidate.param, g.candidate.param.requires_grad) for g in self._all()]
        self._handles: list[Any] = [model.register_forward_pre_hook(self._before, prepend=True)]
        for one in self._all():
            param = one.candidate.param
            param.requires_grad_(True)
            self._handles.append(
                param.register_post_accumulate_grad_hook(_HandOver(self, one.candidate.name))
            )
            one.version = param._version

    def _all(self) -> Sequence[_Gated]:
        return list(self._gated.values())

    # --- training ------------------------------------------------------------------------------

    def groups(self, *, lr: float, gate_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the changes, and the gates with a rate of their own."""
        return [
            {"params": list(self.changes), "lr": lr},
            {"params": list(self.gates), "lr": lr if gate_lr is None else gate_lr},
        ]

    def penalty(self) -> Tensor:
        """`options.penalty` times the sum of the costs of all gates, over `options.per`."""
        costs = torch.stack([self.rule.cost(gate).sum() for gate in self.gates])
        per = self.options.per or sum(gate.numel() for gate in self.gates)
        return costs.sum() * (self.options.penalty / per)

    def shrink(self, kappa: float) -> None:
        """The proximal step of gates that have one, after a step of the optimizer.

        Args:
            kappa: How far a gate is pulled towards 0; below 0 it is left alone.
        """
        for gate in self.gates:
            if kappa > 0:
                self.rule.shrink_(gate, kappa)

    def density(self) -> float:
        """The expected fraction of the gated coordinates that move."""
        moving = 0.0
        for one in self._all():
            share = torch.ones((), device=one.change.device)
            for _, gate in one.gates:
                share = share * self.rule.open(gate)
            moving += float(share.expand(one.candidate.shape).sum(dtype=torch.float64))
        return moving / sum(one.candidate.numel for one in self._all())

    def _before(self, model: nn.Module, args: Any) -> None:
        """Writes base + gate * change into the weights, unless they hold it."""
        noisy = model.training and self.rule.noisy
        if noisy and self._used:
            self._draw, self._used = self._draw + 1, False
        state = (self._draw if noisy else None, tuple(p._version for p in self.parameters()))
        for one in self._all():
            param = one.candidate.param
            if param._version != one.version or param.device != one.base.device:
                raise EngineError(
                    f"{one.candidate.name} was written to or moved while it has gates: remove() "
                    "them before you load, move or train the weights themselves"
                )
        if state != self._written:
            for one in self._all():
                self._write(one, state[0])
            self._written = state

    def _write(self, one: _Gated, draw: int | None) -> None:
        with torch.no_grad():
            moved = self._gate(one, draw) * one.change
            total = (one.base.to(moved.dtype) + moved).to(one.base.dtype)
            # 0 is added to nothing: -0.0 + 0.0 has other bits
            one.candidate.param.copy_(torch.where(moved == 0, one.base, total))
        one.version = one.candidate.param._version

    def _gate(self, one: _Gated, draw: int | None) -> Tensor:
        """The gate of each coordinate, in a shape that broadcasts to the parameter's."""
        gate = None
        for key, value in one.gates:
            noise = None
            if draw is not None:
                noise = ops.uniform(value.shape, self.options.seed, f"{key} {draw}", value.device)
            z = self.rule.gate(value, noise)
            gate = z if gate is None else gate * z
        assert gate is not None
        return gate

    def _arrive(self, name: str, param: Tensor) -> None:
        """Hands the gradient of a weight on to its change and its gates."""
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        one, self._used = self._gated[name], True
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        with torch.enable_grad():
            moved = self._gate(one, self._written[0]) * one.change
            torch.autograd.backward(moved, gradient.to(moved.dtype))

    # --- the end -------------------------------------------------------------------------------

    def scores(self) -> dict[str, Tensor]:
        """The score of each gated parameter, float32 in its shape; see `LearnedGates.by`."""
        found = {}
        with torch.no_grad():
            for name, one in self._gated.items():
                if self.options.by == "change":
                    score = (self._gate(one, None) * one.change).abs()
                else:
                    # of copies: the gates may be trained further
                    score = self.rule.rank([gate.detach().clone() for _, gate in one.gates])
                found[name] = score.to(torch.float32).expand(one.candidate.shape)
        return found

    def mask(self, **budget: Any) -> Mask:
        """The mask that the config of `install` selects by the gates as they are now.

        Args:
            **budget: Fields of `SelectConfig` that replace those of the config.

        Raises:
            BudgetError: The budget selects nothing: no gate is open, say.
            ScoreError: A gate is NaN.
        """
        model = self._owner()
        if self._config is None:
            raise EngineError("these gates were made without a config; use retouch.gates.install")
        mask = select(model, self._config, score=lambda *_: self.scores(), **budget)
        mask.metadata["score"] = repr(self.options)
        mask.metadata["config"]["score"] = self.options.to_dict()
        return mask

    def remove(self, keep: Mask | None = None) -> None:
        """Takes the gates off and puts the base back, bit for bit.

        Args:
            keep: Coordinates that keep what was learned, base + gate * change with the gates of
                evaluation; default none.

        Raises:
            MaskError: The mask does not fit the model.
        """
        if keep is not None:
            keep.check(self._owner())
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, one in self._gated.items():
            param, selection = one.candidate.param, None if keep is None else keep.get(name)
            values = None
            if selection is not None:
                self._write(one, None)
                values = selection.take(param, name)
            with torch.no_grad():
                param.copy_(one.base)
            if selection is not None and values is not None:
                selection.put_(param, values, name)
            param.grad = None
        for param, flag in self._flags:
            param.requires_grad_(flag)
        self._flags = []

    def _owner(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise EngineError("the model of these gates is gone")
        return model

    def __repr__(self) -> str:
        count = sum(gate.numel() for gate in self.gates)
        return f"Gates({count:,} {self.options.gate} gates on {len(self._gated)} parameters)"


class _HandOver:
    """The hook of a weight; holds the gates weakly, so that they die with the user's reference."""

    def __init__(self, gates: Gates, name: str) -> None:
        self._gates = weakref.ref(gates)
        self._name = name

    def __call__(self, param: Tensor) -> None:
        gates = self._gates()
        if gates is not None:
            gates._arrive(self._name, param)


def _shape(candidate: Candidate, unit: Unit) -> tuple[tuple[int, ...], str]:
    """The shape of the gates of a parameter, which broadcasts to its own, and a key to share them by."""
    name, shape = candidate.name, candidate.shape
    if unit == "layer":
        return (), f"layer {candidate.layer or name}"
    dims: tuple[int, ...] = tuple(range(len(shape)))
    if unit == "tensor":
        dims = ()
    elif unit == "row":
        dims = candidate.row_dims
    elif unit == "column":
        if candidate.column_dims is None:
            raise HyperparameterError(
                f"{name} has no columns: leave it out, or give its gates another unit"
            )
        dims = candidate.column_dims
    return tuple(n if d in dims else 1 for d, n in enumerate(shape)), f"{unit} {name}"
