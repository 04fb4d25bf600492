"""One update's samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Window:
    """One update's samples, as far as they are this rank's: iterate over it once for its micro-batches.

    Attributes:
        epoch: number of the epoch, from 0.
        index: number of the window in its epoch, from 0.
        number: number of the window over all epochs, from 0.
        num_samples: samples of the window over all ranks.
        equal_micro_steps: every rank has the same number of micro-batches.
        is_by_length: samples of like length share a micro-batch, so that micro-batches are no random samples.
        sizes: samples of each of this rank's micro-batches. Size 0 is a placeholder: a micro-batch made of the
            window's first sample, which counts nothing and is there because the other ranks wait for this one in
            their collectives.
    """

    def __init__(
        self,
        *,
        epoch: int,
        index: int,
        number: int,
        num_samples: int,
        sizes: tuple[int, ...],
        batches: Iterator[Any],
        sample_indices: Callable[[], list[list[int]]],
        equal_micro_steps: bool = False,
        is_by_length: bool = False,
    ) -> None:
        self.epoch = epoch
        self.index = index
        self.number = number
        self.num_samples = num_samples
        self.sizes = sizes
        self.equal_micro_steps = equal_micro_steps
        self.is_by_length = is_by_length
        self._batches = batches
        self._left = len(sizes)
        self._sample_indices = sample_indices

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        while self._left:
            self._left -= 1
            yield next(self._batches)

    @property
    def sample_indices(self) -> list[list[int]]:
        """Dataset indices of each micro-batch; empty for placeholders."""
        return self._sample_indices()

    def skip_rest(self) -> None:
        """Passes over the micro-batches that nobody has asked for, so that the next window starts at its own."""
        for _ in self:
            pass
