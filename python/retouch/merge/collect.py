"""Measuring what Fisher merging and RegMean read beside each model: Fisher information, Gram matrices."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from retouch.config import SelectConfig
from retouch.eligible import candidates
from retouch.errors import HyperparameterError, ScoreError
from retouch.merge.statistics import IN_OUT
from retouch.passes import LossFn
from retouch.scores import Fisher, GradStat
from retouch.scores.activations import each_input, input_dim

__all__ = ["collect_fisher", "collect_gram"]

_FISHER = Fisher(outer="mean")
_ALL = SelectConfig(
    direction="random", density=1.0
)  # no choice is made: all parameters are looked at


def collect_fisher(
    model: nn.Module,
    data: Any,
    out: str | os.PathLike[str],
    *,
    score: GradStat = _FISHER,
    loss_fn: LossFn | None = None,
) -> Path:
    """Writes the diagonal Fisher information of a model, for the merge method `fisher`.

    Of every parameter, by its name in the model's checkpoint (tied ones by the first of their names),
    float32. Floating-point buffers of the checkpoint have zeros: they are merged by the plain mean.

    Args:
        model: Left as it was.
        data: Batches with labels, see `retouch.batches.Batches`.
        out: The file, such as ``fisher.safetensors``; replaced when the new one is complete.
        score: What is measured. Default: the mean over samples of squared gradients of the data's
            labels. ``TrueFisher(outer="mean")`` draws labels from the model, as Fisher merging (arXiv
            2111.09832) has it; a mean makes models with different numbers of samples comparable.
        loss_fn: ``loss_fn(model, batch)``; default ``model(**batch).loss``.

    Returns:
        The path of the file.

    Raises:
        HyperparameterError: `score` does not map gradients by "square".
        ScoreError: No data, or a loss that is missing, NaN or infinite; a value that is not finite.
    """
    if not isinstance(score, GradStat) or score.map != "square" or score.post != "id":
        raise HyperparameterError(
            f"score={score!r}: wanted squares of gradients, such as Fisher() or TrueFisher()"
        )
    every = candidates(model, _ALL)
    eligible = {name: c for name, c in every.items() if c.param.dtype.is_floating_point}
    found = score(model, eligible, data, loss_fn)
    for name, tensor in model.state_dict().items():
        buffer = isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
        aliases = {alias for c in every.values() for alias in c.aliases}
        if buffer and tensor.dtype.is_floating_point and name not in aliases:
            found[name] = torch.zeros(tensor.shape)
    return _save(found, out, {"kind": "fisher", "score": repr(score)})


def collect_gram(
    model: nn.Module,
    data: Any,
    out: str | os.PathLike[str],
    *,
    loss_fn: LossFn | None = None,
) -> Path:
    """Writes X'X / tokens of the inputs of a model's linear layers, for the merge method `regmean`.

    One forward pass over the data in evaluation mode, sums in float64, stored as float32 by the name of
    the layer's weight. Padding counts as any other token, so leave it out. In memory are all Gram
    matrices, 8 bytes for the square of each layer's inputs. The name of a weight that is stored as
    [in, out] (`Conv1D`) is followed by ``:in_out``. Layers that no input reached and weights that are tied
    to an embedding have none: `regmean` takes their plain mean, and its report says so.

    Args:
        model: Left as it was.
        data: Batches, see `retouch.batches.Batches`.
        out: The file, such as ``gram.safetensors``; replaced when the new one is complete.
        loss_fn: Called in place of ``model(**batch)``, for the forward pass that it makes.

    Returns:
        The path of the file.

    Raises:
        ScoreError: No batch, no linear layer, or an input that is NaN or infinite.
    """
    layers = {n: c for n, c in candidates(model, _ALL).items() if input_dim(c) is not None}
    if not layers:
        raise ScoreError(f"{type(model).__name__} has no linear layer to measure")
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(layers, 0)

    def take(name: str, rows: Tensor) -> None:
        wide = rows.double()
        gram = wide.T @ wide
        sums[name] = gram if name not in sums else sums[name].add_(gram)
        tokens[name] += rows.shape[0]

    each_input(model, layers, take, data, loss_fn)
    found = {}
    for name in layers:
        if tokens[name]:
            gram = sums.pop(name) / tokens[name]
            if not bool(gram.isfinite().all()):
                raise ScoreError(f"an input of {name} is NaN or infinite")
            found[name if input_dim(layers[name]) == 1 else name + IN_OUT] = gram.float()
    return _save(found, out, {"kind": "gram"})


def _save(found: dict[str, Tensor], out: str | os.PathLike[str], about: dict[str, str]) -> Path:
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ScoreError(f"what was measured for {name} is NaN or infinite")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(
            {n: t.cpu().contiguous() for n, t in found.items()}, part, {"format": "pt"} | about
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
