"""Evaluation data, each sample on exactly one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset

from distaccum import planning
from distaccum.errors import UserError
from distaccum.fetching import Request
from distaccum.loaders.moving import LoaderOptions, batch_source, on_device, placement, size_of

logger = logging.getLogger(__name__)


class EvaluationLoader:
    """Batches of a dataset in its own order, each sample on exactly one rank and no sample twice.

    Args:
        dataset: map-style dataset.
        batch_size: samples per batch; each rank's last one may be smaller.
        collate_fn, rank, world_size, options: as for `WindowLoader`.
        equal_batches: give all ranks the same number of batches, by placeholders of size 0 (see `Window`).

    Attributes:
        batch_size: as given; an iteration that begins takes it as it is then. The same on all ranks with equal batches.
        sizes: samples of each of this rank's batches.
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
        equal_batches: bool = False,
    ) -> None:
        self.num_samples = size_of(dataset, "evaluation")
        rank, world_size = placement(rank, world_size)
        shares = planning.split_evenly(self.num_samples, world_size)
        start = sum(shares[:rank])
        self._share = range(start, start + shares[rank])
        self._largest_share = shares[0] if equal_batches else 0
        self.batch_size = batch_size
        self._cut([])
        self._options = options or LoaderOptions()
        self._source = batch_source(dataset, collate_fn, "evaluation", self._options, seed=0)

    def _cut(self, taken: list[range]) -> None:
        """Lays out batches for the samples that come after those taken."""
        size, share = self.batch_size, self._share
        left = range(taken[-1].stop if taken else share.start, share.stop)
        self._batches = taken + [range(begin, min(begin + size, share.stop)) for begin in left[::size]]
        self._batches += [range(0)] * (-(-self._largest_share // size) - len(self._batches))
        self.sizes = [len(batch) for batch in self._batches]

    def __iter__(self) -> Iterator[Any]:
        self._cut([])
        number = 0
        while number < len(self._batches):
            batches = self._batches[number:]
            sizes = self.sizes

            # Always the same epoch: random numbers of a dataset are the same in all evaluations, which stay comparable.
            def requests(batches: list[range] = batches) -> Iterator[Request]:
                return (Request(0, list(batch) or [0]) for batch in batches)

            for batch in on_device(self._source.batches(requests), self._options):
                yield batch
                if self.sizes is not sizes:  # `halve`: what was given comes again, in parts
                    break
                number += 1

    def halve(self, number: int, said: str) -> None:
        """Has the batch that was just given and those after it come in half the size, as memory has run out.

        Args:
            number: of that batch, from 0.
            said: by whom memory was asked for, for the message.

        Raises:
            UserError: it is of one sample, or ranks take their forwards together.
        """
        size = len(self._batches[number])
        if size < 2 or self._largest_share:
            why = "No batch is smaller" if size < 2 else "Forwards hold collectives, so ranks can't go on by themselves"
            raise UserError(
                f"out of memory in an evaluation, with a batch of {size} samples: {said}. {why}: set a lower "
                f"train.eval_batch_size, which is {self.batch_size}, or take a smaller model or number format."
            )
        self.batch_size = size // 2
        logger.warning("out of memory in an evaluation: its batches are %d samples from here on", self.batch_size)
        self._cut(self._batches[:number])

    def close(self) -> None:
        """Ends the worker processes. The loader can be used on, with new ones."""
        self._source.close()
