"""Batches and a loss for data-driven scores, borrowed from a Trainer without disturbing its run."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from retouch.errors import HyperparameterError

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], torch.Tensor]

# Running sums that TRL trainers update inside `compute_loss`.
_COUNTERS = ("_metrics", "_total_train_tokens")


@contextlib.contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Put back, on exit, whatever a look at the data may move.

    That is: the random states of Python, numpy and torch (the order of the training data, dropout
    and masking collators draw from them), the metrics that TRL sums inside ``compute_loss``, and
    the list of loaders that Accelerate keeps.
    """
    python, numpy = random.getstate(), np.random.get_state()
    counters = {k: copy.deepcopy(vars(trainer)[k]) for k in _COUNTERS if k in vars(trainer)}
    loaders: list[Any] = getattr(trainer.accelerator, "_dataloaders", [])
    known = len(loaders)
    device = trainer.args.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        vars(trainer).update(counters)
        del loaders[known:]


class TrainBatches:
    """The batches of the first epoch, as the trainer's collator makes them.

    The loader is rebuilt without Accelerate's wrapper: an iteration of that wrapper which stops
    early stays registered as the active loader of the run. Every iteration starts anew.

    Args:
        trainer: The trainer whose ``train_dataset`` is read, when a score asks for data.

    Raises:
        HyperparameterError: The trainer generates its batches during training, so there are none.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Batch]:
        if makes_its_own_batches(self._trainer):
            raise HyperparameterError(
                f"{type(self._trainer).__name__} generates its batches while it trains, so a score "
                "that needs data cannot use them: pass data= (batches with labels) to "
                "retouch.attach, or choose a score that needs no data, such as magnitude"
            )
        loader = self._trainer.get_train_dataloader()
        dataset = getattr(loader, "dataset", None)
        if dataset is None:  # a loader of the user's own making
            return iter(loader)
        if isinstance(dataset, IterableDataset):
            plain: DataLoader[Any] = DataLoader(
                dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn
            )
        else:
            plain = DataLoader(
                dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn
            )
        return iter(plain)


def makes_its_own_batches(trainer: Trainer) -> bool:
    """Whether the training data are only prompts, and the batches come from generation (GRPO)."""
    return hasattr(trainer, "_buffered_inputs")


def batches_and_loss(
    trainer: Trainer, data: Iterable[Batch] | None
) -> tuple[Iterable[Batch], Loss | None]:
    """What `retouch.select` needs to take gradients as the run itself will take them.

    Args:
        trainer: Supplies the loss (``compute_loss``, under the run's autocast), the device
            placement, and the data where ``data`` is None.
        data: Collated batches (a ``DataLoader``, a list); None for the training data.

    Returns:
        The batches, and the loss of a model on one of them; None as the loss means the model's
        own ``loss``.
    """
    batches = TrainBatches(trainer) if data is None else data
    if makes_its_own_batches(trainer):
        return batches, None

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs = dict(trainer._prepare_inputs(dict(batch)))  # compute_loss may pop the labels
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            value = trainer.compute_loss(model, inputs)
        assert isinstance(value, torch.Tensor)
        return value

    return batches, loss
