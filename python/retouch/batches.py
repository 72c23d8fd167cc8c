"""Batches of any common form: how many samples they hold, parts of them, moving them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from retouch.errors import ScoreError

__all__ = ["Batches", "samples_in", "single_samples", "to_device"]


class Batches:
    """The batches of some data, from the start at each iteration.

    Args:
        data: A `DataLoader` or another iterable of batches, or one batch: a mapping (for
            ``model(**batch)``), a tuple whose first item is a tensor (``model(*batch)``), or a
            tensor. A list is a list of batches; a list or tuple without any tensor that comes as a
            batch is one sample per item, for a loss function that collates.
        samples: Stop after so many samples; the last batch is cut.
        max_batches: Stop after so many batches.

    Raises:
        ScoreError: The data are none of that.
    """

    def __init__(
        self, data: Any, *, samples: int | None = None, max_batches: int | None = None
    ) -> None:
        one = isinstance(data, Mapping | Tensor) or hasattr(data, "keys")
        if one or (isinstance(data, tuple) and data and isinstance(data[0], Tensor)):
            data = [data]
        if not isinstance(data, Iterable) or isinstance(data, str | bytes):
            raise ScoreError(
                f"data: got {type(data).__name__}, wanted batches (a DataLoader, a list) or a batch"
            )
        self._data = data
        self._samples = samples
        self._max_batches = max_batches

    def __iter__(self) -> Iterator[Any]:
        left = self._samples
        if left == 0 or self._max_batches == 0:
            return
        for i, batch in enumerate(self._data):
            if left is not None:
                size = samples_in(batch)
                if size > left:
                    batch = _part(batch, 0, left, size)
                left -= min(size, left)
            yield batch
            # before the next batch is asked for: making it may cost, or move a random state
            if left == 0 or (self._max_batches is not None and i + 1 >= self._max_batches):
                return


def _items(batch: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(batch, Tensor):
        yield "the batch", batch
    elif hasattr(batch, "items"):
        yield from batch.items()
    elif isinstance(batch, list | tuple):
        yield from enumerate(batch)
    else:
        raise ScoreError(
            f"a batch is a {type(batch).__name__}; wanted a mapping, a tuple or list, or a tensor"
        )


def samples_in(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor, or of a list without any.

    Raises:
        ScoreError: Neither.
    """
    for _, item in _items(batch):
        if isinstance(item, Tensor) and item.dim():
            return item.shape[0]
    if isinstance(batch, list | tuple) and batch:
        return len(batch)
    raise ScoreError(
        "a batch holds no tensor with a dimension for samples; collate the data first, for example "
        'with a DataLoader, or with dataset.with_format("torch")'
    )


def single_samples(batch: Any) -> Iterator[Any]:
    """The samples of a batch as batches of one.

    Tensors and lists as long as the batch are cut; numbers and tensors of length 1 go to each.

    Raises:
        ScoreError: Its tensors have different lengths.
    """
    size = samples_in(batch)
    if size == 1:
        yield batch
        return
    for i in range(size):
        yield _part(batch, i, i + 1, size)


def _part(batch: Any, start: int, stop: int, size: int) -> Any:
    if isinstance(batch, list | tuple) and not any(isinstance(x, Tensor) for x in batch):
        return batch[start:stop]
    parts = {key: _cut(key, item, start, stop, size) for key, item in _items(batch)}
    if isinstance(batch, Tensor):
        return parts["the batch"]
    return parts if hasattr(batch, "items") else type(batch)(parts.values())


def _cut(key: Any, item: Any, start: int, stop: int, size: int) -> Any:
    if isinstance(item, Tensor) and item.dim():
        if item.shape[0] == size:
            return item[start:stop]
        if item.shape[0] != 1:
            raise ScoreError(
                f"the batch cannot be split into samples: {key!r} has length {item.shape[0]}, the "
                f"batch {size}; use level='batch', or batches of one sample"
            )
    if isinstance(item, list | tuple) and len(item) == size:
        return item[start:stop]
    return item


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _items(batch)}
    return moved if hasattr(batch, "items") else type(batch)(moved.values())
