"""The lengths of a dataset's samples, read where they lie: a file of a billion of them is mapped, and not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distaccum.errors import UserError

_BLOCK = 2**20
"""Lengths that are looked at together: a few megabytes, whatever their number."""


class SampleLengths:
    """Lengths of all samples of a dataset, as int64 wherever they are asked for.

    An array of integers, of any size and mapped from a file or not, is used as it is; anything else is made an array
    of int64. The lengths are gone through once, in blocks.

    Args:
        given: whole numbers of at least 1, one for each sample.
        num_samples: samples of the dataset.
        name: what needs the lengths, for messages.

    Attributes:
        longest: the largest of them.

    Raises:
        UserError: the lengths can't be those of the dataset.
    """

    def __init__(self, given: Any, num_samples: int, name: str) -> None:
        self._stored = _whole_numbers(given, name)
        if self._stored.shape != (num_samples,):
            raise UserError(
                f"{name}: the dataset has {num_samples} samples, and its `lengths` have the shape "
                f"{tuple(self._stored.shape)}. It takes one number for each sample."
            )
        self.longest = 0
        for start, block in _blocks(self._stored):
            if block.min() < 1:
                place = int(block.argmin())
                raise UserError(
                    f"{name}: sample {start + place} has the length {int(block[place])}, and lengths are at least 1."
                )
            self.longest = max(self.longest, int(block.max()))

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, samples: ArrayLike) -> NDArray[np.int64]:
        """Returns the lengths of samples, given by their numbers; of one sample an array without dimensions."""
        return np.asarray(self._stored[samples]).astype(np.int64)  # type: ignore[index]

    def longest_samples(self, count: int) -> list[int]:
        """Returns the numbers of the longest samples, longest first."""
        return longest_samples(self._stored, count)


class EpochLengths(SampleLengths):
    """Lengths of samples that are others in each epoch: sample i of epoch e has the number e · num_samples + i.

    Args:
        of_epoch: returns the lengths of samples of an epoch, given the epoch and their numbers in it; at least 1 each.
        num_samples: samples of an epoch.
        longest: an upper bound of the lengths in all epochs.
    """

    def __init__(
        self, of_epoch: Callable[[int, NDArray[np.int64]], NDArray[np.int64]], num_samples: int, longest: int
    ) -> None:
        self._of_epoch = of_epoch
        self._num_samples = num_samples
        self.longest = longest

    def __len__(self) -> int:
        """Returns the number of samples of an epoch."""
        return self._num_samples

    def __getitem__(self, samples: ArrayLike | slice) -> NDArray[np.int64]:
        """Returns the lengths of samples, given by their numbers; a slice is one of the first epoch's."""
        if isinstance(samples, slice):
            samples = np.arange(*samples.indices(len(self)))
        epochs, numbers = np.divmod(np.asarray(samples, dtype=np.int64), self._num_samples)
        found = np.empty(epochs.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            places = epochs == epoch
            found[places] = self._of_epoch(epoch, numbers[places])
        return found

    def longest_samples(self, count: int) -> list[int]:
        """Returns the numbers of the longest samples of the first epoch, longest first."""
        return longest_samples(self, count)


def longest_samples(lengths: Sequence[int] | NDArray[Any] | EpochLengths, count: int) -> list[int]:
    """Returns the numbers of the longest samples, longest first, and of equals the first ones."""
    found, found_lengths = np.empty(0, np.int64), np.empty(0, np.int64)
    for start, block in _blocks(lengths):
        if len(found) == count and block.max() <= found_lengths[-1]:
            continue
        places = _largest(block, count)
        numbers = np.concatenate([found, start + places])
        own = np.concatenate([found_lengths, np.asarray(block[places]).astype(np.int64)])
        order = np.argsort(-own, kind="stable")[:count]
        found, found_lengths = numbers[order], own[order]
    return found.tolist()


def _largest(block: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Returns the places of the largest numbers in ascending order; of equals the first ones."""
    if len(block) <= count:
        return np.arange(len(block))
    least = np.partition(block, -count)[-count]
    above = np.flatnonzero(block > least)
    return np.sort(np.concatenate([above, np.flatnonzero(block == least)[: count - len(above)]]))


def _blocks(lengths: Sequence[int] | NDArray[Any] | EpochLengths) -> Iterator[tuple[int, NDArray[Any]]]:
    for start in range(0, len(lengths), _BLOCK):
        yield start, np.asarray(lengths[start : start + _BLOCK])


def _whole_numbers(given: Any, name: str) -> NDArray[Any]:
    """Returns lengths as an array of integers: the one that is given, if it is one that int64 can hold.

    Raises:
        UserError: they are no whole numbers.
    """
    is_whole = False
    try:
        array = np.asarray(given)
        if array.dtype.kind == "i" or (array.dtype.kind == "u" and array.dtype.itemsize < 8):
            return array
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        is_whole = np.array_equal(given, whole)
    except (TypeError, ValueError, OverflowError):
        pass
    if not is_whole:
        raise UserError(
            f"{name}: the dataset's `lengths` are not whole numbers, one for each sample: {str(given)[:80]}."
        )
    return whole
