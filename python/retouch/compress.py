"""Making a delta smaller: sparsifiers and codings, and the distillation of their scales.

`Delta.compress` chains them. Sparsifiers choose elements of the difference, a coding stores what is left.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retouch import deltachange, ops
from retouch.deltachange import Change
from retouch.deltaentry import Entry, Kind
from retouch.deltasource import Source
from retouch.errors import BaseMismatchError, FormatError, HyperparameterError, ScoreError
from retouch.linalg import one_thread, svd

if TYPE_CHECKING:
    from retouch.delta import Delta

__all__ = ["BitDelta", "Dare", "LowRank", "Magnitude", "Quantise", "Step", "distil_scales"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Work:
    """A difference on its way: all elements (index None), or those at some positions."""

    name: str
    shape: tuple[int, ...]
    index: Tensor | None
    values: Tensor

    def chosen(self, which: Tensor) -> "_Work":
        """The same with some of its elements, by their place among them."""
        index = which if self.index is None else self.index[which.long()]
        index = index.to(ops.index_dtype(torch.Size(self.shape).numel()))
        return replace(self, index=index, values=self.values[which.long()])

    def whole(self) -> Tensor:
        """The difference of the whole tensor, flat."""
        if self.index is None:
            return self.values
        out = torch.zeros(torch.Size(self.shape).numel(), dtype=self.values.dtype)
        out[self.index.long()] = self.values
        return out


@dataclass(frozen=True)
class Magnitude:
    """Keeps the largest differences of each tensor, exactly `int(density * elements)` of them.

    Of equal ones the first is kept; fewer are kept if fewer differ from zero.

    Args:
        density: The fraction of the tensor's elements, above 0 and at most 1.
    """

    density: float

    def __post_init__(self) -> None:
        _fraction("density", self.density)

    def sparse(self, work: _Work) -> _Work:
        """The work with fewer elements."""
        k = int(self.density * torch.Size(work.shape).numel())
        k = min(k, int(work.values.count_nonzero()))
        return work.chosen(ops.topk([work.values], [work.name], k, absolute=True)[0])


@dataclass(frozen=True)
class Dare:
    """Drops differences at random and scales the rest by `1 / density` (DARE, arXiv 2311.03099).

    Whether an element is kept depends on the seed, the name of its tensor and its position alone.

    Args:
        density: Probability of being kept, above 0 and at most 1.
        seed: Of the random numbers.
    """

    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        _fraction("density", self.density)

    def sparse(self, work: _Work) -> _Work:
        """The work with fewer elements."""
        draw = ops.uniform(work.shape, self.seed, work.name, "cpu").reshape(-1)
        if work.index is not None:
            draw = draw[work.index.long()]
        kept = work.chosen(((draw < self.density) & (work.values != 0)).nonzero().squeeze(1))
        return replace(kept, values=kept.values / self.density)


@dataclass(frozen=True)
class BitDelta:
    """Signs and one magnitude per tensor, the mean (BitDelta, arXiv 2402.10193); 0 counts as positive.

    After a sparsifier only the kept elements have signs. `distil_scales` trains the magnitudes.
    """

    def coded(self, work: _Work) -> Change:
        """The values in this coding."""
        return deltachange.signs(work.values)


@dataclass(frozen=True)
class Quantise:
    """Integers times a scale per block of elements; the largest of a block is exact.

    Args:
        bits: 8 or 4.
        block: Elements that share a scale (default 64).
    """

    bits: int = 8
    block: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or type(self.block) is not int or self.block < 1:
            raise HyperparameterError(
                f"bits must be 8 or 4 and block a positive integer, got {self.bits!r} and "
                f"{self.block!r}"
            )

    def coded(self, work: _Work) -> Change:
        """The values in this coding."""
        return deltachange.integers(work.values, self.bits, self.block)


@dataclass(frozen=True)
class LowRank:
    """The best approximation of some rank of every matrix, as the factors of a LoRA adapter.

    The square of the error in `Delta.stats` is the energy that is left over. Tensors that are no
    matrices stay exact.

    Args:
        rank: Of each matrix; at most what its shape allows.
    """

    rank: int

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise HyperparameterError(f"rank must be a positive integer, got {self.rank!r}")

    def coded(self, work: _Work) -> Change:
        """The values in this coding."""
        with one_thread():
            u, s, vh = svd(work.whole().reshape(work.shape), work.name)
        root = s[: self.rank].sqrt()  # both factors of one size, as in LoRA extraction
        return deltachange.low_rank(u[:, : self.rank] * root, root[:, None] * vh[: self.rank])


Step = Magnitude | Dare | BitDelta | Quantise | LowRank


def _fraction(name: str, value: float) -> None:
    if not isinstance(value, float | int) or not 0 < value <= 1:
        raise HyperparameterError(f"{name} must be above 0 and at most 1, got {value!r}")


def compressed(delta: "Delta", steps: Sequence[Step], base: Any, min_dims: int) -> dict[str, Entry]:
    """See `Delta.compress`."""
    if not steps:
        raise HyperparameterError("name at least one step, such as compress.Magnitude(0.1)")
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if not isinstance(step, Step):
            raise HyperparameterError(f"wanted a step of retouch.compress, got {step!r}")
        if following is not None and not isinstance(step, Magnitude | Dare):
            raise HyperparameterError(
                f"{type(step).__name__} is a coding and comes last, but {following!r} follows it"
            )
    source = None if base is None else Source(base)
    out = {}
    for name, entry in delta.items():
        exact = entry.kind in ("added", "removed") or entry.dtype not in _FLOATS
        needed = 2 if isinstance(steps[-1], LowRank) else 0
        if exact or len(entry.shape) < min_dims or (needed and len(entry.shape) != needed):
            out[name] = entry
        else:
            out[name] = _compressed(name, entry, steps, _base(delta, name, entry, source))
    return out


def _base(delta: "Delta", name: str, entry: Entry, source: Source | None) -> Tensor | None:
    """The tensor in the base, if one was given; checked."""
    if source is None:
        return None
    names = [name, *(alias for alias, n in delta.aliases.items() if n == name)]
    found = next((n for n in names if n in source), None)
    tensor = None if found is None else source.read[found]().detach().cpu().contiguous()
    if tensor is None or tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise BaseMismatchError(f"the base has no {entry.dtype} {name} of shape {entry.shape}")
    if entry.base_hash is not None and ops.fingerprint(tensor) != entry.base_hash:
        raise BaseMismatchError(f"this is not the base of the delta: {name} differs")
    return tensor


def _compressed(name: str, entry: Entry, steps: Sequence[Step], base: Tensor | None) -> Entry:
    base_hash = entry.base_hash if base is None else ops.fingerprint(base)
    old = entry.old if base is None else entry.read(base)
    if old is None or base_hash is None:
        raise FormatError(
            f"the delta does not hold the old values and the fingerprint of {name}: pass base=, the "
            "model that it is for"
        )
    new = entry.after(old)
    assert new is not None
    wide = ops.value_dtype(entry.dtype)
    difference = (new.to(wide) - old.to(wide)).reshape(-1).cpu()
    if not bool(difference.isfinite().all()):
        raise ScoreError(f"the change of {name} holds NaN or infinity: it cannot be compressed")
    index = None if entry.index is None else entry.index.cpu()
    true = work = _Work(name, entry.shape, index, difference)
    coded = None
    for step in steps:
        if isinstance(step, Magnitude | Dare):
            work = step.sparse(work)
        else:
            coded = step.coded(work)
    change = coded if coded is not None else deltachange.plain(work.values)
    if change.coding == "low-rank":
        work = replace(work, index=None, values=change.decode())
    else:
        work = replace(work, values=change.decode())
    whole = base if entry.index is not None else old
    if work.index is None:
        kept = whole
    elif whole is not None:
        kept = whole.reshape(-1)[work.index.long()]
    else:
        assert index is not None
        kept = old.reshape(-1)[torch.searchsorted(index, work.index)]
    kind: Kind = "low-rank" if change.coding == "low-rank" else "dense-add"
    out = Entry(
        kind if work.index is None else "sparse-add", entry.shape, entry.dtype, work.index,
        None, None if kept is None else kept.cpu().clone(), base_hash, change=change,
        error=_error(true, work, entry.error),
    )  # fmt: skip
    if whole is not None:
        there = whole.reshape(-1) if work.index is None else kept
        values = out.after(there)
        assert values is not None
        out.result_hash = out.leads_to(whole, values)
    return out


def _error(true: _Work, work: _Work, before: float | None) -> float:
    """The norm of what is missing, relative to that of the change."""
    total = float(true.values.double().norm())
    missing = float((work.whole().double() - true.whole().double()).norm())
    lost = missing / total if total else 0.0
    # of a delta that was compressed before, the losses at most add up
    return lost if before is None else lost + before


def distil_scales(
    delta: "Delta",
    model: nn.Module,
    batches: Iterable[tuple[Mapping[str, Any], Tensor]],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[float]:
    """Trains the magnitudes of `BitDelta` entries, in place, so that outputs match (arXiv 2402.10193).

    One AdamW step per batch on the mean squared error of the outputs; nothing but one number per tensor
    moves. The paper takes 200 batches of 4 sequences of 128 tokens and the logits of the tuned model.

    Args:
        delta: A compressed delta; its entries of coding "sign" are trained, the others applied.
        model: The base; not changed.
        batches: Pairs of keyword arguments of the model and the wanted output (of shape of its
            `logits`, or of its output if that is a tensor).
        lr: Of AdamW (default 1e-4, the paper's).
        betas: Of AdamW.

    Returns:
        The loss of every batch, before its step.

    Raises:
        HyperparameterError: No entry has magnitudes.
        BaseMismatchError: The model is not the base.
    """
    tensors = dict(model.state_dict(keep_vars=True))
    fixed: dict[str, Tensor] = {}
    trained: dict[str, tuple[Entry, Tensor, Tensor, Tensor]] = {}
    for name, entry in delta.items():
        tensor = tensors[name].detach()
        if entry.base_hash is not None and ops.fingerprint(tensor) != entry.base_hash:
            raise BaseMismatchError(f"this is not the base of the delta: {name} differs")
        if entry.change is None or entry.change.coding != "sign":
            values = entry.after(entry.read(tensor))
            assert values is not None
            fixed[name] = tensor.clone()
            entry.write(fixed[name], values, name)
            continue
        scale = entry.change.parts["scale"]
        unit = replace(entry.change, parts=entry.change.parts | {"scale": torch.ones(1)}).decode()
        work = _Work(name, entry.shape, entry.index, unit)
        sign = work.whole().reshape(entry.shape).to(tensor.device)
        leaf = scale.clone().to(tensor.device).requires_grad_()
        trained[name] = entry, tensor, sign, leaf
    if not trained:
        raise HyperparameterError("no entry of this delta has the coding of compress.BitDelta")
    leaves = [leaf for *_, leaf in trained.values()]
    optimizer = torch.optim.AdamW(leaves, lr=lr, betas=betas, weight_decay=0.0)
    losses = []
    for inputs, wanted in batches:
        weights = fixed | {
            n: (tensor.float() + leaf * sign).to(tensor.dtype)
            for n, (_, tensor, sign, leaf) in trained.items()
        }
        output = torch.func.functional_call(model, weights, kwargs=dict(inputs), tie_weights=True)
        got = output if isinstance(output, Tensor) else output.logits
        loss = (got.float() - wanted.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for entry, tensor, _, leaf in trained.values():
        assert entry.change is not None
        entry.change.parts["scale"] = leaf.detach().cpu()
        values = entry.after(entry.read(tensor))
        assert values is not None
        entry.result_hash = entry.leads_to(tensor, values)
        entry.error = None
    return losses
