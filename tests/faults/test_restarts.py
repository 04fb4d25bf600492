"""Ranks of a real torchrun and of `distaccum.launch` are killed, and those themselves."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from agents import PATIENCE_SECONDS, Agent, elastic_options, wait_for
from forking import Running
from runs import RUN, assert_each_update_once, lines_of, results, undisturbed
from zygote import Zygote

from distaccum import launch
from distaccum.errors import EXIT_INTERRUPTED, EXIT_STATUS, EXIT_UNFINISHED, UserError

UPDATES = 100
SETTINGS = [*RUN, "strategy=ddp", f"train.max_updates={UPDATES}"]
SLOW = "model.seconds=0.03"

Results = tuple[bytes, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def wanted(processes: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return undisturbed(processes, tmp_path_factory.mktemp("wanted") / "undisturbed", *SETTINGS, ranks=2)


def test_a_run_whose_rank_and_torchrun_are_killed_comes_to_the_same_bits(wanted: Results, tmp_path: Path) -> None:
    """By a torchrun as users start it, whose store ends with it: a rank is restarted in place, torchrun by the same
    command, however it was killed."""
    weights, lines = wanted
    folder = tmp_path / "killed"
    folder.mkdir()
    command = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "distaccum.train", *SETTINGS, SLOW]
    with ExitStack() as stack:

        def started(name: str, update: int) -> Agent:
            agent = Agent(*command, folder=folder, name=name)
            stack.callback(agent.kill_all)
            wait_for(lambda: len(lines_of(folder)) >= update, [agent])
            return agent

        agent = started("first", update=10)
        before = agent.workers()
        os.kill(before[1], signal.SIGKILL)
        wait_for(lambda: not before.items() & (now := agent.workers()).items() and len(now) == 2, [agent])
        wait_for(lambda: "rank 1 is gone: killed" in agent.output, [agent])
        wait_for(lambda: len(lines_of(folder)) >= 30, [agent])
        for number, kill in enumerate((killed, asked_again_and_again), 1):
            ranks = agent.workers()
            kill(agent.process)
            # The kernel tells the ranks, which save and leave.
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), [agent], may_end=True)  # noqa: B023
            assert agent.output.count("going on from run/checkpoints/update-") == 1
            assert "stopped        by SIGTERM after update" in agent.output
            assert (folder / "run" / "unfinished.json").exists()
            if number == 2:
                (folder / "hurry").touch()
            agent = started(f"again {number}", update=30 + 20 * number)
        assert agent.process.wait(60) == 0, agent.output
        assert agent.output.count("going on from run/checkpoints/update-") == 1
    same_weights, same_lines = results(folder)
    assert_each_update_once(same_lines, UPDATES)
    assert same_lines == lines
    assert same_weights == weights


def killed(launcher: Running) -> None:
    launcher.kill()
    launcher.wait()


def asked_again_and_again(launcher: Running) -> None:
    while launcher.poll() is None:
        launcher.terminate()
        time.sleep(0.02)


def test_ranks_of_several_torchruns_that_are_restarted_find_each_other(tmp_path: Path) -> None:
    """The agents' store, which all share, still has the addresses of the ranks before."""
    command = ["--max-restarts=1", "-m", "late", "5", *SETTINGS, SLOW, "data.num_workers=0"]
    with ExitStack() as stack:
        agents = []
        for options in elastic_options(2, nodes="2"):
            agents.append(Agent(*options, *command, folder=tmp_path))
            stack.callback(agents[-1].kill_all)
        wait_for(lambda: len(lines_of(tmp_path)) >= 4, agents)
        (victim,) = agents[1].workers().values()
        os.kill(victim, signal.SIGKILL)
        (tmp_path / "hurry").touch()
        wait_for(lambda: all(agent.process.poll() == 0 for agent in agents), agents, may_end=True)
    assert_each_update_once(lines_of(tmp_path), UPDATES)


def test_a_run_whose_rank_and_launcher_are_killed_comes_to_the_same_bits(wanted: Results, tmp_path: Path) -> None:
    """Under `distaccum.launch`, which forks its ranks: one is restarted in place; the launcher is asked to stop, is
    started again, and is killed."""
    weights, lines = wanted
    command = ["--nproc-per-node=2", "--max-restarts=1", *SETTINGS, SLOW]
    with ExitStack() as stack:

        def started(name: str, update: int) -> Agent:
            agent = Agent(*command, folder=tmp_path, name=name, launcher=True)
            stack.callback(agent.kill_all)
            wait_for(lambda: len(lines_of(tmp_path)) >= update, [agent])
            return agent

        agent = started("first", update=10)
        before = agent.workers()
        assert before.keys() == {0, 1}
        os.kill(before[1], signal.SIGKILL)
        wait_for(lambda: not before.items() & (now := agent.workers()).items() and len(now) == 2, [agent])
        wait_for(lambda: len(lines_of(tmp_path)) >= 30, [agent])
        agent.process.terminate()
        assert agent.process.wait(PATIENCE_SECONDS) == EXIT_UNFINISHED, agent.output
        for said in ("error: rank 1 is gone: killed", "going on from run/", "stopped        by SIGTERM after update"):
            assert agent.output.count(said) == 1, agent.output
        assert "Traceback" not in agent.output
        agent = started("again", update=50)
        ranks = agent.workers()
        killed(agent.process)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), [agent], may_end=True)
        assert agent.output.count("stopped        by SIGTERM after update") == 1, agent.output
        (tmp_path / "hurry").touch()
        agent = started("to the end", update=50)
        assert agent.process.wait(PATIENCE_SECONDS) == 0, agent.output
    same_weights, same_lines = results(tmp_path)
    assert same_lines == lines
    assert same_weights == weights


def test_ranks_of_the_launcher_are_as_if_started_by_themselves(tmp_path: Path) -> None:
    """And a mistake ends with one message and its status."""
    agent = Agent("--nproc-per-node=2", "-m", "launched", "data.train.no=${local_rank}", folder=tmp_path, launcher=True)
    assert agent.process.wait(PATIENCE_SECONDS) == EXIT_STATUS, agent.output
    assert agent.output.count("error: ") == 1, agent.output
    assert "Traceback" not in agent.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--no-python", "x"], "--no-python is not supported"),
        (["--start-method=fork", "x"], "--start-method has no meaning here"),
        (["-m"], "-m wants the name of a module"),
        (["--nnodes=3:1", "x"], "torchrun's options are wrong"),
        (["--nproc-per-node=many", "x"], "torchrun's options are wrong: Unsupported nproc_per_node value: many"),
    ],
)
def test_options_that_the_launcher_does_not_have_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        launch.parsed(options)


def test_a_failure_beside_ranks_that_a_signal_stopped_is_not_started_again() -> None:
    wanted = {
        (0, EXIT_UNFINISHED): EXIT_UNFINISHED,
        (EXIT_INTERRUPTED, EXIT_UNFINISHED): EXIT_INTERRUPTED,
        (1, EXIT_UNFINISHED): 1,
        (EXIT_UNFINISHED, EXIT_STATUS): EXIT_STATUS,
        (EXIT_STATUS, 1, EXIT_INTERRUPTED): 1,
        (3, 0): 1,
        (0, 0): 0,
    }
    assert {statuses: launch._of_all(statuses) for statuses in wanted} == wanted


def test_the_launcher_tells_options_from_overrides() -> None:
    def parsed(*words: str) -> tuple[int, str, list[str]]:
        config, module, rest = launch.parsed([*words])
        return config.nproc_per_node, module, rest

    assert parsed("--nproc_per_node=1") == (1, "distaccum.train", [])
    assert parsed("a=1", "--cfg", "job") == (1, "distaccum.train", ["a=1", "--cfg", "job"])
    assert parsed("-m", "own.loop", "--x", "1") == (1, "own.loop", ["--x", "1"])
    assert launch._number_of_ranks(["--nproc_per_node", "4", "a=1"]) == "4"
