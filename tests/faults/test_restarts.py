"""Ranks of a real torchrun are killed, and torchrun itself."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from agents import Agent, elastic_options, wait_for
from forking import Running
from runs import RUN, assert_each_update_once, lines_of, results, undisturbed
from zygote import Zygote

UPDATES = 100
SETTINGS = [*RUN, "strategy=ddp", f"train.max_updates={UPDATES}"]
SLOW = "model.seconds=0.03"


def test_a_run_whose_rank_and_torchrun_are_killed_comes_to_the_same_bits(processes: Zygote, tmp_path: Path) -> None:
    """By a torchrun as users start it, whose store ends with it: a rank is restarted in place, torchrun by the same
    command, however it was killed."""
    weights, lines = undisturbed(processes, tmp_path / "undisturbed", *SETTINGS, ranks=2)
    folder = tmp_path / "killed"
    folder.mkdir()
    command = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "distaccum.train", *SETTINGS, SLOW]
    with ExitStack() as stack:

        def started(name: str, update: int) -> Agent:
            agent = Agent(*command, folder=folder, name=name, shares_store=True)
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


def test_restarts_by_several_torchruns_that_share_a_store_succeed_or_say_what_to_set(tmp_path: Path) -> None:
    """A rank that is back before another one finds where that one was before: if it is to connect there, it can't.

    Which of two ranks connects to the other, gloo decides by their addresses, so it is chance.
    """
    command = ["--max-restarts=1", "-m", "late", "5", *SETTINGS, SLOW, "data.num_workers=0"]
    # A rank may also wait in vain for the other one to connect.
    command.append("distributed.timeout_seconds=15")

    def has_failed() -> bool:
        return "error: the ranks can't connect to each other: " in agents[0].output

    with ExitStack() as stack:
        agents = []
        for options in elastic_options(2, nodes="2"):
            agents.append(Agent(*options, *command, folder=tmp_path, shares_store=True))
            stack.callback(agents[-1].kill_all)
        wait_for(lambda: len(lines_of(tmp_path)) >= 4, agents)
        (victim,) = agents[1].workers().values()
        os.kill(victim, signal.SIGKILL)
        (tmp_path / "hurry").touch()
        wait_for(lambda: has_failed() or all(agent.process.poll() == 0 for agent in agents), agents, may_end=True)
    if has_failed():
        assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started" in agents[0].output
    else:
        assert_each_update_once(lines_of(tmp_path), UPDATES)
