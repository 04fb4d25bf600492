"""Finds the length of each sample of a dataset."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.errors import UserError
from distaccum.loaders.collate import is_numbers
from distaccum.loaders.fetch import BatchSource, MicroBatches, Request
from distaccum.loaders.options import LoaderOptions, lengths_unknown
from distaccum.runtime.cache import Remembered
from distaccum.runtime.logs import console

logger = logging.getLogger(__name__)


_SAMPLES_TO_COMPARE = 16
"""Samples of a cached scan that are compared, to notice when the data has changed under the same name."""
_TOGETHER = 64
"""Samples that are loaded by one request."""
_SECONDS_ALONE = 2.0
"""Workers are started if loading all samples takes longer than this."""
_NONE = -1


def lengths_of(dataset: Any, remembered: Remembered | None = None) -> Any:
    """Returns a dataset's attribute `lengths`, or what its method `find_lengths()` returns, or loads every sample.

    The length of a sample is the largest first dimension of its tensors and arrays that have one, and of its lists of
    numbers. Loading leaves the global random generators as they were.

    Args:
        remembered: where the lengths of all samples are kept, so that they need to be loaded only once, and by one
            process of a host. Some samples are compared with it each time.

    Raises:
        UserError: a sample has no tensor with a first dimension, or samples depend on the epoch.
    """
    known = getattr(dataset, "lengths", None)
    if known is not None:
        return known
    if hasattr(dataset, "find_lengths"):
        return dataset.find_lengths()
    if hasattr(dataset, "samples_of_epoch"):
        raise lengths_unknown(dataset)
    if remembered is None:
        return _scanned(dataset)
    with remembered.held():
        before = remembered.read()
        if isinstance(before, list) and len(before) == len(dataset):
            if lengths_of_some(_ByNumber(dataset)) == [before[index] for index in _some(dataset)]:
                return np.array(before, dtype=np.int64)
            logger.info("lengths: samples are no longer as long as they were: all are loaded again")
        lengths = _scanned(dataset)
        remembered.write(lengths.tolist())
    return lengths


def lengths_of_some(dataset: Any) -> list[int]:
    """Returns the lengths of a few samples, spread over the dataset."""
    request = Request(0, _some(dataset))
    return _checked(_fetcher(dataset)[request], request).tolist()  # type: ignore[no-any-return]


def measured(dataset: Any) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Yields the lengths of all samples of a dataset, of some that follow each other at a time, with the first number.

    Samples are loaded with random numbers of their own (see `MicroBatches`), so that each process finds the same
    lengths: in this process, and if that takes longer than two seconds, by as many workers as there are processors.

    Raises:
        UserError: a sample can't be loaded, or has no tensor with a first dimension.
    """
    count, fetcher, first = len(dataset), _fetcher(dataset), 0
    began = time.monotonic()
    while first < count and time.monotonic() - began < _SECONDS_ALONE:
        request = Request(0, list(range(first, min(first + _TOGETHER, count))))
        yield first, _checked(fetcher[request], request)
        first = request.indices[-1] + 1
    if first == count:
        return
    workers = len(os.sched_getaffinity(0))
    source = BatchSource(fetcher, LoaderOptions(num_workers=workers))
    found = source.batches(lambda: _by_worker(first, count, workers))
    with Progress(console=console, transient=True) as progress:
        shown = progress.add_task("lengths of the samples", total=count, completed=first)
        for request, lengths in zip(_by_worker(first, count, workers), found, strict=True):
            yield request.indices[0], _checked(lengths, request)
            progress.update(shown, advance=len(request.indices))


def _scanned(dataset: Any) -> NDArray[np.int64]:
    lengths = np.empty(len(dataset), np.int64)
    for first, part in measured(_ByNumber(dataset)):
        lengths[first : first + len(part)] = part
    return lengths


def _by_worker(first: int, count: int, workers: int) -> Iterator[Request]:
    """Yields requests as a DataLoader deals them out in turn: each worker gets samples that follow each other."""
    bounds = np.linspace(first, count, workers + 1).astype(np.int64).tolist()
    spans = [range(start, stop) for start, stop in pairwise(bounds)]
    for start in range(0, max(map(len, spans)), _TOGETHER):
        for span in spans:
            if part := span[start : start + _TOGETHER]:
                yield Request(0, list(part))


class _ByNumber(Dataset[Any]):
    """Asks a dataset of the user's for its samples one by one: what one call for several returns may be anything."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


def _fetcher(dataset: Any) -> MicroBatches:
    return MicroBatches(dataset, _lengths, "training", seed=0)


def _lengths(samples: Sequence[Any]) -> list[int]:
    return [max(_sizes(sample), default=_NONE) for sample in samples]


def _checked(found: list[int] | UserError, request: Request) -> NDArray[np.int32]:
    if isinstance(found, UserError):
        raise found
    if _NONE in found:
        raise UserError(
            f"sample {request.indices[found.index(_NONE)]} has no tensor with a first dimension, so its length is not "
            "known. Give the dataset an attribute `lengths`, one number for each sample; or set batch=uniform."
        )
    return np.array(found, np.int32)


def _some(dataset: Any) -> list[int]:
    count = len(dataset)
    return np.linspace(0, count - 1, min(count, _SAMPLES_TO_COMPARE), dtype=np.int64).tolist()  # type: ignore[no-any-return]


def _sizes(value: Any, is_field: bool = False) -> list[int]:
    """Returns the sizes of first dimensions; a field that is a list of numbers will be a tensor."""
    if isinstance(value, Tensor | np.ndarray):
        return [len(value)] if value.ndim > 0 else []
    if is_field and is_numbers(value):
        return [len(value)]
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [size for entry in entries for size in _sizes(entry, is_field=True)]
