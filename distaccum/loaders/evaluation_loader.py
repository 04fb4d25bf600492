"""Loads evaluation data, each sample on exactly one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from distaccum import planning
from distaccum.errors import UserError
from distaccum.loaders.fetch import BatchSource, MicroBatches, Request
from distaccum.loaders.options import LoaderOptions, on_device, placement, size_of
from distaccum.loaders.window_loader import WindowLoader

logger = logging.getLogger(__name__)


class EvaluationLoader:
    """Batches of a dataset in its own order, each sample on exactly one rank and no sample twice.

    Args:
        dataset: map-style dataset.
        batch_size: samples per batch; each rank's last one may be smaller.
        collate_fn, rank, world_size, options: as for `WindowLoader`.
        workers_of: with `num_workers="auto"`, take as many workers as this loader has by now.
        equal_batches: give all ranks the same number of batches, by placeholders of size 0 (see `Window`).

    Attributes:
        batch_size: as given, or as it has come to be.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        options: LoaderOptions | None = None,
        workers_of: WindowLoader | None = None,
        equal_batches: bool = False,
    ) -> None:
        self.num_samples = size_of(dataset, "evaluation")
        rank, world_size = placement(rank, world_size)
        shares = planning.split_evenly(self.num_samples, world_size)
        start = sum(shares[:rank])
        self._share = range(start, start + shares[rank])
        self._largest_share = shares[0] if equal_batches else 0
        self.set_batch_size(batch_size)
        self._options = options or LoaderOptions()
        self._workers_of = workers_of if self._options.is_auto else None
        self._source = BatchSource(MicroBatches(dataset, collate_fn, "evaluation", seed=0), self._options)

    def set_batch_size(self, batch_size: int) -> None:
        """Sets the batch size of iterations to come; with equal batches, for all ranks alike."""
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Returns the number of this rank's batches."""
        return -(-max(len(self._share), self._largest_share) // self.batch_size)

    def size(self, number: int) -> int:
        """Returns the number of samples of this rank's batch with a number, from 0."""
        return len(self._samples(number))

    def _samples(self, number: int) -> range:
        return self._share[number * self.batch_size : (number + 1) * self.batch_size]

    def halve(self, said: str) -> None:
        """Halves the batches of iterations to come, as memory has run out.

        Args:
            said: the error's message.

        Raises:
            UserError: batches are of one sample, or ranks take their forwards together.
        """
        size = self.size(0)
        if size < 2 or self._largest_share:
            mend = "Take a smaller model, sample or number format."
            if size > 1:
                mend = "Set a lower train.eval_batch_size: ranks take their forwards together, so none can do so alone."
            raise UserError(f"out of memory in an evaluation with batches of {size}: {said}. {mend}")
        self.set_batch_size(size // 2)
        logger.warning("out of memory in an evaluation: it begins again with batches of %d samples", size // 2)

    def __iter__(self) -> Iterator[Any]:
        if self._workers_of is not None:
            found, own = self._workers_of.options, self._source.options
            if (found.workers, found.prefetch_factor) != (own.workers, own.prefetch_factor):
                self._source.use_workers(found.workers, found.prefetch_factor)
        # Always the same epoch: random numbers of a dataset are the same in all evaluations, which stay comparable.
        requests = partial(map, lambda number: Request(0, list(self._samples(number)) or [0]), range(len(self)))
        return on_device(self._source.batches(requests), self._options)

    def close(self) -> None:
        """Ends the worker processes. The loader can be used on, with new ones."""
        self._source.close()
