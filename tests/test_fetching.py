from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

from distaccum import UserError
from distaccum.fetching import BatchSource, Failure, MicroBatches, Request
from distaccum.seeding import GlobalStates

pytestmark = [
    # A worker that dies at a bad moment could make its reader wait for ever.
    pytest.mark.timeout(60),
    # multiprocessing and torch leave connections and temporary files behind when a worker dies while they talk to it.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _what_is_left_open_is_collected() -> Iterator[None]:
    yield
    gc.collect()


class Numbers(Dataset[Any]):
    """Sample i is i, and the process that loaded it."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


class Noisy(Numbers):
    def __getitem__(self, index: int) -> Any:
        return index, random.random(), np.random.rand(), torch.rand(()).item()


class Recording(Numbers):
    """Keeps the state of Python's generator at each sample."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def __getitem__(self, index: int) -> Any:
        self.states.append(random.getstate())
        return index


def _fetcher(dataset: Any, collate_fn: Any = list, seed: int = 1) -> MicroBatches:
    return MicroBatches(dataset, collate_fn, "training", seed)


def _source(dataset: Any, num_workers: int, *, persistent: bool = True, collate_fn: Any = default_collate) -> Any:
    return closing(
        BatchSource(
            _fetcher(dataset, collate_fn),
            num_workers=num_workers,
            pin_memory=False,
            persistent_workers=persistent and num_workers > 0,
            prefetch_factor=None,
        )
    )


def _requests(count: int, size: int = 2) -> Iterator[Request]:
    return (Request(0, list(range(size * number, size * number + size))) for number in range(count))


def test_a_dataset_that_draws_nothing_is_not_seeded() -> None:
    data = Recording()
    fetcher = _fetcher(data)
    state = random.getstate()
    for epoch in range(3):
        assert fetcher[Request(epoch, [1, 2, 3])] == [1, 2, 3]
    assert len(data.states) == 9
    assert all(found == state for found in data.states)
    assert not fetcher.is_random


def test_a_dataset_that_draws_is_loaded_again_once() -> None:
    class Counting(Noisy):
        loads = 0

        def __getitem__(self, index: int) -> Any:
            self.loads += 1
            return super().__getitem__(index)

    data = Counting()
    fetcher = _fetcher(data)
    first = fetcher[Request(0, [1, 2])]
    assert (fetcher.is_random, data.loads) == (True, 4)
    assert fetcher[Request(0, [1, 2])] == first
    assert data.loads == 6


def test_samples_that_draw_are_noticed_wherever_they_come() -> None:
    class Sometimes(Numbers):
        def __getitem__(self, index: int) -> Any:
            return (index, random.random()) if index == 70 else (index, 0.0)

    late, early = _fetcher(Sometimes()), _fetcher(Sometimes())
    for start in range(0, 70, 10):
        late[Request(0, list(range(start, start + 10)))]
    assert not late.is_random
    assert late[Request(0, [69, 70])][1] == early[Request(0, [70])][0]


def test_numbers_differ_by_seed_epoch_sample_and_role() -> None:
    found = {
        number
        for seed in (1, 2)
        for role in ("training", "evaluation")
        for epoch in (0, 1)
        for sample in MicroBatches(Noisy(), list, role, seed)[Request(epoch, [5, 6, 7])]
        for number in sample[1:]
    }
    assert len(found) == 2 * 2 * 2 * 3 * 3


def test_the_training_draws_what_it_would_without_loading() -> None:
    fetcher = _fetcher(Noisy())
    for _ in range(3):  # not random yet, just found out, known
        before = GlobalStates.now()
        wanted = [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()]
        before.put_back()
        fetcher[Request(0, [1, 2, 3])]
        assert [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()] == wanted


def test_a_collate_that_draws_depends_on_the_first_sample() -> None:
    def mixing(samples: list[Any]) -> Any:
        return samples, random.random()

    one, other = _fetcher(Numbers(), mixing), _fetcher(Numbers(), mixing)
    other[Request(0, [8])]
    assert one[Request(0, [3, 4])][1] == other[Request(0, [3, 5, 6])][1]
    assert one[Request(0, [3, 4])][1] != one[Request(1, [3, 4])][1]
    assert one[Request(0, [3, 4])][1] != one[Request(0, [4])][1]


def test_batched_loading_stays_batched_unless_it_draws() -> None:
    class Batched(Numbers):
        calls: list[list[int]]

        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.calls.append(indices)
            return [super(Batched, self).__getitem__(index) for index in indices]

    class BatchedNoisy(Batched):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [(index, random.random()) for index, _ in super().__getitems__(indices)]

    def draws(samples: list[Any]) -> Any:
        return samples, random.random()

    data = Batched()
    data.calls = []
    fetcher = _fetcher(data, draws)
    fetcher[Request(0, [1, 2])], fetcher[Request(0, [3, 4])]
    assert data.calls == [[1, 2], [1, 2], [3, 4]]

    noisy = BatchedNoisy()
    noisy.calls = []
    fetcher = _fetcher(noisy)
    first = fetcher[Request(0, [1, 2])]
    assert fetcher[Request(0, [2, 9])][0] == first[1]
    assert noisy.calls[-2:] == [[2], [9]]


def test_micro_batches_that_a_dataset_makes_itself_stay_whole() -> None:
    class Columns(Numbers):
        def __getitems__(self, indices: list[int]) -> Any:
            return torch.tensor(indices) + torch.rand(())

    one, other = _fetcher(Columns(), lambda batch: batch), _fetcher(Columns(), lambda batch: batch)
    assert torch.equal(one[Request(0, [1, 2])], other[Request(0, [1, 2])])


def test_failures_name_the_sample_also_when_random() -> None:
    class Bad(Noisy):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            if index == 4:
                raise ValueError(f"no {sample[1]}")
            return sample

    fetcher = _fetcher(Bad())
    failures = [fetcher[Request(0, [3, 4])] for _ in range(2)]
    assert all(isinstance(failure, Failure) for failure in failures)
    assert failures[0].message.startswith("sample 4 of the training data could not be loaded: ValueError: no 0.")
    assert failures[0].message == failures[1].message


@pytest.mark.parametrize("persistent", [True, False])
def test_a_killed_worker_is_one_message(persistent: bool) -> None:
    with _source(Numbers(), 2, persistent=persistent) as source:
        batches = source.batches(lambda: _requests(200))
        pid = int(next(batches)[1][0])
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)  # torch would raise here, in the middle of whatever the training does
        with pytest.raises(UserError) as caught:
            list(batches)
        assert len(list(source.batches(lambda: _requests(5)))) == 5  # with new workers
    message = str(caught.value)
    assert message.startswith(f"a worker process that loads the training data (pid {pid}) was killed by SIGKILL")
    assert "memory" in message
    assert "num_workers" in message
    assert "Start again" in message


@pytest.mark.alone
def test_a_worker_that_dies_while_it_is_waited_for() -> None:
    class Deadly(Numbers):
        def __getitem__(self, index: int) -> Any:
            if index == 11:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            return index

    with _source(Deadly(), 1) as source:
        started = time.monotonic()
        with pytest.raises(UserError, match="was killed by SIGKILL"):
            list(source.batches(lambda: _requests(10)))
        assert time.monotonic() - started < 4  # noticed by the signal; torch looks every 5 s only


def test_workers_killed_at_any_moment() -> None:
    chance = random.Random(0)
    for _ in range(40):
        with _source(Numbers(), 2) as source:
            batches = source.batches(lambda: _requests(100_000))
            pid = int(next(batches)[1][0])
            killer = threading.Timer(chance.random() / 50, os.kill, (pid, signal.SIGKILL))
            killer.start()
            with pytest.raises(UserError, match=f"pid {pid}. was killed by SIGKILL"):
                list(batches)
            killer.join()


def test_a_worker_that_leaves() -> None:
    class Leaving(Numbers):
        def __getitem__(self, index: int) -> Any:
            os._exit(7)

    with (
        _source(Leaving(), 1) as source,
        pytest.raises(UserError, match=r"training data \(pid \d+\) ended with status 7\."),
    ):
        list(source.batches(lambda: _requests(10)))


def test_the_death_of_one_loaders_worker_leaves_the_other_alone() -> None:
    with _source(Numbers(), 1) as one, _source(Numbers(), 1) as other:
        pid = int(next(one.batches(lambda: _requests(9)))[1][0])
        batches = other.batches(lambda: _requests(9))
        next(batches)
        os.kill(pid, signal.SIGKILL)
        assert len(list(batches)) == 8
        with pytest.raises(UserError, match=f"pid {pid}"):
            next(one.batches(lambda: _requests(9)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_training(number: int) -> None:
    with _source(Numbers(), 1) as source:
        batches = source.batches(lambda: _requests(50))
        pid = int(next(batches)[1][0])
        os.kill(pid, number)
        assert len(list(batches)) == 49


def test_close_ends_the_workers_and_can_be_repeated() -> None:
    with _source(Numbers(), 2) as source:
        batches = source.batches(lambda: _requests(50))
        pids = {int(next(batches)[1][0]) for _ in range(2)}
        source.close()
        source.close()
        assert not any(_is_alive(pid) for pid in pids)
        with pytest.raises(UserError, match="after another one has begun"):
            next(batches)
        again = [batch[0].tolist() for batch in source.batches(lambda: _requests(3))]
        assert again == [[0, 1], [2, 3], [4, 5]]


def test_close_ends_workers_after_a_failure_that_somebody_holds() -> None:
    with _source(Numbers(), 1) as source:
        batches = source.batches(lambda: _requests(50))
        pid = int(next(batches)[1][0])
        try:
            raise ValueError("in the training")
        except ValueError:
            source.close()
            assert not _is_alive(pid)


def test_workers_that_are_not_kept_end_with_their_iteration() -> None:
    with _source(Numbers(), 1, persistent=False) as source:
        pids = {int(batch[1][0]) for _ in range(2) for batch in source.batches(lambda: _requests(3))}
        assert len(pids) == 2
        assert not any(_is_alive(pid) for pid in pids)


@pytest.mark.parametrize("persistent", [True, False])
def test_two_iterations_at_once_are_refused(persistent: bool) -> None:
    with _source(Numbers(), 1, persistent=persistent) as source:
        one, other = (source.batches(lambda: _requests(5)) for _ in range(2))
        next(one), next(other)
        with pytest.raises(UserError, match="Finish one before the next"):
            next(one)
        assert len(list(other)) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_micro_batch_leaves_an_iteration_alone(num_workers: int) -> None:
    with _source(Noisy(), num_workers) as source:
        wanted = [batch[1].tolist() for batch in source.batches(lambda: _requests(6))]
        batches = source.batches(lambda: _requests(6))
        found = [next(batches)[1].tolist()]
        assert source.one(Request(0, [2, 3]))[1].tolist() == wanted[1]
        assert found + [batch[1].tolist() for batch in batches] == wanted


def test_one_micro_batch_is_loaded_by_a_worker_where_there_are_workers() -> None:
    with _source(Numbers(), 2) as source:
        pid = int(source.one(Request(0, [1]))[1][0])
        assert pid != os.getpid()
        assert not _is_alive(pid)


def test_an_interpreter_with_workers_can_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, test_fetching as t\n"
        "source = t._source(t.Numbers(), 2).__enter__()\n"
        "batches = source.batches(lambda: t._requests(50))\n"
        "print(*{int(next(batches)[1][0]) for _ in range(2)}, flush=True)\n"
        "sys.exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert not any(_is_alive(int(pid)) for pid in done.stdout.split())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


_ORPHANS = """
import os, signal, sys, time
from torch.utils.data._utils import worker
from distaccum import fetching

def kill_training():
    training = os.getppid()
    os.kill(training, signal.SIGKILL)
    while os.getppid() == training:
        time.sleep(0.01)
    print(os.getpid(), flush=True)

begin = fetching._begin_worker
def begin_late(number):
    kill_training()
    begin(number)

class LateWatchdog(worker.ManagerWatchdog):
    def __init__(self):
        kill_training()
        super().__init__()

if sys.argv[1] == "before it begins":
    fetching._begin_worker = begin_late
elif sys.argv[1] == "before it looks at its parent":
    worker.ManagerWatchdog = LateWatchdog
fetcher = fetching.MicroBatches(range(1000), list, "training", seed=0)
source = fetching.BatchSource(
    fetcher, num_workers=1, pin_memory=False, persistent_workers=False, prefetch_factor=None
)
for _ in source.batches(lambda: (fetching.Request(0, [index]) for index in range(1000))):
    print(source._workers()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["before it begins", "before it looks at its parent", "while it works"])
def test_a_worker_does_not_outlive_the_training(moment: str) -> None:
    """It would stay for ever, with its memory and with the sockets that other ranks wait at."""
    with subprocess.Popen([sys.executable, "-c", _ORPHANS, moment], stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        worker = int(training.stdout.readline())
        try:
            training.communicate(timeout=30)  # until the worker closes its end too
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise
    assert training.returncode == -signal.SIGKILL
