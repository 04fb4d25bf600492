"""Signals to stop: the window is finished, the run is saved, and goes on as if nothing had happened.

Windows that can't be finished: test_unfinished_windows.py.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
from outcomes import leftovers, outcome, saved_updates, undisturbed
from starting import RUN, STEPS, Starter
from troubles import trouble

pytestmark = pytest.mark.usefixtures("here")

UNFINISHED = Path("run/unfinished.json")


def goes_on(runs: Starter, *settings: str, ranks: int = 1) -> None:
    """Starts the same command again, and compares what it comes to with an undisturbed run."""
    ended = runs.run(*RUN, *settings, ranks=ranks)
    assert ended.statuses == [0] * ranks, ended
    assert not UNFINISHED.exists()
    assert outcome() == undisturbed(runs, *settings, ranks=ranks)


def assert_stopped(out: str, update: int, name: str, *, in_words: str | None = None) -> None:
    assert f"stopped        by {in_words or name} after update {update} of 8; saved; start again with the same" in out
    marker = json.loads(UNFINISHED.read_text())
    assert (marker["update"], marker["signal"]) == (update, name)
    assert saved_updates()[0] == update
    assert leftovers() == []


@pytest.mark.parametrize("do", ["draw", "move buffer"])
def test_a_run_that_goes_on_with_another_state_is_noticed(runs: Starter, do: str) -> None:
    """The comparison with an undisturbed run can fail: one number more drawn is enough, or a moved statistic."""
    assert runs.run(*RUN, troubles=[trouble("forward", "SIGTERM", nth=in_update(4, 3))]).statuses == [75]
    assert runs.run(*RUN, troubles=[trouble("forward", do)]).statuses == [0]
    assert outcome()[0] != undisturbed(runs)[0]


def in_update(number: int, step: int, ranks: int = 1) -> int:
    """Which forward it is."""
    return (number - 1) * (STEPS // ranks) + step


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_the_window_is_finished_and_saved(runs: Starter, name: str, status: int) -> None:
    again = [trouble("forward", "SIGTERM", nth=in_update(4, 4))] if name == "SIGTERM" else []
    ended = runs.run(*RUN, troubles=[trouble("forward", name, nth=in_update(4, 3)), *again])
    assert ended.statuses == [status]
    assert_stopped(ended.out, 4, name, in_words="Ctrl-C" if name == "SIGINT" else None)
    said = "\nstopping after this update, and saving; Ctrl-C again to leave at once\n"
    assert ended.err == (said if name == "SIGINT" else "")
    goes_on(runs)


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 1), ("ddp", None), ("fsdp", 1)])
def test_ranks_stop_together(runs: Starter, strategy: str, rank: int | None) -> None:
    placement = f"strategy={strategy}"
    troubles = [trouble("forward", "SIGUSR1", nth=in_update(5, 2, 2), rank=rank)]
    ended = runs.run(*RUN, placement, ranks=2, troubles=troubles)
    assert (ended.statuses, ended.err) == ([75, 75], "")
    assert_stopped(ended.out, 5, "SIGUSR1")
    goes_on(runs, placement, ranks=2)


SLOW = "0.2"


@pytest.mark.parametrize("when", [None, 3], ids=["never", "in the last micro-step"])
def test_a_window_that_one_rank_cannot_drop_is_finished(runs: Starter, when: int | None) -> None:
    """The other rank hears of no signal, or too late: it waits in the gradient sync, where it can't be left alone."""
    later = [trouble("forward", "SIGTERM", nth=in_update(2, when, 2), rank=1)] if when else []
    ended = runs.run(
        *RUN,
        "checkpoint.grace_seconds=0.4",
        ranks=2,
        troubles=[trouble("forward", "SIGTERM", nth=in_update(2, 1, 2)), *later],
        SECONDS_PER_FORWARD=SLOW,
    )
    assert (ended.statuses, ended.err) == ([75, 75], "")
    assert_stopped(ended.out, 2, "SIGTERM")
    goes_on(runs, ranks=2)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("update", [3, 8])
def test_an_evaluation_that_was_due_is_made_up_for(runs: Starter, ranks: int, update: int) -> None:
    ended = runs.run(*RUN, ranks=ranks, troubles=[trouble("forward", "SIGTERM", nth=in_update(update, 2, ranks))])
    assert ended.statuses == [75] * ranks, ended
    assert f"evaluation after update {update}" not in ended.out
    assert_stopped(ended.out, update, "SIGTERM")
    goes_on(runs, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_during_an_evaluation(runs: Starter, ranks: int) -> None:
    ended = runs.run(*RUN, ranks=ranks, troubles=[trouble("forward of an evaluation", "SIGTERM", rank=ranks - 1)])
    assert ended.statuses == [75] * ranks, ended
    assert_stopped(ended.out, saved_updates()[0], "SIGTERM")
    goes_on(runs, ranks=ranks)


@pytest.mark.alone
def test_a_signal_during_an_evaluation_that_takes_too_long(runs: Starter) -> None:
    grace = "checkpoint.grace_seconds=1"
    slow = [trouble("forward of an evaluation", "sleep", nth=nth, seconds=1) for nth in range(1, 21)]
    began = time.monotonic()
    ended = runs.run(
        *RUN, grace, "train.eval_batch_size=1", troubles=[trouble("forward of an evaluation", "SIGTERM", nth=2), *slow]
    )
    assert time.monotonic() - began < 15, "it would take 20 s"
    assert ended.statuses == [75], ended
    assert "evaluation after update 3 (epoch 0)" not in ended.out
    assert_stopped(ended.out, 3, "SIGTERM")
    goes_on(runs, "train.eval_batch_size=1")


@pytest.mark.parametrize("rank", [1, None], ids=["one", "all"])
def test_ranks_drop_an_evaluation_together_or_finish_it(runs: Starter, rank: int | None) -> None:
    """Of 10 batches each; what one rank alone has heard of is finished, as the other one waits at its end."""
    batches = "train.eval_batch_size=1"
    troubles = [trouble("forward of an evaluation", "SIGTERM", nth=4, rank=rank)]
    slow = [trouble("forward of an evaluation", "sleep", nth=nth, rank=None, seconds=0.1) for nth in range(4, 11)]
    ended = runs.run(*RUN, batches, ranks=2, troubles=[*troubles, *slow])
    assert (ended.statuses, ended.err) == ([75, 75], "")
    assert ("evaluation after update 3 (epoch 0)" in ended.out) == (rank is not None)
    assert_stopped(ended.out, 3 if rank is None else 4, "SIGTERM")
    goes_on(runs, batches, ranks=2)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_a_signal_while_the_run_is_built(runs: Starter, ranks: int, rank: int) -> None:
    """Both at the first start and when it goes on."""
    troubles = [trouble("building", "SIGTERM", rank=rank)]
    for update in (1, 2):
        ended = runs.run(*RUN, ranks=ranks, troubles=troubles)
        assert ended.statuses == [75] * ranks, ended
        assert_stopped(ended.out, update, "SIGTERM")
    goes_on(runs, ranks=ranks)


def test_a_signal_at_any_time_of_the_start_loses_nothing(runs: Starter) -> None:
    for milliseconds in range(0, 200, 25):
        started = runs.start(*RUN, SECONDS_PER_FORWARD="0.005")
        time.sleep(milliseconds / 1000)
        os.kill(started.pids[0], signal.SIGTERM)
        ended = started.ended()
        assert ended.statuses in ([-signal.SIGTERM], [75]), ended
        assert "Traceback" not in ended.err
    goes_on(runs)


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not seen in time"
        time.sleep(0.01)


@pytest.mark.alone
def test_a_second_ctrl_c_leaves_at_once(runs: Starter) -> None:
    slow = trouble("forward", "sleep", nth=in_update(3, 3), seconds=30)
    noted = trouble("forward", "touch", nth=in_update(3, 2), path="noted")
    once = trouble("forward", "SIGINT", nth=in_update(3, 2))
    started = runs.start(*RUN, "checkpoint.async_save=false", troubles=[once, noted, slow])
    wait_for(Path("noted").exists)
    time.sleep(0.2)
    # As a terminal does: to all processes of the group.
    began = time.monotonic()
    os.killpg(started.pids[0], signal.SIGINT)
    ended = started.ended()
    assert time.monotonic() - began < 10
    assert ended.statuses == [-signal.SIGINT]
    assert saved_updates() == [2]
    assert not UNFINISHED.exists()
    goes_on(runs)


TORCHRUN = forking.torchrun("--standalone", "--nproc_per_node=2", "-m", "distaccum.train", *RUN)


def test_torchrun_hands_a_signal_on(runs: Starter) -> None:
    done = forking.run(*TORCHRUN, TROUBLES=json.dumps([trouble("forward", "agent SIGTERM", nth=in_update(4, 1, 2))]))
    assert done.status != 0, done
    update = saved_updates()[0]
    assert 4 <= update < 8
    assert_stopped(done.out, update, "SIGTERM")
    goes_on(runs, ranks=2)


def test_ctrl_c_on_the_terminal_of_torchrun(runs: Starter) -> None:
    there = trouble("forward", "touch", nth=in_update(3, 1, 2), path="there")
    ours, theirs = pty.openpty()
    started = forking.start(
        *TORCHRUN, terminal=os.ttyname(theirs), TROUBLES=json.dumps([there]), SECONDS_PER_FORWARD="0.1"
    )
    os.close(theirs)
    wait_for(Path("there").exists)
    os.write(ours, b"\x03")
    said = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            said += os.read(ours, 65536)
        except OSError:  # nobody has the terminal open any more
            break
    status = started.wait()
    os.close(ours)
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()).replace("\r", "")
    assert status != 0, out
    assert_stopped(out, saved_updates()[0], "SIGINT", in_words="Ctrl-C")
    assert saved_updates()[0] < 8
    goes_on(runs, ranks=2)
