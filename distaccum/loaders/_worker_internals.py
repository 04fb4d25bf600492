"""The private attributes of torch's `DataLoader` iterator with workers that this package uses.

tests/loaders/test_worker_internals.py asserts that all of it is there.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data._utils import signal_handling
from torch.utils.data._utils import worker as worker_loop
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

_SECONDS_TO_PIN = 6.0
"""How long the thread that pins memory may take to end; it looks every 5 s."""


def workers_of(iterator: Any) -> list[Any]:
    """The worker processes of an iterator."""
    workers: list[Any] = iterator._workers
    return workers


def shut_down(iterator: Any) -> None:
    """Ends workers that are all alive, as torch does when the iterator is collected."""
    iterator._shutdown_workers()


@contextmanager
def hidden_worker() -> Iterator[None]:
    """Has `get_worker_info()` say that this is no worker: an iterable dataset would give a part of its samples."""
    info, worker_loop._worker_info = worker_loop._worker_info, None
    try:
        yield
    finally:
        worker_loop._worker_info = info


def kill_and_join(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=1)


def abandon(iterator: Any) -> None:
    """Ends what is left of an iterator of which a worker has died.

    torch's own way waits for ever if the worker held the lock of the event that ends the others, or was in the middle
    of a message to the thread that pins memory.
    """
    kill_and_join(iterator._workers)
    if iterator._shutdown:
        return
    iterator._shutdown = True
    if hasattr(iterator, "_pin_memory_thread"):
        iterator._pin_memory_thread_done_event.set()
        iterator._worker_result_queue.put((None, None))
        iterator._pin_memory_thread.join(timeout=_SECONDS_TO_PIN)
        iterator._worker_result_queue.cancel_join_thread()
        iterator._worker_result_queue.close()
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()
    if iterator._worker_pids_set:
        signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False


def disarm_half_made(error: BaseException) -> None:
    """Keeps an iterator whose making has failed from shutting itself down when it is collected, which it can't."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
            half_made._shutdown = True


def set_death_handler() -> None:
    """Sets torch's handler of SIGCHLD, which raises RuntimeError when a worker has been killed."""
    signal_handling._set_SIGCHLD_handler()
