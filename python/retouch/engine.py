"""Putting an engine on a model, finding it, and taking it off again.

The engine itself is `retouch.compact.Engine`, whose module says how it works.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retouch import ops
from retouch.binding import innermost, packed, unpacked
from retouch.compact import Engine
from retouch.config import SelectConfig, resolve
from retouch.eligible import PLACE, own_parameters
from retouch.errors import EngineError, FrozenError, HyperparameterError
from retouch.masks import Mask, Selection
from retouch.optim.configured import configure
from retouch.passes import LossFn
from retouch.routes import Gradient
from retouch.slots import Copy, Slot, buffers, same_bits, some

__all__ = [
    "Engine",
    "Slot",
    "Untouched",
    "follow",
    "get_engine",
    "install",
    "unwrap",
    "verify_untouched",
    "wrap",
]


@dataclass(frozen=True)
class Untouched:
    """What `verify_untouched` has found in order.

    Attributes:
        parameters: How many parameters were checked.
        frozen: How many of them are wholly frozen.
        buffers_changed: Persistent buffers (running statistics) that differ from the base: no
            error.
    """

    parameters: int
    frozen: int
    buffers_changed: list[str]


def install(
    model: nn.Module,
    mask: Mask | None = None,
    *,
    fingerprint: bool = True,
    gradient: Gradient = "auto",
) -> Engine:
    """Puts an engine on a model: compact values for what the mask selects, the rest frozen.

    The outputs of the model do not change by a bit. Most users want `wrap`.

    Args:
        model: Any module with dense floating-point parameters.
        mask: What may move. None makes a compact value without elements for every floating-point
            parameter, so that an optimizer can be built before the mask is known; nothing trains
            until `Engine.set_mask`.
        fingerprint: Hash every parameter, so that `verify_untouched` and deltas can tell the base.
        gradient: How the gradients of the selected weights are taken. "sampled": only the selected
            entries are computed, in the backward pass of the layer (Linear, Conv1D, Embedding,
            Conv2d); "dense": the whole gradient is computed, and the rest of it dropped; "auto":
            sampled up to the density where dense is as fast (measured, `retouch.routes`). Where
            sampled is not possible it is dense. All give the same gradients up to rounding.

    Returns:
        The engine; it is also `model._retouch`.

    Raises:
        EngineError: The model has one already.
        MaskError: The mask does not fit the model.
        HyperparameterError: Another word for `gradient`.
    """
    if isinstance(model._modules.get(PLACE), Engine):
        raise EngineError("the model is wrapped already; call retouch.unwrap(model) first")
    if any(isinstance(module, Engine) for module in model.modules()):
        raise EngineError("a submodule of the model is wrapped already; unwrap it first")
    if mask is not None:
        mask.check(model)
    model._modules.pop(PLACE, None)  # of a deep copy
    engine = Engine(model, fingerprint=fingerprint, gradient=gradient)
    model.add_module(PLACE, engine)
    try:
        if mask is not None:
            engine.set_mask(mask)
        else:
            for name, param in own_parameters(model):
                if param.is_floating_point():
                    engine.value_for(name)
            engine.freeze_rest(model)
    except BaseException:
        engine.remove()
        raise
    return engine


def get_engine(model: nn.Module) -> Engine:
    """The engine of a model (also through DDP's and torch.compile's wrappers).

    Raises:
        EngineError: The model has none, or is a deep copy of a wrapped model.
    """
    inner: Any = model
    while PLACE not in inner._modules:
        wrapped = inner._modules.get("module", inner._modules.get("_orig_mod"))
        if wrapped is None:
            raise EngineError(
                f"{type(model).__name__} is not wrapped; call retouch.wrap(optimizer, mask)"
            )
        inner = wrapped
    engine = inner._modules[PLACE]
    if not isinstance(engine, Engine):
        raise EngineError(
            f"{type(model).__name__} is a deep copy of a wrapped model: wrap it again"
        )
    return engine


def wrap(
    optimizer: Any,
    mask: Mask | SelectConfig | str | None,
    model: nn.Module | None = None,
    *,
    data: Any = None,
    loss_fn: LossFn | None = None,
    fingerprint: bool = True,
    gradient: Gradient = "auto",
    **kwargs: Any,
) -> Any:
    """Makes an optimizer move the selected coordinates only.

    Args:
        optimizer: A `torch.optim.Optimizer` class (built here over the compact values, with
            `kwargs`), or an instance over parameters of the model: its groups are edited in place,
            so schedulers and Accelerate's wrapper stay valid; frozen parameters are dropped,
            options are kept, and state that it has already is cut down to the selected coordinates.
        mask: What may move. A config, or the name of a recipe, for a mask that moves by its
            `SelectConfig.schedule` (`model` is needed then; `retouch.AdamW` and `retouch.Adafactor`
            can give each coordinate a clock of its own), or whose `gate`, `decay` and `pull`
            the optimizer is to be given, as far as it was told nothing else. None: nothing, until
            `Engine.set_mask` or the optimizer's `load_state_dict` brings a mask; `model` is needed.
        model: The model; default the one that the mask was selected on.
        data: With a config, for scores that read data: see `retouch.select`.
        loss_fn: With a config: see `retouch.select`.
        fingerprint: See `install`.
        gradient: See `install`: "auto", "sampled" or "dense".
        **kwargs: For a class.

    Returns:
        The optimizer.

    Raises:
        EngineError: The model is wrapped already, or the optimizer holds parameters of another
            model, or lacks one that the mask selects.
        MaskError: The mask does not fit the model.
        HyperparameterError: The config asks for what this optimizer does not have.

    Example:
        >>> optimizer = retouch.wrap(torch.optim.AdamW(model.parameters(), lr=1e-4), mask)
        >>> optimizer = retouch.wrap(retouch.AdamW, mask, lr=1e-4)  # fused step in Rust
    """
    if model is None and isinstance(mask, Mask):
        model = mask.model()
    if model is None:
        raise EngineError(
            "the mask does not know its model (is it None, a config, or from a file?): pass model="
        )
    config = resolve(mask, {}) if isinstance(mask, SelectConfig | str) else None
    if config is None and (data is not None or loss_fn is not None):
        raise HyperparameterError("data and loss_fn are for a config; a mask is selected already")
    is_class = not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "optimizer")
    if not is_class and kwargs:
        raise HyperparameterError(
            f"{some(kwargs)}: options are for an optimizer class; an instance has its own"
        )
    names = {id(p): name for name, p in own_parameters(model)}
    fixed = mask if isinstance(mask, Mask) else None
    engine = install(model, fixed, fingerprint=fingerprint, gradient=gradient)
    try:
        if is_class:
            values = [slot.value for slot in engine.slots.values()]
            optimizer = optimizer(values or engine.values(), **kwargs)
        else:
            _take_over(engine, innermost(optimizer), names)
        if config is not None:
            configure(innermost(optimizer), config)
        engine.bind(optimizer)
        if config is not None:
            follow(engine, config, data=data, loss_fn=loss_fn)
    except BaseException:
        engine.remove()
        raise
    return optimizer


def follow(
    engine: Engine,
    config: SelectConfig,
    *,
    data: Any = None,
    loss_fn: LossFn | None = None,
    start: bool = True,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Has the mask of an engine follow a config and its schedule.

    Args:
        engine: Bound to its optimizer already.
        config: Without a schedule it selects once.
        data: For scores that read data.
        loss_fn: For them.
        start: Make the first mask now; False where a state dict will bring it.
        around: A context in which data are read for scores.

    Raises:
        HyperparameterError: A schedule that does not fit the config or the run.
    """
    from retouch.moving import Mover  # it selects, and select stands right of the engine's parts

    engine.mover = Mover(engine, config, data, loss_fn, around)
    if start:
        engine.mover.start()


def unwrap(model: nn.Module) -> None:
    """Leaves a plain model, with the weights as trained and `requires_grad` as before.

    Raises:
        EngineError: The model is not wrapped.
    """
    if isinstance(model._modules.get(PLACE), Copy):
        del model._modules[PLACE]
        return
    get_engine(model).remove()


def verify_untouched(model: nn.Module) -> Untouched:
    """Checks by fingerprints that nothing outside of the mask has changed, in any bit.

    Returns:
        What was checked; buffers that changed are listed in it.

    Raises:
        FrozenError: Naming the parameters that changed.
        EngineError: The model is not wrapped, or was without fingerprints.
    """
    engine = get_engine(model)
    if not engine.hashes:
        raise EngineError("there are no fingerprints: the model was wrapped with fingerprint=False")
    owner, touched = engine.owner(), []
    known = dict(own_parameters(owner))
    for name, param in known.items():
        piece = engine.base_of(name)
        if piece is None:
            now = ops.fingerprint(param)
        elif piece.selection.kind == "all" and tuple(param.shape) == piece.selection.shape:
            continue
        elif tuple(param.shape) != piece.selection.shape or param.dtype != piece.values.dtype:
            now = ""
        else:
            now = ops.fingerprint(param, piece.selection.flat(), piece.values)
        if now != engine.hashes.get(name):
            touched.append(name)
    touched += [f"{name} (gone)" for name in engine.hashes if name not in known]
    if touched:
        raise FrozenError(
            f"{len(touched)} parameters have changed outside of the mask: {some(touched)}"
        )
    base = engine.base_buffers
    changed = [n for n, b in buffers(owner) if n not in base or not _equal(base[n], b)]
    return Untouched(len(known), len(known) - len(engine.slots), changed)


def _take_over(engine: Engine, optimizer: Optimizer, names: dict[int, str]) -> None:
    """Edits the groups of an optimizer over weights into groups over compact values."""
    plan: list[tuple[dict[str, Any], list[nn.Parameter], list[int]]] = []
    states: dict[Tensor, dict[str, Any]] = {}
    for i, group in enumerate(optimizer.param_groups):
        values, kept = [], []
        for j, param in enumerate(group["params"]):
            name = names.get(id(param))
            if name is None:
                raise EngineError(
                    f"parameter {j} of group {i} of the optimizer (shape {tuple(param.shape)}) is "
                    "not a parameter of the model that the mask is for"
                )
            selection = engine.slots[name].selection if name in engine.slots else None
            if not engine.slots and param.is_floating_point():  # the mask is still to come
                nothing = torch.empty(0, dtype=ops.index_dtype(param.numel()))
                selection = Selection("elements", tuple(param.shape), nothing)
            if selection is not None:
                value = engine.value_for(name)
                values.append(value)
                kept.append(j)
                if param in optimizer.state:
                    whole = Selection("all", tuple(param.shape))
                    cut = _cut(name, selection, unpacked(optimizer, param, whole))
                    states[value] = packed(optimizer, value, selection, cut)
        plan.append((group, values, kept))
    held = {id(v) for _, values, _ in plan for v in values}
    missing = [s.name for s in engine.slots.values() if id(s.value) not in held]
    if missing:
        raise EngineError(f"the mask selects {some(missing)}, which the optimizer does not hold")
    for group, values, kept in plan:
        group["params"][:] = values  # the list itself stays: LBFGS keeps a reference to it
        if "param_names" in group:
            group["param_names"] = [group["param_names"][j] for j in kept]
    optimizer.state.clear()
    optimizer.state.update(states)
    if hasattr(optimizer, "_numel_cache"):  # of LBFGS
        optimizer._numel_cache = None


def _cut(name: str, selection: Selection, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a weight's optimizer state that belongs to the selected coordinates."""
    cut: dict[str, Any] = {}
    for key, item in state.items():
        if not isinstance(item, Tensor) or key == "step":
            cut[key] = item
        elif item.shape == selection.shape:
            part = selection.gather(item)
            cut[key] = part.clone() if part.data_ptr() == item.data_ptr() else part
        elif selection.kind == "all" or item.numel() <= 1:
            cut[key] = item
        else:
            raise EngineError(
                f"the optimizer's {key} of {name} has shape {tuple(item.shape)}, which cannot "
                "be cut down to the selected coordinates; wrap it before its first step"
            )
    return cut


def _equal(a: Tensor, b: Tensor) -> bool:
    b = b.detach().cpu()
    return a.shape == b.shape and a.dtype == b.dtype and bool(same_bits(a, b).all())
