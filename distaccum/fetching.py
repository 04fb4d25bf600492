"""Fetching micro-batches from a dataset: random numbers that belong to the sample, failures that name it, workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from distaccum.errors import UserError
from distaccum.seeding import DrawDetector, derived_seed, mixed_seed, seed_cpu


class Request(NamedTuple):
    """What the sampler asks for: the samples of a micro-batch, as they are in this epoch."""

    epoch: int
    indices: list[int]


@dataclass(slots=True)
class Failure:
    """An exception on its way out of a worker process, which can't be trusted to pickle."""

    message: str
    details: str = field(repr=False)

    def error(self) -> UserError:
        error = UserError(self.message)
        error.add_note(self.details)
        return error


class MicroBatches(Dataset[Any]):
    """Fetches and collates a whole micro-batch, and says which sample it was that failed.

    What a dataset draws from the global generators (`torch`, `random`, `numpy.random`) is a function of the seed, the
    epoch and the sample's index: not of the micro-batch, rank, worker or process it is loaded in, nor of what was
    loaded before. The generators are put back afterwards, so that loading never changes what the training draws.

    Datasets that draw nothing pay a few microseconds per micro-batch for that: a micro-batch is fetched as it is, and
    once more with seeds if that drew anything. From then on the dataset is known to be random, and seeded at once. One
    with `__getitems__` is then asked for its samples one by one, if it is there that it draws. What `collate_fn` draws
    is a function of the seed, the epoch and the micro-batch's first sample, so it depends on the cut.

    Generators that a dataset owns are its own affair: those that keep a state between samples are not seen here, and
    make a sample depend on the order of loading. `python -m distaccum.check` names such datasets.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], role: str, seed: int) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.role = role
        self.seed = seed
        self.is_random = False
        self._one_by_one = False
        self._draws = DrawDetector()
        self._epoch: int | None = None
        self._bases = (0, 0)
        self._loading: int | None = None

    def __getitem__(self, request: Request) -> Any:
        if not self.is_random:
            states = self._draws.start()
            fetched = self._fetch(request.indices, self._load)
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
            return self._fetch(request.indices, self._load_seeded)
        finally:
            states.put_back()

    def _fetch(self, indices: list[int], load: Callable[[list[int]], Any]) -> Any:
        try:
            samples = load(indices)
            self._loading = None
            return self.collate_fn(samples)
        except Exception as error:
            is_one = self._loading is not None
            where = f"sample {self._loading}" if is_one else f"the micro-batch of samples {indices}"
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return Failure(f"{where} of the {self.role} data could not be loaded: {said}", traceback.format_exc())
        finally:
            self._loading = None

    def _load(self, indices: list[int]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        samples = []
        for self._loading in indices:
            samples.append(self.dataset[self._loading])
        return samples

    def _load_seeded(self, indices: list[int]) -> Any:
        base, collate_base = self._bases
        has_getitems = hasattr(self.dataset, "__getitems__")
        samples: Any = None
        if has_getitems and not self._one_by_one:
            samples = self._load_together(indices, mixed_seed(base, indices[0]))
        if samples is None:
            samples = []
            for self._loading in indices:
                seed_cpu(mixed_seed(base, self._loading))
                sample = self.dataset.__getitems__([self._loading])[0] if has_getitems else self.dataset[self._loading]
                samples.append(sample)
        seed_cpu(mixed_seed(collate_base, indices[0]))
        return samples

    def _load_together(self, indices: list[int], seed: int) -> Any:
        """The samples as a batched call gives them; None if it draws numbers, which must be told apart by sample."""
        seed_cpu(seed)
        self._draws.start()
        samples = self.dataset.__getitems__(indices)
        # What is not a list of samples but made into a micro-batch already can't be taken apart.
        self._one_by_one = isinstance(samples, list) and self._draws.has_drawn()
        return None if self._one_by_one else samples


class BatchSource:
    """Micro-batches from a data loader, with its workers, for one iteration after another.

    Args:
        fetcher: loads a micro-batch.
        num_workers, pin_memory, persistent_workers, prefetch_factor: as in `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        fetcher: MicroBatches,
        *,
        num_workers: int,
        pin_memory: bool,
        persistent_workers: bool,
        prefetch_factor: int | None,
    ) -> None:
        self._fetcher = fetcher
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._persistent_workers = persistent_workers
        self._prefetch_factor = prefetch_factor
        self._sampler = _Requests()
        self._iterator: Any = None
        self._iteration: object | None = None
        self._loader = self._new_loader()

    def batches(self, requests: Callable[[], Iterator[Request]]) -> Iterator[Any]:
        """Loads what is requested, in that order.

        Raises:
            UserError: a sample can't be loaded; a worker process has died; there are workers and another iteration has
                taken them over.
        """
        if self._num_workers == 0 and not self._pin_memory:
            # A DataLoader would add nothing here but its own time, half as much again as a small micro-batch takes.
            yield from (_whole(default_convert(self._fetcher[request])) for request in requests())  # type: ignore[no-untyped-call]
            return
        self._sampler.requests = requests
        if self._num_workers == 0:
            yield from map(_whole, self._loader)
            return
        if not self._persistent_workers:
            self._end_workers()
        iterator = self._started()
        self._iteration = iteration = object()
        try:
            while True:
                if self._iteration is not iteration:
                    raise UserError(
                        f"an iteration over the {self._fetcher.role} data goes on after another one has begun, or "
                        "after close(): their workers are the same. Finish one before the next, or make two loaders."
                    )
                try:
                    batch = self._guarded(lambda: next(iterator))
                except StopIteration:
                    return
                yield _whole(batch)
        finally:
            if self._iteration is iteration and not self._persistent_workers:
                self._end_workers()

    def one(self, request: Request) -> Any:
        """Loads a single micro-batch, as `aside` does."""
        (batch,) = self.aside([request])
        return batch

    def aside(self, requests: Sequence[Request]) -> Iterator[Any]:
        """Loads micro-batches, and leaves the workers and an iteration that is under way alone.

        With workers, a process that ends with the last micro-batch loads them: the training process must not open files
        that the dataset opens at the first sample and that workers can't share.

        Raises:
            UserError: as `batches`.
        """
        source = BatchSource(
            self._fetcher,
            num_workers=min(1, self._num_workers),
            pin_memory=False,
            persistent_workers=False,
            prefetch_factor=None,
        )
        return source.batches(lambda: iter(requests))

    def close(self) -> None:
        """Ends the workers. A later iteration starts new ones."""
        self._end_workers()

    def _new_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._fetcher,
            batch_size=None,  # the sampler asks for whole micro-batches
            sampler=self._sampler,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            persistent_workers=self._persistent_workers,
            prefetch_factor=self._prefetch_factor,
            worker_init_fn=_begin_worker if self._num_workers else None,
            # A generator of its own: otherwise each iteration draws the workers' seed from the state that dropout uses.
            generator=torch.Generator().manual_seed(derived_seed(self._fetcher.seed, "workers", self._fetcher.role)),
        )

    def _started(self) -> Any:
        iterator = self._guarded(lambda: iter(self._loader))
        if iterator is not self._iterator:
            self._iterator = iterator
            # When the interpreter ends, multiprocessing sends them a signal that they ignore, and waits.
            Finalize(iterator, _kill, args=(iterator._workers,), exitpriority=0)
            _hold_back_deaths()
        return iterator

    def _end_workers(self) -> None:
        iterator, self._iteration = self._iterator, None
        if iterator is None:
            return
        if self.dead_worker() is not None:
            # It may have held the lock of the event that torch would now tell the others with, and wait for ever.
            iterator._workers_done_event = threading.Event()
            _kill(iterator._workers)
        try:
            # torch does this when the iterator is collected, from which the traceback of a failure keeps it.
            self._watched(iterator._shutdown_workers)
        except RuntimeError:
            if self.dead_worker() is None:
                raise
        finally:
            self._iterator = None
            self._loader = self._new_loader()  # the one before keeps persistent workers for its next iteration
            _kill(iterator._workers)

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """Takes a step in which the death of a worker may be noticed, and says what has happened if it is."""

        def checked_step() -> Any:
            if self.dead_worker() is not None:
                raise RuntimeError("a data loader's worker had died before")
            return step()

        try:
            return self._watched(checked_step)
        except (RuntimeError, OSError, EOFError) as error:
            if not isinstance(error, RuntimeError):
                # The connection to a dying worker breaks a little earlier than the process can be seen to have ended.
                broken = wait([worker.sentinel for worker in self._workers()], timeout=1)
                for worker in self._workers():
                    if worker.sentinel in broken:
                        worker.join(timeout=1)
            if self.dead_worker() is None:
                raise
            raise self._death() from error

    def _watched(self, step: Callable[[], Any]) -> Any:
        """Takes a step during which a worker's death raises RuntimeError; at other times it doesn't."""
        global _watching
        before, _watching = _watching, self
        try:
            return step()
        finally:
            _watching = before

    def _workers(self) -> list[Any]:
        return self._iterator._workers if self._iterator is not None else []

    def dead_worker(self) -> Any:
        """A worker process that has ended though nobody asked it to; None if there is none."""
        return next((worker for worker in self._workers() if worker.exitcode is not None), None)

    def has_killed_worker(self) -> bool:
        return any(worker.exitcode for worker in self._workers())

    def _death(self) -> UserError:
        worker = self.dead_worker()
        status = worker.exitcode
        self._end_workers()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return UserError(
            f"a worker process that loads the {self._fetcher.role} data (pid {worker.pid}) {how}"
            f"{_DEATHS.get(-status, '')}. Start again: a run with checkpoints goes on from the last one."
        )


_DEATHS = {
    signal.SIGKILL: ", which is how the system ends a process when memory runs out. If it did, lower "
    "data.num_workers or data.prefetch_factor, or give the job more memory",
    signal.SIGBUS: ", which is what happens when shared memory (/dev/shm) runs out. Make it larger, or lower "
    "data.num_workers or data.prefetch_factor",
}


class _Requests(Sampler[Request]):
    """Requests, asked for anew at each iteration: one DataLoader, with its workers, serves all epochs."""

    def __init__(self) -> None:
        self.requests: Callable[[], Iterator[Request]] = lambda: iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests()


def _whole(batch: Any) -> Any:
    if isinstance(batch, Failure):
        raise batch.error()
    return batch


_SECONDS_BETWEEN_LOOKS = 1.0
"""Of a worker, at whether the training process is still there."""


def _begin_worker(worker: int) -> None:
    training = multiprocessing.parent_process()
    if training is not None:
        # torch's worker takes whoever is its parent a moment after this for the training process, and ends with that
        # one. If the training has been killed before, it would stay for ever, and with it the sockets that the other
        # ranks wait at.
        threading.Thread(target=_end_with, args=(training.pid,), daemon=True).start()
    _ignore_signals(worker)


def _end_with(training: int | None) -> None:
    while os.getppid() == training:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _ignore_signals(worker: int) -> None:
    """Leaves it to the training process what to do about Ctrl-C or a scheduler's signal, which reach workers too.

    It may have a window to finish, and needs its workers for that. They end with it in any case.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # Not SIG_IGN, which programs that a dataset starts would inherit.
        signal.signal(number, lambda *_: None)


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()


_watching: BatchSource | None = None
"""Whose workers are being waited for now."""


def _hold_back_deaths() -> None:
    """Lets the death of a worker be noticed where its micro-batch is waited for.

    torch raises it from a signal handler, wherever the training is at that moment: in an optimizer step, or while it
    saves. A handler is needed, though: a worker that dies while it writes keeps the reader waiting for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and not isinstance(handler, _OnlyWhereWatched):
        signal.signal(signal.SIGCHLD, _OnlyWhereWatched(handler))


@dataclass(frozen=True, slots=True)
class _OnlyWhereWatched:
    handler: Callable[[int, FrameType | None], Any]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):
            self.handler(number, frame)
        if _watching is not None and _watching.has_killed_worker():
            raise RuntimeError("a data loader's worker was killed")
