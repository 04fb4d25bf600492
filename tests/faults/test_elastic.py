"""Two torchruns, one of which is lost with its rank and comes back: the other goes on alone meanwhile."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import pytest
from agents import Agent, elastic_options, wait_for
from runs import RUN, assert_each_update_once, lines_of, undisturbed
from zygote import Zygote

UPDATES = 100
SETTINGS = [
    *RUN,
    "strategy=ddp",
    f"train.max_updates={UPDATES}",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=2",
    "checkpoint.every_updates=1",
    "data.num_workers=0",
    "precision=fp64",
    # What a rank drops depends on the ranks there are.
    "+model.dropout=0",
]
PER_RANK_OF_TWO, ALONE = 2, 4
"""Micro-steps."""


def _micro_steps(folder: Path) -> list[int]:
    """Of all updates so far, as often as they changed."""
    return [steps for steps, _ in groupby(line["micro_steps"] for line in lines_of(folder) if "eval" not in line)]


def test_a_run_goes_on_with_the_ranks_there_are(processes: Zygote, tmp_path: Path) -> None:
    _, wanted = undisturbed(processes, tmp_path / "undisturbed", *SETTINGS, ranks=2)
    folder = tmp_path / "elastic"
    folder.mkdir()
    command = ["--max-restarts=3", "-m", "distaccum.train", *SETTINGS, "model.seconds=0.2"]
    first, second = elastic_options(2, nodes="1:2")
    with ExitStack() as stack:

        def start(options: list[str]) -> Agent:
            agent = Agent(*options, *command, folder=folder, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            stack.callback(agent.kill_all)
            return agent

        stays, goes = start(first), start(second)
        wait_for(lambda: len(lines_of(folder)) >= 4 and _micro_steps(folder)[-1] == PER_RANK_OF_TWO, [stays, goes])
        goes.kill_all()
        wait_for(lambda: _micro_steps(folder)[-1:] == [ALONE], [stays])
        comes_back = start(second)
        wait_for(lambda: _micro_steps(folder)[-1:] == [PER_RANK_OF_TWO], [stays, comes_back])
        (folder / "hurry").touch()
        assert stays.process.wait(60) == 0, stays.output
        assert comes_back.process.wait(60) == 0, comes_back.output
        lines = lines_of(folder)
        assert len(_micro_steps(folder)) >= 3, stays.output
    assert_each_update_once(lines, UPDATES)
    assert all(line["weight"] == 8 for line in lines if "eval" not in line)
    for key in ("loss", "grad_norm"):
        expected = [line[key] for line in wanted if "eval" not in line]
        assert [line[key] for line in lines if "eval" not in line] == pytest.approx(expected, abs=1e-10, rel=0)
    expected = [line["eval"]["loss"] for line in wanted if "eval" in line]
    assert [line["eval"]["loss"] for line in lines if "eval" in line] == pytest.approx(expected, abs=1e-10, rel=0)
