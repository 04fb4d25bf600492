"""One rank hangs, dies or fails for real: the others stop in time, and one message says which it was and where."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import HERE, torchrun

pytestmark = pytest.mark.alone

TIMEOUT_SECONDS = 4.0
"""What a rank waits for one that hangs. Where ranks die or fail, all must end without it, and a busy machine mustn't
reach it: those scenarios have a long one."""
LONG_TIMEOUT_SECONDS = 60.0
LOOKING_SECONDS = 10.0
"""Two beats, and what a busy machine adds."""
FORWARD = "the forward of micro-step 2 of update 3"
SYNC = "the gradient sync of update 3"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    world_size: int
    fault: str
    rank: int
    torch_store_on_rank_0: bool = False
    """Rank 0 holds torch's own store too, instead of the launcher."""
    busy_survivors: bool = False
    """They are away from collectives when the fault happens."""
    outlives_sigterm: bool = False
    """As a run does that saves before it leaves."""
    times_out: bool = False
    """Ends by a rank's timeout."""
    options: tuple[str, ...] = ()

    def run(self, folder: Path) -> subprocess.CompletedProcess[str]:
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if self.torch_store_on_rank_0 else {}
        if self.busy_survivors:
            environment["SLOW_FORWARD_SECONDS"] = "4.5"
        if self.busy_survivors or self.outlives_sigterm:
            environment["OUTLIVES_SIGTERM"] = "1"
        seconds = TIMEOUT_SECONDS if self.times_out else LONG_TIMEOUT_SECONDS
        arguments = (str(folder), self.fault, str(self.rank), str(seconds))
        command = (*self.options, str(HERE / "hanging.py"), *arguments)
        return torchrun(self.world_size, *command, **environment)


HANGS = Scenario(world_size=4, fault="sleeps_in_forward", rank=1, outlives_sigterm=True, times_out=True)
HANGS_LOCKED = Scenario(world_size=2, fault="sleeps_with_the_gil", rank=1, times_out=True)
STOPS = Scenario(world_size=2, fault="stops", rank=0, times_out=True)
KILLED = (
    # The launcher's signal, which follows at once, must not end another rank before the one that speaks looks around.
    Scenario(world_size=4, fault="is_killed", rank=1, outlives_sigterm=True),
    Scenario(world_size=2, fault="is_killed", rank=1, busy_survivors=True),
    Scenario(world_size=2, fault="is_killed", rank=0),
    Scenario(world_size=4, fault="is_killed", rank=0, torch_store_on_rank_0=True, busy_survivors=True),
)
CROSSED = Scenario(world_size=2, fault="comes_to_another_collective", rank=1, times_out=True)
BAD_INPUT = Scenario(world_size=2, fault="has_bad_input", rank=0, busy_survivors=True)
RESTARTED = Scenario(world_size=2, fault="is_killed_then_has_a_bug", rank=1, options=("--max-restarts=1",))


@functools.cache
def _all_runs() -> tuple[tempfile.TemporaryDirectory[str], dict[Scenario, subprocess.CompletedProcess[str]]]:
    """All scenarios, at once: they spend most of it waiting."""
    scenarios = (HANGS, HANGS_LOCKED, STOPS, *KILLED, CROSSED, BAD_INPUT, RESTARTED)
    holder = tempfile.TemporaryDirectory()
    folders = [Path(holder.name, str(number)) for number in range(len(scenarios))]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(len(scenarios)) as pool:
        done = pool.map(Scenario.run, scenarios, folders)
        return holder, dict(zip(scenarios, done, strict=True))


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    if _all_runs.cache_info().currsize:
        _all_runs()[0].cleanup()
        _all_runs.cache_clear()


def _outcome(scenario: Scenario) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The finished launch, and the folder that its ranks wrote to."""
    holder, runs = _all_runs()
    return runs[scenario], Path(holder.name, str(list(runs).index(scenario)))


def _only_message(done: subprocess.CompletedProcess[str]) -> str:
    """The one message that all ranks together wrote, and no traceback but the launcher's."""
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, done.stderr
    assert 'hanging.py", line' not in done.stderr, done.stderr
    return messages[0].removeprefix("error: ")


def _seconds(folder: Path) -> list[float]:
    """How long each rank that ended by itself had worked."""
    return [float(path.read_text()) for path in folder.glob("seconds*")]


def test_a_rank_that_hangs_is_named_with_its_stack() -> None:
    done, folder = _outcome(HANGS)
    message, log = _only_message(done), folder / "rank1.log"
    assert message.startswith(f"rank 1 has not come to {SYNC} within 4 s: it has been in {FORWARD} for ")
    assert "hanging.py:" in message
    assert f"(sleeps_in_forward). Its stack is in {log}. " in message
    assert f"in {FORWARD}: another rank has failed; the stacks of all threads follow" in log.read_text()
    assert "in sleeps_in_forward\n" in log.read_text()
    assert max(_seconds(folder)) < TIMEOUT_SECONDS + LOOKING_SECONDS


def test_a_rank_that_neither_signal_nor_broken_connection_ends_leaves_by_itself() -> None:
    _, folder = _outcome(HANGS)
    assert "left 4 s after another rank's failure" in (folder / "rank1.log").read_text()


def test_a_rank_that_hangs_with_the_interpreter_locked_is_named_with_its_stack() -> None:
    done, folder = _outcome(HANGS_LOCKED)
    message = _only_message(done)
    assert message.startswith("rank 1 gives no sign of life, although the process is there: ")
    assert f"Last heard of in {FORWARD}. Its stack is in {folder}/rank1.log." in message
    assert "in sleeps_with_the_gil\n" in (folder / "rank1.log").read_text()


def test_a_rank_that_is_stopped_is_named_although_it_holds_the_ranks_store() -> None:
    done, folder = _outcome(STOPS)
    message = _only_message(done)
    assert message.startswith("rank 0 is stopped, by SIGSTOP or by a debugger (process ")
    assert f"Last heard of in {FORWARD}. " in message
    assert max(_seconds(folder)) < TIMEOUT_SECONDS + LOOKING_SECONDS


@pytest.mark.parametrize("scenario", KILLED)
def test_a_rank_that_is_killed_is_named(scenario: Scenario) -> None:
    done, _ = _outcome(scenario)
    assert _only_message(done) == (
        f"rank {scenario.rank} is gone: killed, perhaps for want of memory. Last heard of in {FORWARD}. Start again "
        "with the same command: a run that has a checkpoint goes on from it."
    )


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    message = _only_message(_outcome(CROSSED)[0])
    assert message.startswith("the ranks waited for each other in vain for 4 s: rank 0 in the gradient sync of update ")
    assert f"and rank 1 in {FORWARD}. " in message


def test_bad_input_on_the_rank_that_holds_the_store_is_said_once_and_by_it() -> None:
    assert _only_message(_outcome(BAD_INPUT)[0]) == "a sample can't be read"


def test_a_bug_keeps_its_traceback_and_a_restarted_run_is_heard_too() -> None:
    """In place, and with the launcher's own store, which remembers the ranks before the restart."""
    done, _ = _outcome(RESTARTED)
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [message.partition(":")[2].partition(":")[0] for message in messages] == [" rank 1 is gone"], done.stderr
    assert done.stderr.count("[rank1]: KeyError: 'a bug in forward'") == 1, done.stderr
    assert "[rank0]" not in done.stderr, done.stderr
