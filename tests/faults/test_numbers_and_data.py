"""Numbers and data that go wrong in the middle of a run, on one of its ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from outcomes import lines, outcome, saved_updates, undisturbed
from starting import RUN, STEPS, Starter
from troubles import trouble

from distaccum.planning import shuffled

pytestmark = pytest.mark.usefixtures("here")

IN_UPDATE_5 = 4 * STEPS // 2 + 2
"""The second micro-step of update 5, on 2 ranks."""

SYNC = "checkpoint.async_save=false"


def goes_on(runs: Starter, update: int, *settings: str) -> None:
    """The same command again, without the trouble."""
    assert saved_updates()[0] == update
    ended = runs.run(*RUN, *settings, ranks=2)
    assert ended.statuses == [0, 0], ended
    assert f"going on from run/checkpoints/update-{update:08d}, update {update}" in ended.out
    assert outcome() == undisturbed(runs, ranks=2)


def test_a_data_worker_that_is_killed(runs: Starter) -> None:
    settings = ["data.num_workers=2", SYNC]
    ended = runs.run(*RUN, *settings, ranks=2, troubles=[trouble("forward", "kill worker", nth=IN_UPDATE_5, rank=1)])
    said = r"a worker process that loads the training data \(pid \d+\) was killed by SIGKILL, .+ Start again: a run .+"
    assert re.fullmatch(said, ended.message), ended.message
    goes_on(runs, 4, *settings)


def test_a_sample_that_raises(runs: Starter) -> None:
    *_, sample = shuffled(range(48, 60), 100, 0, 0).tolist()  # of update 5, on rank 1
    ended = runs.run(*RUN, SYNC, ranks=2, troubles=[trouble(f"sample {sample}", "raise", rank=1)])
    assert ended.message == f"sample {sample} of the training data could not be loaded: RuntimeError: broken on purpose"
    goes_on(runs, 4)


def test_a_sample_that_raises_in_an_evaluation(runs: Starter) -> None:
    ended = runs.run(*RUN, SYNC, ranks=2, troubles=[trouble("sample 15", "raise", nth=2, rank=1)])
    assert re.fullmatch("sample 15 of the (training|evaluation) data could not be loaded: .+", ended.message)
    goes_on(runs, saved_updates()[0])


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("nan", r"update 5: the loss is nan \(rank 1, micro-step 2\)\. The parameters have not moved\. .+"),
        ("inf", r"update 5: the loss is 1\.\d+, but the norm of the gradient is (inf|nan)\. The parameters .+"),
    ],
)
def test_a_number_that_is_not_finite_ends_the_run(runs: Starter, do: str, said: str) -> None:
    ended = runs.run(*RUN, SYNC, ranks=2, troubles=[trouble("forward", do, nth=IN_UPDATE_5, rank=1)])
    assert re.fullmatch(said, ended.message), ended.message
    goes_on(runs, 4)


def skipped(numbers: list[dict[str, Any]]) -> list[int]:
    return [line["update"] for line in numbers if line.get("skipped")]


@pytest.mark.parametrize("do", ["nan", "inf"])
def test_an_update_that_is_skipped_counts_after_the_resume_too(runs: Starter, do: str) -> None:
    settings = ("train.on_nonfinite=skip", SYNC)
    first = trouble("forward", do, nth=STEPS // 2 + 1, rank=1)
    last = trouble("forward", do, nth=7 * STEPS // 2, rank=0)
    whole = runs.run(*RUN, *settings, "run_dir=whole", ranks=2, troubles=[first, last])
    assert whole.statuses == [0, 0], whole
    assert "update 2 skipped: loss" in whole.out
    assert "skipped        2 of the updates, whose loss or gradient was not finite" in whole.out
    assert skipped(lines(Path("whole"))) == [2, 7]

    stop = trouble("forward", "SIGTERM", nth=IN_UPDATE_5, rank=1)
    cut = runs.run(*RUN, *settings, ranks=2, troubles=[first, stop])
    assert cut.statuses == [75, 75], cut
    # Before it goes on, DDP's buckets are laid out by a forward, which counts here too.
    ended = runs.run(*RUN, *settings, ranks=2, troubles=[trouble("forward", do, nth=1 + 2 * STEPS // 2, rank=0)])
    assert ended.statuses == [0, 0], ended
    assert "skipped        2 of the updates" in ended.out
    assert outcome() == outcome(Path("whole"))
