"""Beats of one process; tests/distributed has ranks that hang and die."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from distaccum.runtime import heartbeat
from distaccum.runtime.diagnosis import Sign, State, this_host
from distaccum.runtime.heartbeat import Heartbeat, answer

pytestmark = pytest.mark.alone

BEAT = 0.05


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", BEAT)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def beating(store: dist.TCPStore) -> Iterator[Heartbeat]:
    made = Heartbeat(0, 2)
    made.start(store, timeout_seconds=30)
    yield made
    made.stop()


def _sign(store: dist.TCPStore, rank: int = 0) -> Sign:
    return Sign.from_json(store.get(f"heartbeat/{rank}"))


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within a few seconds."""
    deadline = time.monotonic() + 10
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(BEAT / 2)
    return done


def test_before_it_starts_it_only_remembers() -> None:
    silent = Heartbeat(0, 1)
    silent.doing("forward", update=1)
    silent.fail()
    silent.stop()
    assert not silent.is_beating


def test_what_the_rank_does_is_told(store: dist.TCPStore, beating: Heartbeat) -> None:
    assert _sign(store).doing == "the start of the run"
    beating.doing("forward", update=7, micro_step=3)
    assert _soon(lambda: _sign(store).doing == "the forward of micro-step 3 of update 7")
    assert not _sign(store).waits
    with beating.waiting_in("exchange"):
        assert _soon(lambda: _sign(store).doing == "the exchange" and _sign(store).waits)
    assert _soon(lambda: _sign(store).doing == "the forward of micro-step 3 of update 7")


def test_what_ended_a_wait_stays_what_the_rank_was_doing(store: dist.TCPStore, beating: Heartbeat) -> None:
    with pytest.raises(RuntimeError), beating.waiting_in("exchange"):
        raise RuntimeError
    assert _soon(lambda: _sign(store).doing == "the exchange")


def test_how_long_and_where_it_has_been_is_told(store: dist.TCPStore, beating: Heartbeat) -> None:
    beating.doing("forward")
    # Said of the main thread, which is here.
    assert _soon(lambda: _sign(store).seconds > 10 * BEAT and __file__ in _sign(store).where)
    assert _sign(store).where.endswith(("(_soon)", "(<lambda>)", "(_sign)"))
    beating.doing("backward")
    assert _soon(lambda: _sign(store).doing == "the backward" and _sign(store).seconds < 10 * BEAT)


def test_goodbyes_tell_success_from_failure(store: dist.TCPStore, beating: Heartbeat) -> None:
    other = Heartbeat(1, 2)
    other.start(store, timeout_seconds=30)
    other.fail()
    other.stop()
    assert _sign(store, 1).state is State.failed
    assert _soon(lambda: beating.someone_failed)
    beating.stop()
    assert _sign(store).state is State.left


def _own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("distaccum-heartbeat", "distaccum-store")]


def test_stopping_leaves_no_thread(beating: Heartbeat) -> None:
    assert _own_threads()
    beating.stop()
    beating.stop()
    assert not _own_threads()


def test_its_own_failure_is_not_another_ranks(store: dist.TCPStore, beating: Heartbeat) -> None:
    beating.fail()
    assert _soon(lambda: _sign(store).state is State.failed and store.check(["failed"]))
    time.sleep(3 * BEAT)
    assert not beating.someone_failed


def test_saying_what_one_does_costs_next_to_nothing(beating: Heartbeat) -> None:
    seconds = min(timeit.repeat(lambda: beating.doing("forward", update=7, micro_step=3), number=10_000, repeat=5))
    assert seconds / 10_000 < 5e-6


def test_stacks_are_written_when_nothing_changes(tmp_path: Path, store: dist.TCPStore) -> None:
    log = tmp_path / "rank0.log"
    log.write_text("what the run has said so far\n")
    beating = Heartbeat(0, 2)
    beating.log_to(log)
    beating.start(store, timeout_seconds=10 * BEAT)
    try:
        beating.doing("forward")
        assert _soon(lambda: "Timeout" in log.read_text() and "test_stacks_are_written" in log.read_text())
        assert log.read_text().startswith("what the run has said so far\n")
        assert _sign(store).log == str(log)
    finally:
        beating.stop()


def test_no_stacks_are_written_while_something_changes(tmp_path: Path, beating: Heartbeat) -> None:
    beating.timeout_seconds = 2.0
    beating.log_to(tmp_path / "rank0.log")
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        beating.doing("forward")
        time.sleep(BEAT)
    assert (tmp_path / "rank0.log").read_text() == ""


def test_a_wait_that_no_exception_ends_is_ended_after_the_timeout(store: dist.TCPStore) -> None:
    stuck: list[BaseException] = []
    beating = Heartbeat(0, 2)
    beating.start(store, timeout_seconds=10 * BEAT, on_stuck=stuck.append)
    try:
        beating.doing("forward")
        time.sleep(15 * BEAT)
        assert not stuck  # busy: it keeps others waiting, not the other way round
        beating.doing("gradient sync", waits=True)
        assert _soon(lambda: bool(stuck))
        assert isinstance(stuck[0], TimeoutError)
        assert _sign(store).state is State.failed
    finally:
        beating.stop()


def test_a_wait_for_a_process_that_is_gone_is_ended_at_once(store: dist.TCPStore) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    gone = Sign(
        rank=1,
        beat=1,
        state=State.running,
        doing="the backward",
        waits=False,
        seconds=0.0,
        where="",
        host=this_host(),
        pid=process.pid,
        log="",
    )
    store.set("heartbeat/1", gone.to_json())
    messages: list[str] = []
    beating = Heartbeat(0, 2)
    beating.start(store, 30, on_stuck=lambda error: messages.append(beating.explain(error)))
    try:
        beating.doing("gradient sync", update=2, waits=True)
        assert _soon(lambda: bool(messages))
        assert messages[0].startswith(
            "rank 1 is gone: killed, perhaps for want of memory. Last heard of in the backward."
        )
    finally:
        beating.stop()


def test_a_store_that_never_answers_is_not_waited_for() -> None:
    forever = threading.Event()
    with pytest.raises(TimeoutError):
        answer(forever.wait, seconds=0.1)
    forever.set()
    assert answer(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        answer(lambda: 1 / 0)


def test_an_error_before_the_first_beat_is_explained_by_itself() -> None:
    message = Heartbeat(0, 2).explain(
        RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer. GLHF")
    )
    assert message == (
        "the connection between the ranks broke before the run began, as when a rank is ended: "
        "[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer."
    )
