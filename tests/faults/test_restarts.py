"""Ranks of a real torchrun are killed, and torchrun itself."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from agents import Agent, elastic_options, wait_for
from runs import RUN, assert_each_update_once, lines_of, results, undisturbed
from zygote import Zygote

UPDATES = 100
SETTINGS = [*RUN, "strategy=ddp", f"train.max_updates={UPDATES}"]
SLOW = "model.seconds=0.03"


def test_a_run_whose_rank_and_torchrun_are_killed_comes_to_the_same_bits(processes: Zygote, tmp_path: Path) -> None:
    """The rank is restarted in place by a torchrun that shares its store, torchrun by the same command."""
    weights, lines = undisturbed(processes, tmp_path / "undisturbed", *SETTINGS, ranks=2)
    folder = tmp_path / "killed"
    folder.mkdir()
    command = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "distaccum.train", *SETTINGS, SLOW]
    with ExitStack() as stack:
        agent = Agent(*command, folder=folder)
        stack.callback(agent.kill_all)
        wait_for(lambda: len(lines_of(folder)) >= 10, [agent])
        before = agent.workers()
        os.kill(before[1], signal.SIGKILL)
        wait_for(lambda: not before.items() & (now := agent.workers()).items() and len(now) == 2, [agent])
        assert "rank 1 is gone: killed" in agent.output
        wait_for(lambda: len(lines_of(folder)) >= 30, [agent])
        ranks = agent.workers()
        agent.process.kill()
        agent.process.wait()
        # The kernel tells the ranks, which save and leave.
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), [agent], may_end=True)
        assert agent.output.count("going on from run/checkpoints/update-") == 1
        assert "stopped        by SIGTERM after update" in agent.output
        assert (folder / "run" / "unfinished.json").exists()
        (folder / "hurry").touch()
        again = Agent(*command, folder=folder, name="again")
        stack.callback(again.kill_all)
        assert again.process.wait(60) == 0, again.output
        assert again.output.count("going on from run/checkpoints/update-") == 1
    same_weights, same_lines = results(folder)
    assert_each_update_once(same_lines, UPDATES)
    assert same_lines == lines
    assert same_weights == weights


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
