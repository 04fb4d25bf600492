"""Finds the length of each sample of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from distaccum.errors import UserError
from distaccum.loaders.collate import is_numbers
from distaccum.loaders.options import lengths_unknown
from distaccum.runtime.cache import Remembered
from distaccum.runtime.logs import console
from distaccum.runtime.randomness import GlobalStates

logger = logging.getLogger(__name__)


_SAMPLES_TO_COMPARE = 16
"""Samples of a cached scan that are compared, to notice when the data has changed under the same name."""


def lengths_of(dataset: Any, remembered: Remembered | None = None) -> Any:
    """Returns the dataset's attribute `lengths`, or else loads every sample once, with a progress bar.

    The length of a sample is the largest first dimension of its tensors and arrays that have one, and of its lists of
    numbers. Loading leaves the global random
    generators as they were.

    Args:
        remembered: where the lengths of all samples are kept, so that they need to be loaded only once. Some samples
            are compared with it each time.

    Raises:
        UserError: a sample has no tensor with a first dimension, or samples depend on the epoch.
    """
    known = getattr(dataset, "lengths", None)
    if known is not None:
        return known
    if hasattr(dataset, "samples_of_epoch"):
        raise lengths_unknown(dataset)
    with GlobalStates.now():
        return _scanned(dataset, remembered)


def _scanned(dataset: Any, remembered: Remembered | None) -> NDArray[np.int64]:
    before = remembered.read() if remembered is not None else None
    count = len(dataset)
    if isinstance(before, list) and len(before) == count:
        some = np.linspace(0, count - 1, min(count, _SAMPLES_TO_COMPARE), dtype=np.int64).tolist()
        if all(_length(dataset[index], index) == before[index] for index in some):
            return np.array(before, dtype=np.int64)
        logger.info("lengths: samples are no longer as long as they were: all are loaded again")
    indices = track(range(count), "lengths of the samples", console=console, transient=True)
    lengths = [_length(dataset[index], index) for index in indices]
    if remembered is not None:
        remembered.write(lengths)
    return np.array(lengths, dtype=np.int64)


def _length(sample: Any, index: int) -> int:
    sizes = _sizes(sample)
    if not sizes:
        raise UserError(
            f"sample {index} has no tensor with a first dimension, so its length is not known. Give "
            "the dataset an attribute `lengths`, one number for each sample; or set batch=uniform."
        )
    return max(sizes)


def _sizes(value: Any, is_field: bool = False) -> list[int]:
    """Returns the sizes of first dimensions; a field that is a list of numbers will be a tensor."""
    if isinstance(value, Tensor | np.ndarray):
        return [len(value)] if value.ndim > 0 else []
    if is_field and is_numbers(value):
        return [len(value)]
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [size for entry in entries for size in _sizes(entry, is_field=True)]
