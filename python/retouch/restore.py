"""Putting weights back, or towards others, at the coordinates of a mask and nowhere else.

One step of PSMT (arXiv 2407.02253, the released code), whose student returns where the Fisher information
of the batch is lowest and whose teacher follows it:

    >>> optimizer.step()                                           # the student
    >>> ema_(teacher, student, 0.999)
    >>> low = low_quantile(squared_gradients, 0.03, student)
    >>> restore_(student, low, source)
    >>> restore_(teacher, low, student)
    >>> ema_(teacher, student, 0.999, ~low)                        # a second time, elsewhere

The rewind of LT-SFT (arXiv 2110.07560) and LoTA (arXiv 2406.16797), train, select by the difference, go
back, train what was selected:

    >>> start = {name: p.detach().clone() for name, p in model.named_parameters()}
    >>> train(model)
    >>> mask = retouch.select(model, "lt-sft", score=retouch.scores.Difference(start))
    >>> restore_(model, Mask.full(model), start)
    >>> optimizer = retouch.wrap(torch.optim.AdamW, mask, model, lr=1e-4)
"""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn

from retouch import ops
from retouch.eligible import PLACE, own_parameters
from retouch.engine import get_engine
from retouch.errors import BudgetError, EngineError, HyperparameterError, MaskError
from retouch.masks import Mask, Selection
from retouch.slots import Slot

__all__ = ["ema_", "low_quantile", "restore_"]


def low_quantile(scores: Mapping[str, Tensor], fraction: float, model: nn.Module) -> Mask:
    """The coordinates whose score is below a quantile of all scores together, strictly.

    The quantile lies at position ``fraction * (n - 1)`` of the ascending scores and is interpolated
    linearly between its neighbours; ties with it are left out. Nothing is concatenated or sorted whole.

    Args:
        scores: A floating-point tensor of the parameter's shape for each name; squared gradients, say.
        fraction: In [0, 1], with its decimal digits as they are written.
        model: The model that the names are of.

    Returns:
        The mask; empty if nothing lies below.

    Raises:
        ScoreError: A score is NaN; the error names its parameter.
        HyperparameterError: Another fraction.
        BudgetError: No scores.
        MaskError: The model has no such parameter, or one of another shape.
    """
    if not 0 <= fraction <= 1:
        raise HyperparameterError(f"fraction={fraction!r}; wanted a number in [0, 1]")
    names, values = list(scores), [s.detach().to(torch.float32) for s in scores.values()]
    count = sum(v.numel() for v in values)
    if not count:
        raise BudgetError("there are no scores to take a quantile of")
    place = Fraction(str(fraction)) * (count - 1)
    first = math.floor(place)
    picked = ops.topk(values, names, min(first + 2, count), largest=False)
    lowest = [v.reshape(-1).index_select(0, i) for v, i in zip(values, picked, strict=True)]
    order = torch.cat([part.cpu() for part in lowest]).sort().values
    at = order[first]
    between = place > first and bool(order[first + 1] > at)
    # between two neighbours, all up to the lower one lie below; else all before it
    bound = at if between else torch.nextafter(at, torch.tensor(-math.inf))
    found = ops.threshold(values, names, float(bound), largest=False)
    if not between and float(at) == -math.inf:
        found = [index[:0] for index in found]
    chosen = {
        name: Selection("elements", tuple(scores[name].shape), index)
        for name, index in zip(names, found, strict=True)
        if index.numel()
    }
    return Mask(chosen, model, {"quantile": fraction, "below": float(at)})


def restore_(
    model: nn.Module, mask: Mask, source: nn.Module | Mapping[str, Tensor] | None = None
) -> None:
    """Gives the coordinates of a mask the values of a source, bit for bit; the others keep their bits.

    Of a wrapped model the compact values follow, so that training goes on from what was restored; the
    state of the optimizer is kept.

    Args:
        model: The model; wrapped or not.
        mask: Which coordinates; of a wrapped model only such as may move.
        source: A model or tensors by name, of the model's shapes and dtypes. None: the base of a
            wrapped model.

    Raises:
        MaskError: The mask does not fit the model, the source lacks a parameter or has one of another
            shape or dtype, or the mask holds coordinates that a wrapped model keeps frozen. Nothing
            has been written then.
        EngineError: No source, and the model is not wrapped.
    """
    mask.check(model)
    slots = _slots(model, mask)
    if source is None and slots is None:
        raise EngineError(
            f"{type(model).__name__} is not wrapped, so it has no base of its own: pass a source"
        )
    known = dict(own_parameters(model))
    if source is None:
        assert slots is not None
        for name, selection in mask.items():
            if selection.count:
                param, slot = known[name], slots[name]
                whole = param.detach().clone()
                slot.selection.put_(whole, slot.base, name)
                selection.put_(param, selection.take(whole, name), name)
                slot.sync()
        return
    for (name, selection), values in zip(mask.items(), _values(mask, known, source), strict=True):
        selection.put_(known[name], selection.take(values, name).to(known[name].device), name)
        if slots is not None and name in slots:
            slots[name].sync()


def ema_(
    target: nn.Module,
    source: nn.Module | Mapping[str, Tensor],
    decay: float,
    mask: Mask | None = None,
) -> None:
    """``target = decay * target + (1 - decay) * source`` at the coordinates of a mask.

    Computed in float32 (float64 for float64) and rounded once; buffers are left alone.

    Args:
        target: The teacher; of a wrapped one the compact values follow.
        source: The student, or its tensors by name.
        decay: In [0, 1].
        mask: Which coordinates; default all floating-point parameters.

    Raises:
        HyperparameterError: Another decay.
        MaskError: See `restore_`.
    """
    if not 0 <= decay <= 1:
        raise HyperparameterError(f"decay={decay!r}; wanted a number in [0, 1]")
    mask = Mask.full(target) if mask is None else mask
    mask.check(target)
    slots = _slots(target, mask)
    known = dict(own_parameters(target))
    for (name, selection), values in zip(mask.items(), _values(mask, known, source), strict=True):
        param = known[name]
        old = selection.gather(param.detach(), name)
        new = selection.gather(values, name).to(old.device)
        selection.scatter_(param, old * decay + new * (1 - decay), name)
        if slots is not None and name in slots:
            slots[name].sync()


def _slots(model: nn.Module, mask: Mask) -> dict[str, Slot] | None:
    """The slots of a wrapped model, in which all of the mask may move; None of a plain one."""
    if PLACE not in model._modules:
        return None
    engine = get_engine(model)
    engine.check()
    for name, selection in mask.items():
        slot = engine.slots.get(name)
        if selection.count and (slot is None or (selection - slot.selection).count):
            raise MaskError(
                f"{name}: the mask holds coordinates that the wrapped model keeps frozen; use "
                "mask & model._retouch.mask"
            )
    return engine.slots


def _values(
    mask: Mask, known: Mapping[str, Tensor], source: nn.Module | Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """The source's tensor for each name of a mask; all are checked before the first is given."""
    held = dict(own_parameters(source)) if isinstance(source, nn.Module) else source
    found = []
    for name in mask:
        values = held.get(name)
        if not isinstance(values, Tensor):
            raise MaskError(f"the source has no tensor {name!r}")
        if values.shape != known[name].shape or values.dtype != known[name].dtype:
            raise MaskError(
                f"{name} is {values.dtype} of shape {tuple(values.shape)} in the source; wanted "
                f"{known[name].dtype} of shape {tuple(known[name].shape)}"
            )
        found.append(values.detach())
    return iter(found)
