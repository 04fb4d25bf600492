from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import WITH_WORKERS, Numbers, is_alive, new_source, requests

from distaccum import UserError
from distaccum.loaders import _worker_internals
from distaccum.loaders import workers as data_workers

pytestmark = WITH_WORKERS

_after_fork: list[Callable[[], object]] = []
"""What the processes do that are forked next, one after another, before anything else."""


def _in_child() -> None:
    if _after_fork:
        _after_fork[0]()


def _in_parent() -> None:
    if _after_fork:
        _after_fork.pop(0)


os.register_at_fork(after_in_child=_in_child, after_in_parent=_in_parent)


def _hang() -> None:
    time.sleep(600)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("hanging", [0, 1])
def test_workers_that_a_fork_leaves_hanging_are_started_anew(
    persistent: bool, hanging: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data_workers, "_SECONDS_TO_BEGIN", (1.0, 30.0))
    for _ in range(2):
        caplog.clear()
        with new_source(Numbers(), 2, persistent=persistent) as source:
            _after_fork[:] = [int, _hang] if hanging else [_hang]
            started = time.monotonic()
            batches = list(source.batches(lambda: requests(6)))
            assert time.monotonic() - started < 20
            assert [batch[0].tolist() for batch in batches] == [[2 * number, 2 * number + 1] for number in range(6)]
            assert "did not begin within 1 s of their fork, and are started anew" in caplog.text
            assert len(multiprocessing.active_children()) == (2 if persistent else 0)
        assert not multiprocessing.active_children()


def test_no_worker_loads_before_all_have_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise those that are ended with the hanging one could leave a file half-written."""

    class Writing(Numbers):
        def __getitem__(self, index: int) -> Any:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(0.01)
            return index

    monkeypatch.setattr(data_workers, "_SECONDS_TO_BEGIN", (1.0, 30.0))
    with new_source(Writing(), 2) as source:
        _after_fork[:] = [int, _hang]
        assert len(list(source.batches(lambda: requests(6)))) == 6
        assert {int(path.name) for path in tmp_path.iterdir()} == {
            child.pid for child in multiprocessing.active_children()
        }


def test_what_a_worker_raises_while_it_begins_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_workers, "_SECONDS_TO_BEGIN", (30.0,))
    start = threading.Thread.start

    def failing_once(thread: threading.Thread) -> None:
        threading.Thread.start = start  # type: ignore[method-assign]
        raise RuntimeError("can't start new thread")

    def only_in_workers() -> None:
        threading.Thread.start = failing_once  # type: ignore[method-assign]

    with new_source(Numbers(), 1) as source:
        _after_fork[:] = [only_in_workers]
        with pytest.raises(RuntimeError, match="can't start new thread"):
            list(source.batches(lambda: requests(6)))


def test_workers_that_are_started_before_a_fork_fails_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork
    left = [fork]

    def failing() -> int:
        if not left:
            raise BlockingIOError("Resource temporarily unavailable")
        return left.pop()()

    monkeypatch.setattr(os, "fork", failing)
    with new_source(Numbers(), 2) as source:
        with pytest.raises(BlockingIOError):
            list(source.batches(lambda: requests(6)))
        assert not multiprocessing.active_children()
        monkeypatch.setattr(os, "fork", fork)
        assert len(list(source.batches(lambda: requests(6)))) == 6


@pytest.mark.parametrize("at", ["the start", "a batch"])
def test_an_interrupted_iteration_leaves_no_workers_that_are_out_of_step(at: str) -> None:
    """Ctrl-C while something is waited for: what comes late must not be taken for something else."""

    class Slow(Numbers):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.5 if index >= 4 else 0.0)
            return index

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with new_source(Slow(), 2) as source:
        one = source.batches(lambda: requests(4))
        assert next(one).tolist() == [0, 1]
        timer = threading.Timer(0.2, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(one if at == "a batch" else source.batches(lambda: requests(4)))
        timer.join()
        assert not multiprocessing.active_children()
        assert [batch.tolist() for batch in source.batches(lambda: requests(4))] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_an_iteration_does_not_go_on_after_one_that_could_not_begin() -> None:
    with new_source(Numbers(), 1) as source:
        one = source.batches(lambda: requests(50))
        pid = int(next(one)[1][0])
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(UserError, match=f"pid {pid}"):
            next(source.batches(lambda: requests(50)))
        with pytest.raises(UserError, match="after another one has begun"):
            next(one)


_START_METHOD = """
import multiprocessing, sys
from distaccum.loaders import _worker_internals
from distaccum.loaders import workers as data_workers
from loading import WITH_WORKERS, Numbers, new_source, requests

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    data_workers._SECONDS_TO_BEGIN = (30.0,)
    with new_source(Numbers(), 2) as source:
        for _ in range(2):
            print(len(list(source.batches(lambda: requests(6)))))
"""


_TRACKER = r"\S*resource_tracker\.py:\d+: UserWarning: resource_tracker: "
_GONE_ALREADY = re.compile(
    rf"(?:{_TRACKER}There appear to be \d+ leaked semaphore objects .*\n  .*\n)?"
    rf"(?:{_TRACKER}'/mp-\w+': \[Errno 2\] No such file or directory\n  .*\n)+"
)
"""Python's own tracker, which takes a semaphore for left behind that its process has just removed. Seen under load."""


@pytest.mark.timeout(180)  # the package is imported three times
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_every_kind(method: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_START_METHOD)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), method],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = _GONE_ALREADY.sub("", done.stderr)
    assert (done.returncode, done.stdout, said) == (0, "6\n6\n", "")


def test_workers_that_never_begin_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_workers, "_SECONDS_TO_BEGIN", (0.2, 0.3))
    with new_source(Numbers(), 1) as source:
        _after_fork[:] = [_hang, _hang]
        with pytest.raises(UserError, match=r"training data were started 2 times and never began"):
            list(source.batches(lambda: requests(6)))
        assert not _after_fork
        assert not multiprocessing.active_children()
        monkeypatch.setattr(data_workers, "_SECONDS_TO_BEGIN", (30.0,))
        assert len(list(source.batches(lambda: requests(6)))) == 6


def test_a_worker_that_dies_before_it_begins_is_not_started_anew() -> None:
    with new_source(Numbers(), 2) as source:
        _after_fork[:] = [int, lambda: os.kill(os.getpid(), signal.SIGKILL)]
        with pytest.raises(UserError, match="was killed by SIGKILL"):
            list(source.batches(lambda: requests(6)))
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("persistent", [True, False])
def test_a_killed_worker_is_one_message(persistent: bool) -> None:
    with new_source(Numbers(), 2, persistent=persistent) as source:
        batches = source.batches(lambda: requests(200))
        pid = int(next(batches)[1][0])
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)  # torch would raise here, in the middle of whatever the training does
        with pytest.raises(UserError) as caught:
            list(batches)
        assert len(list(source.batches(lambda: requests(5)))) == 5  # with new workers
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

    with new_source(Deadly(), 1) as source:
        started = time.monotonic()
        with pytest.raises(UserError, match="was killed by SIGKILL"):
            list(source.batches(lambda: requests(10)))
        assert time.monotonic() - started < 4.9  # noticed by the signal; torch looks every 5 s only


def test_workers_killed_at_any_moment() -> None:
    chance = random.Random(0)
    for _ in range(40):
        with new_source(Numbers(), 2) as source:
            batches = source.batches(lambda: requests(100_000))
            pid = int(next(batches)[1][0])
            killer = threading.Timer(chance.random() / 50, os.kill, (pid, signal.SIGKILL))
            killer.start()
            with pytest.raises(UserError, match=f"pid {pid}. was killed by SIGKILL"):
                list(batches)
            killer.join()


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's thread that pins memory runs on a machine without a GPU too, and pins nothing."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: None)
    monkeypatch.setattr(torch.utils.data._utils.pin_memory, "pin_memory", lambda data, device: data)


class Large(Numbers):
    """More than a pipe holds: a worker can die in the middle of it."""

    def __getitem__(self, index: int) -> Any:
        return os.getpid(), bytes(1_000_000)


def _has_pinning_thread() -> bool:
    return any("_pin_memory_loop" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("persistent", [True, False])
def test_one_iteration_after_another_with_pinned_memory(persistent: bool, pinning: None) -> None:
    with new_source(Large(), 2, persistent=persistent, collate_fn=list, pin_memory=True) as source:
        for _ in range(3):
            batches = source.batches(lambda: requests(4))
            next(batches)
            assert _has_pinning_thread()
            assert len(list(batches)) == 3
    assert not _has_pinning_thread()


def test_workers_killed_in_the_middle_of_a_message_to_the_thread_that_pins(
    pinning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_worker_internals, "_SECONDS_TO_PIN", 0.5)
    chance = random.Random(0)
    for _ in range(10):
        with new_source(Large(), 2, collate_fn=list, pin_memory=True) as source:
            batches = source.batches(lambda: requests(100_000))
            pid = next(batches)[0][0]
            killer = threading.Timer(chance.random() / 50, os.kill, (pid, signal.SIGKILL))
            killer.start()
            started = time.monotonic()
            with pytest.raises(UserError, match=f"pid {pid}. was killed by SIGKILL"):
                list(batches)
            assert time.monotonic() - started < 20
            killer.join()
            assert not multiprocessing.active_children()


def test_a_worker_that_leaves() -> None:
    class Leaving(Numbers):
        def __getitem__(self, index: int) -> Any:
            os._exit(7)

    with (
        new_source(Leaving(), 1) as source,
        pytest.raises(UserError, match=r"training data \(pid \d+\) ended with status 7\."),
    ):
        list(source.batches(lambda: requests(10)))


def test_the_death_of_one_loaders_worker_leaves_the_other_alone() -> None:
    with new_source(Numbers(), 1) as one, new_source(Numbers(), 1) as other:
        pid = int(next(one.batches(lambda: requests(9)))[1][0])
        batches = other.batches(lambda: requests(9))
        next(batches)
        os.kill(pid, signal.SIGKILL)
        assert len(list(batches)) == 8
        with pytest.raises(UserError, match=f"pid {pid}"):
            next(one.batches(lambda: requests(9)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_training(number: int) -> None:
    with new_source(Numbers(), 1) as source:
        batches = source.batches(lambda: requests(50))
        pid = int(next(batches)[1][0])
        os.kill(pid, number)
        assert len(list(batches)) == 49


def test_close_ends_the_workers_and_can_be_repeated() -> None:
    with new_source(Numbers(), 2) as source:
        batches = source.batches(lambda: requests(50))
        pids = {int(next(batches)[1][0]) for _ in range(2)}
        source.close()
        source.close()
        assert not any(is_alive(pid) for pid in pids)
        with pytest.raises(UserError, match="after another one has begun"):
            next(batches)
        again = [batch[0].tolist() for batch in source.batches(lambda: requests(3))]
        assert again == [[0, 1], [2, 3], [4, 5]]


def test_close_ends_workers_after_a_failure_that_somebody_holds() -> None:
    with new_source(Numbers(), 1) as source:
        batches = source.batches(lambda: requests(50))
        pid = int(next(batches)[1][0])
        try:
            raise ValueError("in the training")
        except ValueError:
            source.close()
            assert not is_alive(pid)


def test_workers_that_are_not_kept_end_with_their_iteration() -> None:
    with new_source(Numbers(), 1, persistent=False) as source:
        pids = {int(batch[1][0]) for _ in range(2) for batch in source.batches(lambda: requests(3))}
        assert len(pids) == 2
        assert not any(is_alive(pid) for pid in pids)


def test_an_interpreter_with_workers_can_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, loading as t\n"
        "source = t.new_source(t.Numbers(), 2).__enter__()\n"
        "batches = source.batches(lambda: t.requests(50))\n"
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
    assert not any(is_alive(int(pid)) for pid in done.stdout.split())


_ORPHANS = """
import os, signal, sys, time
from torch.utils.data._utils import worker
from distaccum.loaders import _worker_internals
from distaccum.loaders import workers as data_workers
from distaccum.loaders import fetch as fetching

def kill_training():
    print(os.getpid(), flush=True)
    training = os.getppid()
    os.kill(training, signal.SIGKILL)
    while os.getppid() == training:
        time.sleep(0.01)

begin = data_workers._begin_worker
def begin_late(*arguments):
    kill_training()
    begin(*arguments)

class LateWatchdog(worker.ManagerWatchdog):
    def __init__(self):
        kill_training()
        super().__init__()

if sys.argv[1] == "before it begins":
    data_workers._begin_worker = begin_late
elif sys.argv[1] == "before it looks at its parent":
    worker.ManagerWatchdog = LateWatchdog
class Pids:
    def __getitem__(self, index):
        return os.getpid()

fetcher = fetching.MicroBatches(Pids(), list, "training", seed=0)
source = fetching.BatchSource(fetcher, fetching.LoaderOptions(num_workers=1))
for pids in source.batches(lambda: (fetching.Request(0, [index]) for index in range(1000))):
    print(pids[0], flush=True)
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


class _Unpicklable(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda: None


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_dataset_that_can_not_be_handed_to_workers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn")
    )
    said = r"^the worker processes that load the training data can't work, as the dataset or its collate_fn can't be "
    with new_source(_Unpicklable(), 1) as source, pytest.raises(UserError, match=said):
        next(source.batches(lambda: requests(1)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_lack_of_open_files_is_named_and_nothing_is_left() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, limits[1]))
    said = r"^the worker processes that load the training data can't work: Too many open files\. Raise that limit"
    try:
        with new_source(Numbers(), 8) as source, pytest.raises(UserError, match=said):
            list(source.batches(lambda: requests(8)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no signal for it")
def test_a_stopped_worker_ends_with_a_training_that_is_killed() -> None:
    code = (
        "import os, time; from loading import *; source = new_source(Numbers(), 1, persistent=True).__enter__()\n"
        "batches = source.batches(lambda: requests(4)); next(batches)\n"
        "import multiprocessing; print(multiprocessing.active_children()[0].pid, flush=True); time.sleep(60)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    training = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    with training:
        assert training.stdout is not None
        worker = int(training.stdout.readline())
        os.kill(worker, signal.SIGSTOP)
        training.kill()
    deadline = time.monotonic() + 5
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
