"""Parameter groups with options of their own: muP, u-muP, LoRA+, Muon with AdamW.

The first three return groups for an optimizer of this package, which multiplies its `lr` and
`weight_decay` by the group's ``lr_mult`` and ``wd_mult`` inside of the step, so that a scheduler which
sets `lr` leaves them alone:

    >>> optimizer = retouch.wrap(retouch.AdamW(groups.mup(model, base), lr=1e-2), mask)

With ``lr=`` (and ``weight_decay=``) the groups hold the products themselves, for any other optimizer;
then a scheduler must scale the rates of the groups, as those of `torch.optim.lr_scheduler` do, and not
set one for all.

The multipliers follow from whole weights, whatever a mask selects of them later.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from retouch.config import SelectConfig
from retouch.eligible import Candidate, candidates, own_parameters
from retouch.errors import HyperparameterError
from retouch.slots import some

__all__ = ["lora_plus", "muon", "mup", "u_mup"]

Group = dict[str, Any]
_ALL = SelectConfig(direction="random", density=1.0, target_modules=None)
_LORA_B = re.compile(r"(.*\.)?lora_(embedding_)?B(\..*)?")


def mup(
    model: nn.Module,
    base: nn.Module | Mapping[str, Iterable[int]],
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[Group]:
    """Groups with the rates of muP (Tensor Programs V, arXiv 2203.03466), as in the mup package.

    A dimension counts as infinite where it differs from the base's, and its width is the quotient.
    With two infinite dimensions (hidden weights) Adam's rate is divided by the width of the input
    features and its decay multiplied by it, so that their product stays; with one or none nothing
    changes. SGD's rate is divided by the width of the inputs over that of the outputs in hidden
    weights, and multiplied by the width in what has one infinite dimension.

    The rates are a third of muP: initial values, and the multipliers of readout and attention, are
    the model's own business.

    Args:
        model: The wide model.
        base: The same model at the width that the rates were searched at (may be on the meta device),
            or its shapes by name.
        optimizer: "adam" also for AdamW, Lion and other optimizers whose step does not grow with the
            gradient; "sgd" with or without momentum.
        lr: To have the products in the groups, see the module.
        weight_decay: With `lr`.

    Returns:
        One group for each pair of multipliers, with all parameters that require gradients.

    Raises:
        HyperparameterError: Shapes of other names or ranks, or another word for `optimizer`.
    """
    if optimizer not in ("adam", "sgd"):
        raise HyperparameterError(f"optimizer={optimizer!r}; wanted 'adam' or 'sgd'")
    if isinstance(base, nn.Module):
        base = {name: p.shape for name, p in own_parameters(base)}
    shapes = {name: tuple(shape) for name, shape in base.items()}
    found = candidates(model, _ALL)
    wrong = [
        n for n, c in found.items() if len(shapes.get(n, ())) != len(c.shape) or n not in shapes
    ]
    if wrong:
        raise HyperparameterError(f"the base has no shape of this rank for {some(wrong)}")

    def rates(name: str, one: Candidate) -> tuple[float, float]:
        width = [n / m for n, m in zip(one.shape, shapes[name], strict=True)]
        infinite = [d for d, w in enumerate(width) if w != 1]
        if len(infinite) < 2 or one.column_dims is None:
            alone = width[infinite[-1]] if infinite and optimizer == "sgd" else 1.0
            return alone, 1.0
        inputs = math.prod(width[d] for d in one.column_dims if d not in one.row_dims)
        outputs = math.prod(width[d] for d in one.row_dims if d not in one.column_dims)
        if optimizer == "sgd":
            return outputs / inputs, 1.0
        return 1 / inputs, inputs

    return _groups(found, {n: rates(n, c) for n, c in found.items()}, lr, weight_decay)


def u_mup(
    model: nn.Module,
    *,
    depth: int | None = None,
    residual: str = r"(.*\.)?\d+\..*",
    lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[Group]:
    """Groups with Adam's rates of u-muP (arXiv 2407.17465), as in the unit-scaling package.

    The rate of a weight, embeddings among them, is multiplied by 1 / sqrt(its input features), that
    of outputs, biases and norms by 1, and that of all in residual branches by 1 / sqrt(depth) as
    well. Decay is independent of these: it is divided by the multiplier, so that `lr * weight_decay`
    holds for all; with `lr=` the groups have ``weight_decay / rate`` and so decay by
    ``weight_decay`` times what a scheduler makes of 1.

    Like `mup` this is rates alone: weights drawn from N(0, 1) and a scaled forward pass are the model's.

    Args:
        model: The model.
        depth: Default the number of layers that hold parameters of residual branches.
        residual: A regular expression for the whole names of parameters in residual branches; the
            default takes all that is in a numbered list.
        lr: To have the products in the groups, see the module.
        weight_decay: With `lr`.

    Returns:
        One group for each pair of multipliers, with all parameters that require gradients.

    Raises:
        HyperparameterError: A depth below 1.
    """
    found = candidates(model, _ALL)
    inside = {n for n in found if re.fullmatch(residual, n)}
    if depth is None:
        depth = max(len({found[n].layer for n in inside}), 1)
    if depth < 1:
        raise HyperparameterError(f"depth must be at least 1, got {depth}")

    def rate(name: str, one: Candidate) -> float:
        mult = 1 / math.sqrt(depth) if name in inside else 1.0
        if one.kind in ("output", "head", "bias", "norm", "norm_bias") or len(one.shape) < 2:
            return mult
        if one.kind == "embedding":
            return mult / math.sqrt(one.shape[-1])
        return mult / math.sqrt(_fan_in(one))

    rates = {n: rate(n, c) for n, c in found.items()}
    decays = {n: 1 / r if lr is None else 1 / (r * lr) for n, r in rates.items()}
    both = {n: (rates[n], decays[n]) for n in found}
    return _groups(found, both, lr, weight_decay)


def lora_plus(
    model: nn.Module,
    ratio: float = 16.0,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[Group]:
    """Groups of LoRA+ (arXiv 2402.12354): the matrices B learn `ratio` times as fast as the rest.

    B is what stands under ``lora_B`` or ``lora_embedding_B``, as in PEFT. From memory of the paper,
    whose advice is a ratio of 16. PEFT's own function agrees on linear layers; it has one rate more for
    adapters of embeddings, and counts vectors among B.

    Args:
        model: A model with LoRA adapters.
        ratio: Of the two rates.
        lr: To have the products in the groups, see the module.
        weight_decay: With `lr`.

    Returns:
        Two groups, with all parameters that require gradients.

    Raises:
        HyperparameterError: There is no such matrix, or a ratio that is not above 0.
    """
    if not ratio > 0:
        raise HyperparameterError(f"ratio must be above 0, got {ratio}")
    found = candidates(model, _ALL)
    chosen = {n for n, c in found.items() if _LORA_B.fullmatch(n) and c.param.requires_grad}
    if not chosen:
        raise HyperparameterError("no parameter named lora_B requires gradients: is this a LoRA?")
    rates = {n: (float(ratio) if n in chosen else 1.0, 1.0) for n in found}
    return _groups(found, rates, lr, weight_decay)


def muon(model: nn.Module, *, decay_vectors: bool = True) -> list[Group]:
    """Groups for `retouch.Muon`: linear weights by Muon, all else by AdamW, as Xmodel-2.5 has it.

    Embeddings and output layers are matrices too, so without groups Muon steps them as well.

    Args:
        model: The model.
        decay_vectors: Whether what is no linear weight and no embedding (norms, biases) decays too;
            in Xmodel-2.5 it does not.

    Returns:
        Two or three groups, with all parameters that require gradients.
    """
    found = {n: c for n, c in candidates(model, _ALL).items() if c.param.requires_grad}
    options: dict[str, Group] = {
        "linear": {"use_muon": True}, "table": {"use_muon": False},
        "vector": {"use_muon": False, "wd_mult": 1.0 if decay_vectors else 0.0},
    }  # fmt: skip
    made: dict[str, list[nn.Parameter]] = {}
    for one in found.values():
        kind = "linear" if one.kind == "linear" else "table" if len(one.shape) > 1 else "vector"
        made.setdefault(kind, []).append(one.param)
    return [{"params": made[kind], **group} for kind, group in options.items() if kind in made]


def _fan_in(one: Candidate) -> int:
    """Input features of a weight, those under a convolution's kernel counted each."""
    return one.param.numel() // math.prod(one.shape[d] for d in one.row_dims)


def _groups(
    found: Mapping[str, Candidate], rates: Mapping[str, tuple[float, float]], lr: float | None,
    weight_decay: float,
) -> list[Group]:  # fmt: skip
    """Parameters with the same multipliers together, in the model's order."""
    made: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, one in found.items():
        if one.param.requires_grad:
            made.setdefault(rates[name], []).append(one.param)
    if lr is None:
        return [{"params": p, "lr_mult": a, "wd_mult": b} for (a, b), p in made.items()]
    return [
        {"params": p, "lr": lr * a, "weight_decay": weight_decay * b} for (a, b), p in made.items()
    ]
