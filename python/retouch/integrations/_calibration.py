"""Batches and a loss for data-driven scores, borrowed from a Trainer without disturbing its run."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from retouch.errors import HyperparameterError

Batch = Mapping[str, Any]

# Running sums that TRL trainers update inside `compute_loss`.
_COUNTERS = ("_metrics", "_total_train_tokens")


@contextlib.contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Puts back, on exit, what a look at the data and the loss moves in a trainer.

    That is: the metrics that TRL sums inside ``compute_loss``, and the list of loaders that
    Accelerate keeps. (`retouch.select` itself puts back the random states and the model.)
    """
    counters = {k: copy.deepcopy(vars(trainer)[k]) for k in _COUNTERS if k in vars(trainer)}
    loaders: list[Any] = getattr(trainer.accelerator, "_dataloaders", [])
    known = len(loaders)
    try:
        yield
    finally:
        vars(trainer).update(counters)
        del loaders[known:]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of the data set, not collated: opaque to scores, which count and cut batches."""

    content: Any


class TrainingSamples:
    """The training data as the trainer samples them, in lists of samples.

    Collating is left to the loss: only the collator knows which rows of a batch belong to one
    sample (a preference pair has two). The loader is rebuilt without Accelerate's wrapper, since an
    iteration of that wrapper which stops early stays registered as the active loader of the run.

    Args:
        trainer: The trainer whose ``train_dataset`` is read, when a score asks for data.

    Raises:
        HyperparameterError: The trainer generates its batches during training, so there are none.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._collate: Callable[[list[Any]], Batch] | None = None

    def __iter__(self) -> Iterator[list[Sample] | Batch]:
        if makes_its_own_batches(self._trainer):
            raise HyperparameterError(
                f"{type(self._trainer).__name__} generates its batches while it trains, so a score "
                "that needs data cannot use them: pass data= (batches with labels) to "
                "retouch.attach, or choose a score that needs no data, such as magnitude"
            )
        loader = self._trainer.get_train_dataloader()
        if not isinstance(loader, DataLoader):  # of the user's own making
            return iter(loader)
        self._collate = loader.collate_fn
        options: dict[str, Any] = {"collate_fn": _samples}
        if isinstance(loader.dataset, IterableDataset):
            options["batch_size"] = loader.batch_size
        else:
            sampler: Any = loader.batch_sampler
            while hasattr(sampler, "batch_sampler"):  # Accelerate's share of this process
                sampler = sampler.batch_sampler
            options["batch_sampler"] = sampler
        return iter(DataLoader(loader.dataset, **options))

    def collate(self, batch: list[Sample] | Batch) -> Batch:
        """What the trainer would make of these samples."""
        if isinstance(batch, list):
            assert self._collate is not None
            return self._collate([sample.content for sample in batch])
        return batch


def _samples(contents: list[Any]) -> list[Sample]:
    return [Sample(content) for content in contents]


def makes_its_own_batches(trainer: Trainer) -> bool:
    """Whether the training data are only prompts, and the batches come from generation (GRPO)."""
    return hasattr(trainer, "_buffered_inputs")


def data_and_loss(trainer: Trainer, data: Iterable[Batch] | None) -> tuple[Iterable[Any], Any]:
    """What `retouch.select` needs to take gradients as the run itself will take them.

    Args:
        trainer: Supplies the loss (``compute_loss``, under the run's autocast), the device
            placement, and the data where ``data`` is None.
        data: Collated batches (a ``DataLoader``, a list); None for the training data.

    Returns:
        The batches, and the loss of a model on one of them; None as the loss means the model's
        own ``loss``.
    """
    samples = TrainingSamples(trainer)
    if makes_its_own_batches(trainer):
        return samples if data is None else data, None

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        # compute_loss may take the labels out of its dict
        inputs = dict(trainer._prepare_inputs(dict(samples.collate(batch))))
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            value = trainer.compute_loss(model, inputs)
        assert isinstance(value, torch.Tensor)
        return value

    return samples if data is None else data, loss
