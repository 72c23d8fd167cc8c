"""Scores from what goes into linear layers, without gradients."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retouch.batches import Batches, to_device
from retouch.eligible import Candidate, own_parameters
from retouch.errors import HyperparameterError, ScoreError
from retouch.names import register_score as register
from retouch.passes import Eligible, LossFn, kept, outputs_of
from retouch.scores.base import Score


def each_input(
    model: nn.Module,
    layers: Eligible,
    take: Callable[[str, Tensor], None],
    data: Any,
    loss_fn: LossFn | None = None,
) -> None:
    """Hands the inputs of linear layers to `take`, one batch after the other, in evaluation mode.

    Args:
        model: The model; left as it was.
        layers: Weights of linear layers, by name; of tied ones every use counts.
        take: Gets the name and the inputs, [tokens, features].
        data: Batches, see `retouch.batches.Batches`.
        loss_fn: Called in place of the model, for the forward pass that it makes.

    Raises:
        ScoreError: No layer was called.
    """
    handles, called = [], False

    def watch(name: str, module: nn.Module) -> None:
        def hand_over(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal called
            features = (args[0] if args else kwargs["input"]).detach()
            rows = features.reshape(-1, features.shape[-1])
            called |= rows.shape[0] > 0
            take(name, rows)

        handles.append(module.register_forward_pre_hook(hand_over, with_kwargs=True))

    with kept(model), torch.no_grad():
        try:
            for name, candidate in layers.items():
                for alias in candidate.aliases:
                    watch(name, model.get_submodule(alias.rpartition(".")[0]))
            model.eval()
            device = next((p.device for _, p in own_parameters(model)), torch.device("cpu"))
            for batch in data if isinstance(data, Batches) else Batches(data):
                batch = to_device(batch, device)
                _ = outputs_of(model, batch) if loss_fn is None else loss_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    if not called:
        raise ScoreError("the data hold no batch, or no eligible layer was called")


def input_dim(candidate: Candidate) -> int | None:
    """The dimension of the input features of the weight of a linear layer; None if it is none."""
    if (
        candidate.kind not in ("linear", "head", "output")
        or candidate.column_dims is None
        or candidate.param.dim() != 2
        or isinstance(candidate.module, nn.MultiheadAttention)  # its projections are no modules
    ):
        return None
    return candidate.column_dims[0]


@register("activation")
@dataclass(frozen=True)
class Activation(Score):
    """A statistic of each input feature of a linear layer, the same for all of its weights.

    Taken over all tokens of all samples in evaluation mode; padding counts as any other token, so
    leave it out. One forward pass of the data; the memory is that of the statistics, one number
    for each input feature.

    Attributes:
        statistic: "norm" is the square root of the sum of squares, "mean_square" their mean.

    Raises:
        HyperparameterError: Another statistic.
    """

    needs_data: ClassVar[bool] = True
    statistic: Literal["norm", "mean_square"] = "norm"

    def __post_init__(self) -> None:
        if self.statistic not in ("norm", "mean_square"):
            raise HyperparameterError(
                f"{type(self).__name__}: statistic={self.statistic!r}; wanted norm or mean_square"
            )

    def __call__(
        self,
        model: nn.Module,
        eligible: Eligible,
        data: Any = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, Tensor]:
        """See `Score`; a `loss_fn` is called for the forward pass that it makes.

        Raises:
            HyperparameterError: A parameter is not the weight of a linear layer.
            ScoreError: No data, or an input that is NaN or infinite.
        """
        if data is None:
            raise ScoreError(f"the score {self!r} needs data: pass data= (batches)")
        sums = {n: _zeros(c) for n, c in eligible.items()}
        tokens = dict.fromkeys(eligible, 0)

        def take(name: str, rows: Tensor) -> None:
            wide = rows.to(torch.float32)
            sums[name] += wide.square().sum(0, dtype=torch.float64)
            tokens[name] += rows.shape[0]

        each_input(model, eligible, take, data, loss_fn)
        return {n: self._score(c, sums[n], tokens[n]) for n, c in eligible.items()}

    def _score(self, candidate: Candidate, sums: Tensor, tokens: int) -> Tensor:
        if not tokens:
            warnings.warn(f"no input reached {candidate.name}, whose score is 0", stacklevel=4)
        if not bool(torch.isfinite(sums).all()):
            raise ScoreError(f"an input of {candidate.name} is NaN or infinite")
        one = sums.sqrt() if self.statistic == "norm" else sums / max(tokens, 1)
        shape = [1, 1]
        shape[_columns(candidate)] = -1
        return one.to(torch.float32).reshape(shape).expand(candidate.shape)


@register("wanda")
@dataclass(frozen=True)
class Wanda(Activation):
    """|weight| times a statistic of its input feature.

    Wanda (arXiv 2306.11695) with the norm of the inputs. With ``aggregate="sum"`` it is the column
    score of the paper of SSU (arXiv 2512.04844); with ``statistic="mean_square"`` and
    ``aggregate="l2"`` that of its code.
    """

    def _score(self, candidate: Candidate, sums: Tensor, tokens: int) -> Tensor:
        inputs = super()._score(candidate, sums, tokens)
        return candidate.param.detach().to(torch.float32).abs() * inputs


def _columns(candidate: Candidate) -> int:
    """The dimension of the input features of a linear layer."""
    found = input_dim(candidate)
    if found is None:
        raise HyperparameterError(
            f"{candidate.name} is not the weight of a linear layer, and scores of activations are "
            "for these alone: leave it out of target_modules, or train it whole"
        )
    return found


def _zeros(candidate: Candidate) -> Tensor:
    size = candidate.shape[_columns(candidate)]
    return torch.zeros(size, dtype=torch.float64, device=candidate.param.device)
