"""Scores from what goes into linear layers, without gradients."""

import warnings
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
        handles = []

        def watch(name: str, module: nn.Module) -> None:
            def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                features = (args[0] if args else kwargs["input"]).detach()
                rows = features.reshape(-1, features.shape[-1]).to(torch.float32)
                sums[name] += rows.square().sum(0, dtype=torch.float64)
                tokens[name] += rows.shape[0]

            handles.append(module.register_forward_pre_hook(take, with_kwargs=True))

        with kept(model), torch.no_grad():
            try:
                for name, candidate in eligible.items():
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
        if not any(tokens.values()):
            raise ScoreError("the data hold no batch, or no eligible layer was called")
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
    module = candidate.module
    if (
        candidate.kind not in ("linear", "head", "output")
        or candidate.column_dims is None
        or candidate.param.dim() != 2
        or isinstance(module, nn.MultiheadAttention)  # its projections are no modules
    ):
        raise HyperparameterError(
            f"{candidate.name} is not the weight of a linear layer, and scores of activations are "
            "for these alone: leave it out of target_modules, or train it whole"
        )
    return candidate.column_dims[0]


def _zeros(candidate: Candidate) -> Tensor:
    size = candidate.shape[_columns(candidate)]
    return torch.zeros(size, dtype=torch.float64, device=candidate.param.device)
