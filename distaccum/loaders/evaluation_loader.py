"""Evaluation data, each sample on exactly one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset

from distaccum import planning
from distaccum.fetching import Request
from distaccum.loaders.moving import LoaderOptions, batch_source, on_device, placement, size_of


class EvaluationLoader:
    """Batches of a dataset in its own order, each sample on exactly one rank and no sample twice.

    Args:
        dataset: map-style dataset.
        batch_size: samples per batch; each rank's last one may be smaller.
        collate_fn, rank, world_size, options: as for `WindowLoader`.
        equal_batches: give all ranks the same number of batches, by placeholders of size 0 (see `Window`).

    Attributes:
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
        stop = start + shares[rank]
        batches = [range(begin, min(begin + batch_size, stop)) for begin in range(start, stop, batch_size)]
        if equal_batches:
            batches += [range(0)] * (-(-shares[0] // batch_size) - len(batches))
        self.sizes = [len(batch) for batch in batches]
        # Always the same epoch: random numbers of a dataset are the same in all evaluations, which stay comparable.
        self._requests = lambda: (Request(0, list(batch) or [0]) for batch in batches)
        self._options = options or LoaderOptions()
        self._source = batch_source(dataset, collate_fn, "evaluation", self._options, seed=0)

    def __iter__(self) -> Iterator[Any]:
        return on_device(self._source.batches(self._requests), self._options)

    def close(self) -> None:
        """Ends the worker processes. The loader can be used on, with new ones."""
        self._source.close()
