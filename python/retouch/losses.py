"""Losses that choose what they learn from: pairs of a batch (beta-DPO), tokens (OVERTONE).

A mask says which weights may move; these say which samples and tokens move them. They know nothing of
a trainer: `Overtone` is a ``compute_loss_func`` of the Hugging Face `Trainer`, and `BetaDPO` chooses
pairs and beta for a `trl.DPOTrainer`, see there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retouch import ops
from retouch.errors import HyperparameterError, ScoreError, ShapeError

__all__ = ["BetaDPO", "Overtone", "pairs", "sequence_log_probs"]


@dataclass
class BetaDPO:
    """Which pairs of a batch DPO learns from, and with which beta (arXiv 2407.08639).

    The *gap* of a pair is how much more the policy prefers the chosen answer than the reference does:
    ``(logp - ref_logp)(chosen) - (logp - ref_logp)(rejected)``, without beta, as in the released code
    (the paper's reward gap has beta in it, so `a` does not carry over between the two). Running mean
    and deviation of the gaps take the batch in first; then `floor(B * (1 - mode_weight))` of B pairs
    are drawn without replacement, each with a weight of ``exp(-((gap - mean) / std)**2 / 2)``, and
    beta is ``max(beta * (1 + a * (mean of the kept - mean)), 1e-3)``.

    Draws depend on the seed and the number of the batch alone. They are made in logarithms, where the
    weight of an outlier cannot become 0, as it does in the released code, which then fails. With
    ``a=0, mode_weight=0`` this is DPO.

    In a `trl.DPOTrainer`::

        class BetaDPOTrainer(DPOTrainer):
            choose = losses.BetaDPO()

            def compute_loss(self, model, inputs, *args, **kwargs):
                if model.training:
                    ours = self.compute_ref_log_probs(model, inputs)  # without a graph
                    theirs = self.compute_ref_log_probs(self.ref_model, inputs)
                    gaps = (ours[0] - theirs[0]) - (ours[1] - theirs[1])
                    kept, self.beta = self.choose(gaps)
                    inputs = losses.pairs(inputs, kept)
                return super().compute_loss(model, inputs, *args, **kwargs)

    With several processes give the gathered gaps to each, and take the kept ones that are its own.

    Attributes:
        beta: Of DPO.
        a: How far beta follows the gaps.
        mode_weight: The share of pairs that is left out.
        memory: Share of the old mean and deviation that stays.
        seed: Of the draws.
        mean: Running mean of the gaps. It starts at 0, without a correction, as in the released code,
            so the first betas are too large; give what a run has settled at.
        std: Running deviation (of a sample, n - 1), likewise.
        taken: Batches so far.

    Raises:
        HyperparameterError: A number out of its range.
    """

    beta: float = 0.1
    a: float = 0.6
    mode_weight: float = 0.2
    memory: float = 0.9
    seed: int = 0
    mean: float = 0.0
    std: float = 0.0
    taken: int = 0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("beta", self.beta, 0, math.inf), ("mode_weight", self.mode_weight, 0, 1),
            ("memory", self.memory, 0, 1), ("std", self.std, 0, math.inf),
        ):  # fmt: skip
            if not least <= value <= most:
                raise HyperparameterError(f"{name} must be in [{least}, {most}], got {value}")
        if self.mode_weight == 1:
            raise HyperparameterError("mode_weight=1 leaves no pair")

    def log_weights(self, gaps: Tensor) -> Tensor:
        """Logarithms of the weights with which pairs are drawn, float64 on the CPU, [B]."""
        away = gaps.detach().double().cpu().reshape(-1) - self.mean
        return -0.5 * (away / max(self.std, 1e-300)).square()

    def __call__(self, gaps: Tensor) -> tuple[Tensor, float]:
        """Takes a batch in and chooses.

        Args:
            gaps: [B], at least two.

        Returns:
            int64 positions of the kept pairs, ascending, on the device of the gaps; and beta.

        Raises:
            ShapeError: Fewer than two gaps.
            ScoreError: A gap that is NaN.
        """
        values = gaps.detach().double().cpu().reshape(-1)
        count = values.numel()
        if count < 2:
            raise ShapeError(f"a deviation needs at least two pairs in a batch, got {count}")
        if bool(torch.isnan(values).any()):
            raise ScoreError("a gap of beta-DPO is NaN")
        new = 1 - self.memory
        self.mean = self.memory * self.mean + new * float(values.mean())
        self.std = self.memory * self.std + new * float(values.std())
        self.taken += 1
        keep = max(1, math.floor(count * (1 - Fraction(str(self.mode_weight)))))
        noise = ops.uniform((count,), self.seed, f"beta-DPO batch {self.taken}", "cpu").double()
        # The first k by log weight + Gumbel noise are k draws without replacement.
        keys = self.log_weights(gaps) - torch.log(-torch.log(noise.clamp(1e-12)))
        (kept,) = ops.topk([keys.clamp(min=-1e300)], ["the keys of beta-DPO"], keep)
        kept = kept.long()
        follows = 1 + self.a * (float(values[kept].mean()) - self.mean)
        return kept.to(gaps.device), max(self.beta * follows, 1e-3)

    def loss(self, gaps: Tensor) -> Tensor:
        """The loss of a batch in a loop of your own: the mean over the kept pairs, with a graph."""
        kept, beta = self(gaps)
        return -functional.logsigmoid(beta * gaps.reshape(-1)[kept]).mean()

    def state_dict(self) -> dict[str, Any]:
        """What changes, to go on exactly."""
        return {"mean": self.mean, "std": self.std, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.mean, self.std = float(state["mean"]), float(state["std"])
        self.taken = int(state["taken"])


def pairs(inputs: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """The kept pairs of a batch of TRL's, whose rows are all chosen answers and then all rejected.

    Args:
        inputs: Tensors [2B, ...] by rows, or [B] with one item for each pair; others stay as they are.
        kept: Positions of pairs, [k].

    Returns:
        The same with [2k, ...] and [k].
    """
    count = int(inputs["input_ids"].shape[0])
    made: dict[str, Any] = {}
    for key, item in inputs.items():
        made[key] = item
        if isinstance(item, Tensor) and item.dim() and item.shape[0] in (count, count // 2):
            index = kept.to(item.device)
            both = torch.cat([index, index + count // 2])
            made[key] = item[both if item.shape[0] == count else index]
    return made


def sequence_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each row's labels under a causal model.

    Args:
        logits: [rows, length, vocabulary], any float dtype; summed in float32.
        labels: [rows, length], as the inputs; -100 does not count.

    Returns:
        [rows], float32.
    """
    targets = labels[:, 1:]
    counts = targets != -100
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
    chosen = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * counts).sum(-1)


@dataclass(frozen=True)
class Overtone:
    """Cross entropy with smoothed targets that leaves learned tokens alone (OVERTONE, 2502.00602).

    The target of a token is ``weight * onehot + (1 - weight) * filtered``, where *filtered* is the
    model's own distribution (without a gradient) on the logits that are at least ``max - n * std``;
    if the label would not be the likeliest then, the target is the label alone. The loss of a token is
    ``max(KL(target, model), floor)``, so one below `floor` has no gradient; the mean is over the
    labels that are not -100. No code and no full text was at hand: the form and the defaults are from
    memory. With ``weight=1, floor=0`` this is cross entropy.

    A ``compute_loss_func`` for `transformers.Trainer`; for `trl.SFTTrainer`, which is about to drop that
    argument, call it in ``compute_loss`` of a subclass.

    Attributes:
        weight: Of the label, in [0, 1].
        floor: The least loss of a token.
        n: How many deviations (of all logits of a token, as a population, in float32) below the largest
            logit still count.

    Raises:
        HyperparameterError: A number out of its range.
    """

    weight: float = 0.1
    floor: float = 0.05
    n: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.weight <= 1 and self.floor >= 0 and self.n >= 0):
            raise HyperparameterError(
                f"wanted weight in [0, 1], floor and n at least 0; got weight={self.weight}, "
                f"floor={self.floor}, n={self.n}"
            )

    def targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The smoothed targets.

        Args:
            logits: [tokens, vocabulary].
            labels: [tokens], none of them -100.

        Returns:
            [tokens, vocabulary], float32, without a graph.
        """
        with torch.no_grad():
            z = logits.detach().float()
            bound = z.max(-1, keepdim=True).values - self.n * z.std(-1, correction=0, keepdim=True)
            filtered = torch.softmax(z.masked_fill(z < bound, -math.inf), -1)
            onehot = functional.one_hot(labels, z.shape[-1]).to(z.dtype)
            mixed = self.weight * onehot + (1 - self.weight) * filtered
            best = mixed.argmax(-1, keepdim=True) == labels.unsqueeze(-1)
            return torch.where(best, mixed, onehot)

    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each token, [tokens], float32; arguments as of `targets`."""
        target = self.targets(logits, labels)
        log_probs = torch.log_softmax(logits.float(), -1)
        # 0 * log 0 is 0, also where the target is 0 and the model's probability is as well
        terms = torch.xlogy(target, target) - torch.where(target > 0, target * log_probs, 0.0)
        return terms.sum(-1).clamp(min=self.floor)

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch of a causal language model.

        Args:
            outputs: With `logits` [rows, length, vocabulary], an object or a mapping; or the logits.
            labels: [rows, length], as the inputs; -100 does not count.
            num_items_in_batch: Divide by this instead of the number of labels, as the Trainer asks
                with accumulation.
        """
        logits = outputs
        if not isinstance(logits, Tensor):
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        targets = labels[:, 1:].to(logits.device)
        counts = targets != -100
        losses = self.tokens(logits[:, :-1][counts], targets[counts])
        total = losses.sum()
        return total / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
