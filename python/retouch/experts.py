"""Which expert a new task goes to: the decision rule of PAR (arXiv 2304.05288, the released code)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retouch.errors import HyperparameterError, ShapeError

__all__ = ["Decision", "choose_expert", "task_distance"]


@dataclass(frozen=True)
class Decision:
    """What becomes of a new task.

    Attributes:
        action: "head": reuse an expert and train a new head alone; "tune": reuse it and train it too,
            with distillation on the heads it has; "copy": a new expert of the same architecture;
            "search": a new expert of a new architecture.
        expert: Number of the nearest expert, for "head", "tune" and "copy".
        distance: To that expert; infinite if there is none.
    """

    action: Literal["head", "tune", "copy", "search"]
    expert: int | None
    distance: float


def task_distance(features: Tensor, labels: Tensor, prototypes: Tensor) -> float:
    """How far a task is from an older one, in [0, 1], from the features of a frozen extractor.

    For each class c of the new task ``d_c = max(0, mean log(out / in))``, with the distance `in` of a
    sample to the mean of its class and `out` to the nearest old prototype; with their sum D it is
    ``min(1 - exp(-2 D), D)``, and 1 where that is 0, as in the released code: so the same task again is
    far. A class of a single sample has `in` = 0 and makes it 1 as well.

    Args:
        features: [samples, width] of the new task.
        labels: [samples] integers.
        prototypes: [classes, width], the mean features of the classes of the old task.

    Raises:
        ShapeError: Shapes that do not fit together, or nothing in them.
        HyperparameterError: A value that is not finite.
    """
    if (
        features.dim() != 2 or prototypes.dim() != 2 or labels.shape != features.shape[:1]
        or features.shape[1] != prototypes.shape[1] or 0 in (len(features), len(prototypes))
    ):  # fmt: skip
        raise ShapeError(
            f"features {tuple(features.shape)}, labels {tuple(labels.shape)}, prototypes "
            f"{tuple(prototypes.shape)}; wanted [n, d], [n] and [c, d], with n and c > 0"
        )
    x, old = features.detach().to(torch.float64), prototypes.detach().to(torch.float64)
    for name, values in (("features", x), ("prototypes", old)):
        if not bool(torch.isfinite(values).all()):
            raise HyperparameterError(f"{name} hold a value that is not finite")
    total = 0.0
    for label in labels.unique():
        mine = x[labels == label]
        near = torch.linalg.vector_norm(mine - mine.mean(0), dim=1)
        far = (mine[:, None] - old).square().sum(-1).sqrt().min(1).values
        # both 0: the sample is the prototype and its class, no nearer to the one than to the other
        ratio = torch.where((near == 0) & (far == 0), 1.0, far / near)
        total += max(0.0, float(ratio.log().mean()))
    distance = min(1.0 - float(torch.tensor(-2.0 * total, dtype=torch.float64).exp()), total)
    return distance if distance != 0 else 1.0


def choose_expert(
    distances: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    samples: int,
    *,
    over: Literal["mean", "max", "min"] = "mean",
    reuse: float = 0.5,
    copy: float = 0.75,
    few: int = 25,
) -> Decision:
    """Which expert learns a new task, and how.

    The nearest expert is reused up to a distance of `reuse`, copied in its architecture up to `copy`.
    An expert that is reused is trained itself unless the new task has less than half as many samples as
    the largest of its tasks. A task of at most `few` samples always goes to the nearest of the experts
    that have seen a task at least ten times as large, if there is one.

    Args:
        distances: For each expert the `task_distance` to each of its tasks.
        sizes: For each expert the numbers of training samples of its tasks.
        samples: Of the new task.
        over: How distances to tasks make the distance to an expert.
        reuse: See above.
        copy: See above.
        few: See above.

    Raises:
        ShapeError: Distances and sizes that do not belong together, or an expert without tasks.
        HyperparameterError: Another word for `over`.
    """
    if over not in ("mean", "max", "min"):
        raise HyperparameterError(f"over={over!r}; wanted mean, max or min")
    if [len(d) for d in distances] != [len(s) for s in sizes] or any(not d for d in distances):
        raise ShapeError(
            f"{[len(d) for d in distances]} distances and {[len(s) for s in sizes]} sizes of "
            "experts; wanted one of each for every task, and a task for every expert"
        )
    to = [
        sum(d) / len(d) if over == "mean" else (max if over == "max" else min)(d) for d in distances
    ]
    if samples <= few:
        large = [i for i, s in enumerate(sizes) if max(s) >= 10 * samples]
        if large:
            best = min(large, key=lambda i: to[i])
            return Decision("head", best, to[best])
    if not to:
        return Decision("search", None, float("inf"))
    best = min(range(len(to)), key=lambda i: to[i])
    if to[best] <= reuse:
        return Decision("head" if 2 * samples < max(sizes[best]) else "tune", best, to[best])
    if to[best] <= copy:
        return Decision("copy", best, to[best])
    return Decision("search", None, to[best])
