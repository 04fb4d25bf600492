"""Fetches micro-batches from a dataset, in workers or without: random numbers and errors belong to the sample."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from distaccum.errors import UserError
from distaccum.loaders.collate import PadCollate, Stacked
from distaccum.loaders.load_clock import LoadClock, LoadTimes, Timed
from distaccum.loaders.options import LoaderOptions
from distaccum.loaders.workers import DataWorkers
from distaccum.runtime.randomness import DrawDetector, derived_seed, mixed_seed, seed_cpu

_MOST_SHOWN = 32
"""Numbers of samples in a message."""


class Request(NamedTuple):
    """The samples of a micro-batch, as they are in an epoch."""

    epoch: int
    indices: list[int]


class _WithCursors(NamedTuple):
    """A micro-batch, and as JSON the places that its loading has come by in what can only be read forwards."""

    batch: Any
    cursors: str


class MicroBatches(Dataset[Any]):
    """Fetches and collates a whole micro-batch; returns a `UserError` that names the sample if one can't be loaded.

    What a dataset draws from the global generators (`torch`, `random`, `numpy.random`) is a function of the seed, the
    epoch and the sample's index: not of the micro-batch, rank, worker or process it is loaded in, nor of what was
    loaded before. The generators are put back afterwards, so that loading never changes what the training draws.

    Datasets that draw nothing pay a few microseconds per micro-batch for that: a micro-batch is fetched as it is, and
    once more with seeds if that drew anything. From then on the dataset is known to be random, and seeded at once. One
    with `__getitems__` is then asked for its samples one by one, if it is there that it draws. What `collate_fn` draws
    is a function of the seed, the epoch and the micro-batch's first sample, so it depends on the cut.

    Generators that a dataset owns are not seeded here: those that keep a state between samples make a sample depend on
    the order of loading. `python -m distaccum.check` names such datasets.

    A dataset whose samples depend on the epoch has a method `samples_of_epoch(epoch, indices)` in place of
    `__getitems__`, which returns a list.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, role: str, seed: int) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn or getattr(dataset, "collate_fn", None) or PadCollate()
        self.role = role
        self.seed = seed
        self.is_random = False
        self._one_by_one = False
        self._draws = DrawDetector()
        self._epoch: int | None = None
        self._bases = (0, 0)
        self._loading: int | None = None

    def __getitem__(self, request: Request) -> Any:
        batch = self._batch(request)
        take_cursors = getattr(self.dataset, "take_cursors", None)
        cursors = take_cursors() if take_cursors is not None else None
        return _WithCursors(batch, json.dumps(cursors)) if cursors else batch

    def _batch(self, request: Request) -> Any:
        if not self.is_random:
            states = self._draws.start()
            fetched = self._fetch(request, self._load)
            if not self._draws.has_drawn():
                return fetched
            states.put_back()
            self.is_random = True
        return self._fetch_seeded(request)

    def _fetch_seeded(self, request: Request) -> Any:
        if request.epoch != self._epoch:
            purpose = (self.role, request.epoch)
            self._bases = derived_seed(self.seed, "sample", *purpose), derived_seed(self.seed, "collate", *purpose)
            self._epoch = request.epoch
        states = self._draws.start()
        try:
            return self._fetch(request, self._load_seeded)
        finally:
            states.put_back()

    def _fetch(self, request: Request, load: Callable[[Request], Any]) -> Any:
        try:
            samples = load(request)
            self._loading = None
            if isinstance(samples, Stacked) and type(self.collate_fn) is not PadCollate:
                samples = list(samples)
            return self.collate_fn(samples)
        except Exception as error:
            is_one = self._loading is not None
            where = f"sample {self._loading}" if is_one else f"the micro-batch of samples {_shown(request.indices)}"
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if is_one and (file := _file_of(self.dataset, self._loading)) and file not in said:
                where += f" ({file})"
            failure = UserError(f"{where} of the {self.role} data could not be loaded: {said}")
            failure.add_note(traceback.format_exc())  # as text, as the exception may not be picklable
            return failure
        finally:
            self._loading = None

    def _together(self, epoch: int) -> Callable[[list[int]], Any] | None:
        """Returns the dataset's way to load samples in one call; None if it has none."""
        if hasattr(self.dataset, "samples_of_epoch"):
            return partial(self.dataset.samples_of_epoch, epoch)
        return getattr(self.dataset, "__getitems__", None)

    def _load(self, request: Request) -> Any:
        if (together := self._together(request.epoch)) is not None:
            return together(request.indices)
        samples = []
        for self._loading in request.indices:
            samples.append(self.dataset[self._loading])
        return samples

    def _load_seeded(self, request: Request) -> Any:
        base, collate_base = self._bases
        together, indices = self._together(request.epoch), request.indices
        samples: Any = None
        if together is not None and not self._one_by_one:
            samples = self._load_together(together, indices, mixed_seed(base, indices[0]))
        if samples is None:
            samples = []
            for self._loading in indices:
                seed_cpu(mixed_seed(base, self._loading))
                sample = together([self._loading])[0] if together is not None else self.dataset[self._loading]
                samples.append(sample)
        seed_cpu(mixed_seed(collate_base, indices[0]))
        return samples

    def _load_together(self, together: Callable[[list[int]], Any], indices: list[int], seed: int) -> Any:
        """Returns the samples of one batched call; None if it draws random numbers, which must belong to one sample."""
        seed_cpu(seed)
        self._draws.start()
        samples = together(indices)
        # What is not a list of samples but made into a micro-batch already can't be taken apart.
        self._one_by_one = isinstance(samples, list | Stacked) and self._draws.has_drawn()
        return None if self._one_by_one else samples


def _shown(indices: list[int]) -> str:
    return str(indices) if len(indices) <= _MOST_SHOWN else f"{str(indices[:_MOST_SHOWN])[:-1]}, …]"


def _file_of(dataset: Any, index: int | None) -> str | None:
    """Returns the path of a sample's file, of a dataset with a list `samples` as torchvision's `ImageFolder` has it."""
    try:
        entry = dataset.samples[index]
        return os.fspath(entry[0] if isinstance(entry, tuple) else entry)
    except Exception:  # what a dataset has under that name may be anything, and this only adds to a message
        return None


class BatchSource:
    """Micro-batches from a data loader, with its workers, for one iteration after another.

    Args:
        fetcher: loads a micro-batch.
        options: those of a `torch.utils.data.DataLoader` are used.

    Attributes:
        options: with the number of workers in use.
    """

    def __init__(self, fetcher: MicroBatches, options: LoaderOptions) -> None:
        self._fetcher = fetcher
        self.options = options.with_workers(options.workers, options.prefetch_factor) if options.is_auto else options
        self._is_auto = options.is_auto
        # As a DataLoader does, arrays become tensors; a PadCollate has made tensors of all that there are.
        self._convert = _as_it_is if type(fetcher.collate_fn) is PadCollate else default_convert
        self._clock: LoadClock | None = None
        self._sampler = _Requests()
        self._iteration: object | None = None
        self._workers = DataWorkers(self._new_loader, fetcher.role)

    def batches(self, requests: Callable[[], Iterator[Request]]) -> Iterator[Any]:
        """Loads what is requested, in that order.

        Raises:
            UserError: a sample can't be loaded; a worker process has died or can't be started; there are workers and
                another iteration has taken them over.
        """
        if self.options.num_workers == 0 and not self.options.pin_memory:
            # A DataLoader would add nothing here but its own time, half as much again as a small micro-batch takes.
            yield from (self._whole(self._convert(self._fetcher[request])) for request in requests())
            return
        self._sampler.requests = requests
        if self.options.num_workers == 0:
            yield from map(self._whole, self._new_loader())
            return
        self._iteration = None
        self._workers.start()
        self._iteration = iteration = object()
        try:
            while True:
                if self._iteration is not iteration:
                    raise UserError(
                        f"an iteration over the {self._fetcher.role} data goes on after another one has begun, or "
                        "after close(): their workers are the same. Finish one before the next, or make two loaders."
                    )
                try:
                    batch = self._workers.next()
                except StopIteration:
                    return
                yield self._whole(batch)
        finally:
            if self._iteration is iteration and not self.options.persistent_workers:
                self.close()

    def aside(self, requests: Sequence[Request]) -> Iterator[Any]:
        """Loads micro-batches without disturbing the workers and an iteration that is under way.

        With workers, a process that ends with the last micro-batch loads them: the training process must not open files
        that the dataset opens at the first sample and that workers can't share.

        Raises:
            UserError: as `batches`.
        """
        source = BatchSource(self._fetcher, LoaderOptions(num_workers=min(1, self.options.workers)))
        return source.batches(lambda: iter(requests))

    def use_workers(self, num_workers: int, prefetch_factor: int | None) -> None:
        """Has iterations to come use another number of workers. One that is under way is given up."""
        self.close()
        self.options = self.options.with_workers(num_workers, prefetch_factor)

    def load_times(self) -> LoadTimes | None:
        """Returns what loading has taken in the workers since the last call; None if they have loaded nothing."""
        return self._clock.take() if self._clock is not None else None

    def close(self) -> None:
        """Ends the workers. A later iteration starts new ones."""
        self._iteration = None
        self._workers.end()

    def _whole(self, batch: Any) -> Any:
        if isinstance(batch, _WithCursors):
            self._fetcher.dataset.learn(json.loads(batch.cursors))
            batch = batch.batch
        if isinstance(batch, UserError):
            raise batch
        return batch

    def _new_loader(self, begin_worker: Callable[[int], None] | None = None) -> DataLoader[Any]:
        num_workers = self.options.workers
        self._clock = LoadClock(num_workers) if num_workers else None
        with warnings.catch_warnings():
            if self._is_auto:  # more workers than cores are taken where they wait for a disk or a network
                warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            return self._loader_of(num_workers, begin_worker)

    def _loader_of(self, num_workers: int, begin_worker: Callable[[int], None] | None) -> DataLoader[Any]:
        return DataLoader(
            Timed(self._fetcher, self._clock) if self._clock is not None else self._fetcher,
            batch_size=None,  # the sampler asks for whole micro-batches
            collate_fn=self._convert,
            sampler=self._sampler,
            num_workers=num_workers,
            pin_memory=self.options.pin_memory,
            persistent_workers=self.options.persistent_workers,
            prefetch_factor=self.options.prefetch_factor,
            worker_init_fn=begin_worker,
            # A generator of its own: otherwise each iteration draws the workers' seed from the state that dropout uses.
            generator=torch.Generator().manual_seed(derived_seed(self._fetcher.seed, "workers", self._fetcher.role)),
        )


def _as_it_is(batch: Any) -> Any:
    return batch


class _Requests(Sampler[Request]):
    """Requests, asked for anew at each iteration: one DataLoader, with its workers, serves all epochs."""

    def __init__(self) -> None:
        self.requests: Callable[[], Iterator[Request]] = lambda: iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests()
