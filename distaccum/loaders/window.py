"""One update's samples."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from distaccum.planning import CutSchedule
from distaccum.runtime.nested import tensors_of

_MOST_TOGETHER = 8
"""Micro-batches that are loaded at a time."""
_MOST_BYTES_TOGETHER = 2**16
"""Of them: what has to wait for its micro-step is to stay in the processor's caches."""


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
        cuts: the loader's, by which it can be cut anew when a micro-batch has not fitted into memory; None without one.
        load: loads micro-batches of given dataset indices to the device, exactly as they were in the window.
        done: the first so many micro-batches were taken in another process, and are left out of the iteration.

    Args:
        shown: returns the micro-batches as they are before their copy to the device.
        together: load small micro-batches several at a time. Loading and computing drive each other's code and data out
            of the processor's caches, which costs a tenth of the time of a micro-step of half a millisecond.
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
        cuts: CutSchedule | None = None,
        load: Callable[[Sequence[Sequence[int]]], Iterator[Any]] | None = None,
        shown: Callable[[], list[Any]] | None = None,
        together: bool = False,
        done: int = 0,
    ) -> None:
        self.epoch = epoch
        self.index = index
        self.number = number
        self.num_samples = num_samples
        self.sizes = sizes
        self.equal_micro_steps = equal_micro_steps
        self.is_by_length = cuts is not None and cuts.lengths is not None
        self.cuts = cuts
        self.load = load
        self._batches = batches
        self.done = done
        self._left = len(sizes) - done
        self._loaded: deque[Any] = deque()
        self._most_together = _MOST_TOGETHER if together else 1
        self._shown = shown
        self._sample_indices = sample_indices

    def __len__(self) -> int:
        return len(self.sizes) - self.done

    def __iter__(self) -> Iterator[Any]:
        while self._loaded or self._left:
            if not self._loaded:
                self._load_next()
            yield self._loaded.popleft()

    def on_host(self) -> list[Any]:
        """Returns the micro-batches before their copy to the device, and leaves them to be iterated over.

        All of them are loaded, and wait in the host's memory. Called before the iteration.
        """
        if self._shown is not None:
            return self._shown()
        while self._left:  # they are not a loader's, and where they were made
            self._left -= 1
            self._loaded.append(next(self._batches))
        return list(self._loaded)

    def _load_next(self) -> None:
        """Loads the next micro-batch; with it those after it, as long as they are small."""
        num_bytes = 0
        while self._left:
            self._left -= 1
            batch = next(self._batches)
            self._loaded.append(batch)
            if len(self._loaded) == self._most_together:
                return
            size = sum(tensor.nbytes for tensor in tensors_of(batch))
            num_bytes += size
            if size == 0 or num_bytes + size > _MOST_BYTES_TOGETHER:  # whose size isn't known may be large
                return

    @property
    def sample_indices(self) -> list[list[int]]:
        """Dataset indices of each micro-batch; empty for placeholders.

        Where lengths are others in each epoch (`EpochLengths`), of epoch e they are e · N + i, with N samples in the
        dataset.
        """
        return self._sample_indices()

    def was_cut(self, pieces: Sequence[Sequence[int]]) -> None:
        """Says how the window has been cut in the end."""
        self.sizes = tuple(map(len, pieces))
        self._sample_indices = lambda: [list(piece) for piece in pieces]

    def over(self, batches: Iterable[Any]) -> Window:
        """Returns the same window once more, of micro-batches that have been loaded."""
        again = copy.copy(self)
        again._batches, again._left, again._loaded = iter(batches), len(self), deque()
        again._shown = None
        return again

    def skip_rest(self) -> None:
        """Passes over the micro-batches that nobody has asked for, so that the next window starts at its own."""
        for _ in self:
            pass
