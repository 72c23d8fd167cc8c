"""Gradients of single samples, taken from backward passes over whole batches.

A batch-1 loop pays for small matrix products, for one reading of all weights and for one full gradient
with each sample. Here a batch goes forward and backward once, without any gradient of a weight. Hooks
see the input x and the output gradient dy of each module that holds an eligible parameter; a sample's
gradient follows from its own part of the two, dy_b' x_b for a linear layer, and is added to the score
before the next sample's exists (`ops.accumulate_outer_`): no tensor of [samples, parameters] is
allocated, except for vectors (biases and norms).

The result is that of the loop up to rounding, so everything that is not known to be a sum over samples
goes through the loop: see `SampleGradients`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retouch import ops
from retouch.batches import samples_in, single_samples
from retouch.eligible import Candidate, is_hf_conv1d, is_norm
from retouch.errors import ScoreError
from retouch.passes import Eligible, LossFn, gradients, loss_of
from retouch.samplelosses import SampleLosses

__all__ = ["SampleGradients"]

_HALVES = (torch.bfloat16, torch.float16)


class SampleGradients:
    """Adds ``map`` of the gradient of each sample of each batch to `sums`, inside `passes.gradients`.

    Whole batches are used if all of this holds, else a loop over single samples: evaluation mode, no
    autocast, no `loss_fn` of the user; the model's loss is the mean of one of torch's losses over labels
    that are in the batch; each eligible parameter is the weight or bias of a linear layer, HF Conv1D,
    embedding or normalisation that is called once, has the samples first and shares the parameter with
    nothing. The first two samples of the first batch decide as well: the norm of the gradient of each
    parameter must be the same in a batch of two and alone.

    Args:
        model: The model.
        eligible: What is scored.
        sums: Float32 tensors of the parameters' shapes, which are added to.
        map: "id", "abs" or "square".
        loss_fn: See `Score`.
        after: Called after each sample of the loop.
        batched: False for the loop alone.
        seed: If given, labels are drawn from the model's own distribution with it, by the number of the
            sample and the position alone.
        draws: How many times each sample is taken, each with other labels.
    """

    def __init__(
        self,
        model: nn.Module,
        eligible: Eligible,
        sums: dict[str, Tensor],
        *,
        map: str,
        loss_fn: LossFn | None,
        after: Callable[[], None],
        batched: bool,
        seed: int | None = None,
        draws: int = 1,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._sums = _Sums(sums, map)
        self._alone: _Norms | None = None  # of the samples that decide, each by itself
        self._seed = seed
        self._draws = draws
        self._after = after
        self._done = 0
        self.reached: set[str] = set()
        self._hooks = None
        if batched and loss_fn is None and not _autocast():
            self._hooks = _hooks(eligible)
        self._proven = False

    def take(self, name: str, gradient: Tensor) -> None:
        """Takes a gradient of the loop."""
        self.reached.add(name)
        self._sums.one(name, gradient)
        if self._alone is not None:
            self._alone.one(name, gradient)

    def add(self, batch: Any, number: int) -> int:
        """Goes through the samples of a batch; returns how many gradients that were."""
        size = samples_in(batch)
        for draw in range(self._draws):
            self._add(batch, size, number, draw)
        self._done += size
        return size * self._draws

    def _add(self, batch: Any, size: int, number: int, draw: int) -> None:
        first = 0
        if self._hooks is not None and size > 1 and _splits(batch, size):
            if not self._proven:
                first = 2
                self._proven = self._agree(batch, size, number)
                if not self._proven:
                    self._hooks = None
            if self._proven and size - first > 1:
                rest = _rows(batch, first, size)
                if self._whole(rest, size - first, number, self._done + first, draw, self._sums):
                    self.reached |= self._sums.seen
                    return
                self._hooks = None
        self._loop(_rows(batch, first, size) if first else batch, number, self._done + first, draw)

    def _agree(self, batch: Any, size: int, number: int) -> bool:
        """Whether two samples have the same gradients together as alone; alone, they are added."""
        pair = _rows(batch, 0, 2)
        together, self._alone = _Norms(), _Norms()
        try:
            try:
                whole = self._whole(pair, 2, number, self._done, 0, together)
            except RuntimeError:  # a module that vmap cannot run, say
                whole = False
            self._loop(pair, number, self._done, 0)
            return whole and self._alone.agrees(together)
        finally:
            self._alone = None

    def _loop(self, batch: Any, number: int, at: int, draw: int) -> None:
        for i, sample in enumerate(single_samples(batch)):
            if self._seed is None:
                loss_of(self._model, sample, self._loss_fn, number).backward()
                self._after()
                continue
            losses = SampleLosses(sample, 1, at + i, self._seed, draw)
            with losses:
                loss = loss_of(self._model, sample, self._loss_fn, number)
            if not losses.drawn:
                raise ScoreError(
                    "labels can be drawn for a loss that is torch.nn.functional.cross_entropy with "
                    f"class numbers as labels; {type(self._model).__name__} has another"
                )
            loss.backward()
            self._after()

    def _whole(self, batch: Any, size: int, number: int, at: int, draw: int, sink: "_Sink") -> bool:
        """One pass over a batch; False, with nothing added, if it is not known to be right."""
        assert self._hooks is not None
        # without eligible parameters: no gradient of a weight is computed, and all is put back
        with (
            gradients(self._model, {}, lambda name, gradient: None, False),
            _Watch(self._hooks, size, sink) as watch,
        ):
            losses = SampleLosses(batch, size, at, self._seed, draw)
            with losses:
                loss = _loss(self._model, batch)
            if loss is None or watch.strange or not losses.explain(loss):
                return False
            watch.forwards = False
            loss_of(self._model, batch, lambda model, batch: loss, number).backward()
        return True


def _autocast() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _loss(model: nn.Module, batch: Any) -> Tensor | None:
    out = model(**batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _splits(batch: Any, size: int) -> bool:
    """Whether a batch is a mapping whose tensors all have the samples first (or no dimension)."""
    return hasattr(batch, "items") and all(
        not isinstance(item, Tensor | list | tuple)
        or (isinstance(item, Tensor) and (item.dim() == 0 or item.shape[0] == size))
        for item in batch.values()
    )


def _rows(batch: Any, start: int, stop: int) -> dict[str, Any]:
    return {k: v[start:stop] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}


# --- what becomes of the gradients -------------------------------------------------------------------


class _Sink(Protocol):
    """Takes gradients of the samples of a batch in the three forms in which they come."""

    def outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """Of [B, T, m] and [B, T, n]: left_b' right_b."""

    def rows(self, name: str, index: Tensor, sample: Tensor, values: Tensor) -> None:
        """Rows of a table: [N] rows and samples, which may repeat, and [N, width] values to add."""

    def stack(self, name: str, values: Tensor) -> None:
        """All at once: [B, ...]."""


class _Sums:
    """Adds map(gradient) to the sums."""

    def __init__(self, sums: dict[str, Tensor], map: str) -> None:
        self._to = sums
        self._map = map
        self.seen: set[str] = set()

    def one(self, name: str, gradient: Tensor) -> None:
        ops.accumulate_(self._to[name], gradient, name, map=self._map)

    def outer(self, name: str, left: Tensor, right: Tensor) -> None:
        self.seen.add(name)
        ops.accumulate_outer_(self._to[name], left, right, name, map=self._map)

    def rows(self, name: str, index: Tensor, sample: Tensor, values: Tensor) -> None:
        self.seen.add(name)
        index, _, values = _merged(index, sample, values, self._to[name].shape[0])
        self._to[name].index_add_(0, index, ops.mapped(values, self._map).to(torch.float32))

    def stack(self, name: str, values: Tensor) -> None:
        self.seen.add(name)
        self._to[name].add_(ops.mapped(values.to(torch.float32), self._map).sum(0))


class _Norms:
    """The norm of each gradient, by parameter and sample."""

    def __init__(self) -> None:
        self._of: dict[str, list[float]] = {}
        self._tolerance = 1e-3

    def one(self, name: str, gradient: Tensor) -> None:
        self.stack(name, gradient[None])

    def outer(self, name: str, left: Tensor, right: Tensor) -> None:
        self.stack(name, torch.bmm(left.transpose(1, 2), right))

    def rows(self, name: str, index: Tensor, sample: Tensor, values: Tensor) -> None:
        count = int(index.max()) + 1 if len(index) else 1
        _, sample, merged = _merged(index, sample, values, count)
        squares = merged.new_zeros(2).index_add_(0, sample, merged.square().sum(1))
        self._of[name] = squares.sqrt().tolist()

    def stack(self, name: str, values: Tensor) -> None:
        if values.dtype in _HALVES:
            self._tolerance = 5e-2
        flat = values.flatten(1).to(torch.float32)
        self._of.setdefault(name, []).extend(torch.linalg.vector_norm(flat, dim=1).tolist())

    def agrees(self, other: "_Norms") -> bool:
        """Whether another has the same, up to rounding."""
        tolerance = max(self._tolerance, other._tolerance)
        largest = max((v for norms in self._of.values() for v in norms), default=0.0)
        none = [0.0, 0.0]
        return all(
            len(mine := self._of.get(name, none)) == len(theirs := other._of.get(name, none)) == 2
            and all(
                # a gradient that is zero but for rounding, as of the bias of attention keys
                abs(a - b) <= tolerance * max(a, 1e-3 * largest)
                for a, b in zip(mine, theirs, strict=True)
            )
            for name in self._of.keys() | other._of.keys()
        )


def _merged(
    index: Tensor, sample: Tensor, values: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, samples and the sums of the values of each pair of them."""
    keys, place = torch.unique(sample * count + index, return_inverse=True)
    sums = values.new_zeros(len(keys), values.shape[1], dtype=ops.value_dtype(values.dtype))
    sums.index_add_(0, place, values.to(sums.dtype))
    return keys % count, keys // count, sums


# --- modules -----------------------------------------------------------------------------------------

_Rule = Callable[[nn.Module, dict[str, str], Tensor, Tensor, _Sink], None]


class _Hooks:
    """The modules that hold eligible parameters, each with its rule and their names by leaf."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, tuple[_Rule, dict[str, str]]] = {}


def _hooks(eligible: Eligible) -> _Hooks | None:
    """A rule for each module with eligible parameters; None if one has none."""
    hooks = _Hooks()
    for name, candidate in eligible.items():
        rule = _rule(candidate)
        if rule is None:
            return None
        _, leaves = hooks.modules.setdefault(candidate.module, (rule, {}))
        leaves[name.rpartition(".")[2]] = name
    return hooks


def _rule(candidate: Candidate) -> _Rule | None:
    module = candidate.module
    forward = type(module).forward
    if len(candidate.aliases) > 1:
        return None
    if forward is nn.Linear.forward:
        return _linear
    if is_hf_conv1d(module):
        return _conv1d
    if forward is nn.Embedding.forward:
        strange = module.max_norm is not None or module.scale_grad_by_freq
        return None if strange else _embedding
    if forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1:  # type: ignore[arg-type]
        return _layer_norm
    if is_norm(module) and all(p.dim() == 1 for p in module.parameters()):
        return _norm
    return None


def _tokens(x: Tensor) -> Tensor:
    """[B, ..., n] as [B, T, n]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _felt(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Without the positions whose dy is 0 in all samples, as all but the pooled one of a last layer."""
    quiet = (dy[..., 0] == 0).all(0)
    if bool(quiet.any()):
        quiet[quiet.clone()] = (dy[:, quiet] == 0).all(-1).all(0)
        dy, x = dy[:, ~quiet], x[:, ~quiet]
    return dy, x


def _linear(module: nn.Module, names: dict[str, str], x: Tensor, dy: Tensor, sink: _Sink) -> None:
    dy = _tokens(dy)
    if "weight" in names:
        sink.outer(names["weight"], *_felt(dy, _tokens(x)))
    if "bias" in names:
        sink.stack(names["bias"], dy.sum(1))


def _conv1d(module: nn.Module, names: dict[str, str], x: Tensor, dy: Tensor, sink: _Sink) -> None:
    dy = _tokens(dy)
    if "weight" in names:
        felt, inputs = _felt(dy, _tokens(x))
        sink.outer(names["weight"], inputs, felt)
    if "bias" in names:
        sink.stack(names["bias"], dy.sum(1))


def _embedding(
    module: nn.Module, names: dict[str, str], x: Tensor, dy: Tensor, sink: _Sink
) -> None:
    index = x.reshape(len(x), -1)
    sample = torch.arange(len(x), device=x.device)[:, None].expand_as(index)
    values = dy.reshape(-1, dy.shape[-1])
    index, sample = index.flatten().to(torch.int64), sample.flatten()
    if module.padding_idx is not None:
        used = index != module.padding_idx
        index, sample, values = index[used], sample[used], values[used]
    sink.rows(names["weight"], index, sample, values)


def _layer_norm(
    module: nn.Module, names: dict[str, str], x: Tensor, dy: Tensor, sink: _Sink
) -> None:
    if "weight" in names:
        plain = F.layer_norm(x, module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]
        sink.stack(names["weight"], _tokens(plain * dy).sum(1))
    if "bias" in names:
        sink.stack(names["bias"], _tokens(dy).sum(1))


def _norm(module: nn.Module, names: dict[str, str], x: Tensor, dy: Tensor, sink: _Sink) -> None:
    """Any other normalisation: vmap of the module's own backward pass."""
    params = {leaf: module.get_parameter(leaf).detach() for leaf in names}

    def pull(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        def forward(params: dict[str, Tensor]) -> Tensor:
            out: Tensor = torch.func.functional_call(module, params, (x[None],))
            return out

        back = torch.func.vjp(forward, params)[1]
        found: dict[str, Tensor] = back(dy[None])[0]
        return found

    for leaf, values in torch.func.vmap(pull)(x, dy).items():
        sink.stack(names[leaf], values)


class _Watch:
    """Watches one forward and backward pass of a batch."""

    def __init__(self, hooks: _Hooks, size: int, sink: _Sink) -> None:
        self._hooks = hooks
        self._size = size
        self._sink = sink
        self._handles: list[Any] = []
        self._inputs: dict[nn.Module, Tensor] = {}
        self.strange = False  # a call was not one that its rule is for
        self.forwards = True  # what a backward pass calls again (checkpoints, rules) is not watched

    def __enter__(self) -> "_Watch":
        for module in self._hooks.modules:
            self._handles.append(
                module.register_forward_hook(self._forward, prepend=True, with_kwargs=True)
            )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Tensor | None:
        if not self.forwards:
            return None
        given = [*args, *kwargs.values()]
        x = given[0] if len(given) == 1 else None
        if module in self._inputs or not isinstance(x, Tensor) or not isinstance(out, Tensor):
            self.strange = True
            return None
        if isinstance(module, nn.Embedding) and len(x) == 1 and x.dim() > 1:
            # positions, the same for all samples: one output for each, so that dy is one for each
            x, out = x.expand(self._size, *x.shape[1:]), out.expand(self._size, *out.shape[1:])
        if x.dim() < 2 or x.shape[0] != self._size or out.shape[0] != self._size:
            self.strange = True
            return None
        if not out.requires_grad:  # the first of its path; a copy, which may be written to
            out = out.detach().requires_grad_().clone()
        self._inputs[module] = x.detach()
        result: Tensor = out
        result.register_hook(functools.partial(self._backward, module))
        return result

    def _backward(self, module: nn.Module, dy: Tensor) -> None:
        x = self._inputs.pop(module)
        rule, names = self._hooks.modules[module]
        with torch.no_grad():
            rule(module, names, x, dy, self._sink)
