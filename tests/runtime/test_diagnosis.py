"""What is said of ranks that died or hung; tests/distributed has real ones."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from distaccum.runtime.diagnosis import (
    Fate,
    Sign,
    State,
    explain,
    is_broken_collective,
    judge,
    process_state,
    this_host,
)

GLOO_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:45198."
TIMED_OUT = RuntimeError("[…/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation")
CLOSED = RuntimeError(GLOO_CLOSED)
ELSEWHERE = "another host"


def _sign(rank: int, doing: str = "the forward of update 3", **fields: object) -> Sign:
    sign = Sign(
        rank=rank,
        beat=5,
        state=State.running,
        doing=doing,
        waits=False,
        seconds=4.2,
        where="",
        host=this_host(),
        pid=os.getpid(),
        log="",
    )
    return dataclasses.replace(sign, **fields)


def _later(sign: Sign, **fields: object) -> Sign:
    return dataclasses.replace(sign, **{"beat": sign.beat + 2, **fields})


ME = _sign(0, "the gradient sync of update 3", waits=True)


def test_a_sign_survives_the_store() -> None:
    sign = _sign(2, state=State.failed, where="model.py:3 (forward)", log="/run/logs/rank2.log")
    assert Sign.from_json(sign.to_json().encode()) == sign


@pytest.mark.parametrize(
    "error",
    [
        CLOSED,
        TIMED_OUT,
        RuntimeError("Connection reset by peer"),
        RuntimeError("Gloo connectFullMesh failed with …"),
        dist.DistBackendError("NCCL error: remote process exited"),
        dist.DistNetworkError("failed to recv"),
    ],
)
def test_errors_of_broken_collectives_are_known(error: Exception) -> None:
    assert is_broken_collective(error)
    wrapped = ValueError("can't save")
    wrapped.__cause__ = error
    assert is_broken_collective(wrapped)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes don't fit"), KeyError("gloo"), TimeoutError("Timed out waiting for a sample"), OSError()],
)
def test_other_errors_are_not_taken_for_broken_collectives(error: Exception) -> None:
    assert not is_broken_collective(error)


def test_an_error_that_came_while_another_was_handled_keeps_its_own_meaning() -> None:
    bug = KeyError("a bug")
    bug.__context__ = CLOSED
    assert not is_broken_collective(bug)


def test_processes_are_seen_running_stopped_and_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        sign = _sign(1, pid=process.pid)
        assert process_state(sign) is None
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert process_state(sign) is Fate.stopped
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(sign) is Fate.gone  # a zombie
    assert process_state(sign) is Fate.gone
    assert process_state(dataclasses.replace(sign, host=ELSEWHERE)) is None


def test_a_rank_is_judged_by_whether_it_still_beats() -> None:
    busy, waiting = _sign(1), _sign(1, waits=True)
    assert judge(busy, _later(busy)) is Fate.busy
    assert judge(waiting, _later(waiting)) is Fate.waiting
    assert judge(busy, _later(busy, beat=busy.beat)) is Fate.mute
    assert judge(None, busy) is Fate.busy  # it has only just begun to beat
    assert judge(busy, _later(busy, state=State.failed)) is Fate.failed
    assert judge(busy, _later(busy, state=State.left)) is Fate.left
    far = _sign(1, host=ELSEWHERE)
    assert judge(far, _later(far, beat=far.beat)) is Fate.gone


def test_a_rank_that_the_launcher_has_ended_meanwhile_is_not_the_cause() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    ended = _sign(1, pid=process.pid)
    assert judge(ended, _later(ended, beat=ended.beat)) is Fate.failed


def _explained(error: Exception = TIMED_OUT, **others: list[Sign]) -> str:
    return explain(ME, {Fate[name]: signs for name, signs in others.items()}, timeout_seconds=10, error=error)


def test_a_hung_rank_is_said_to_keep_the_others_waiting() -> None:
    hung = _sign(2, "the forward of micro-step 3 of update 3", seconds=12.3, where="model.py:3 (forward)", log="a.log")
    assert _explained(busy=[hung], failed=[_sign(1)]) == (
        "rank 2 has not come to the gradient sync of update 3 within 10 s: it has been in the forward of micro-step 3 "
        "of update 3 for 12 s, at model.py:3 (forward). Its stack is in a.log. If it is only slow, raise "
        "distributed.timeout_seconds."
    )


def test_the_dead_come_before_the_busy() -> None:
    assert _explained(gone=[_sign(3, host=ELSEWHERE)], busy=[_sign(2)]) == (
        "rank 3 is gone: killed, out of memory, or the host is down. Last heard of in the forward of update 3. Start "
        "again with the same command: a run that has a checkpoint goes on from it."
    )


def test_several_ranks_are_named_with_what_each_did() -> None:
    message = _explained(gone=[_sign(1), _sign(3, "the evaluation")])
    assert message.startswith(
        "ranks 1 and 3 are gone: killed, perhaps for want of memory. Last heard of in the forward "
    )
    assert "in the forward of update 3 (rank 1) and the evaluation (rank 3). " in message
    many = _explained(busy=[_sign(rank, log=f"{rank}.log") for rank in range(1, 8)])
    assert many.startswith("ranks 1, 2, 3, 4 and 3 more have not come to ")
    assert "they have been in the forward of update 3 for 4 s. Their stacks are in 1.log, 2.log, 3.log, 4.log" in many


def test_a_rank_that_left_is_named() -> None:
    assert _explained(CLOSED, left=[_sign(1)]).startswith("rank 1 has left before the others. Last heard of in ")


def test_ranks_that_all_waited_are_all_named() -> None:
    message = _explained(waiting=[_sign(2, "the end of the run")], failed=[_sign(1, "the evaluation")])
    assert message.startswith(
        "the ranks waited for each other in vain for 10 s: rank 0 in the gradient sync of update 3, rank 1 in the "
        "evaluation and rank 2 in the end of the run. "
    )


def test_a_broken_connection_between_living_ranks_is_the_networks() -> None:
    message = _explained(CLOSED, busy=[_sign(1)])
    assert message.startswith("the connection between the ranks broke in the gradient sync of update 3, although all ")
    assert "Connection closed by peer" in message


def test_a_rank_that_hung_long_is_named_even_if_a_connection_broke_first() -> None:
    assert _explained(CLOSED, busy=[_sign(1, seconds=9.0)]).startswith("rank 1 has not come to the gradient sync ")
