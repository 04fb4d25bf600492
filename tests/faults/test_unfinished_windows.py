"""Windows that can't be finished in the grace: ranks leave them in the middle, and go on there, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from outcomes import leftovers, outcome, saved_updates, undisturbed
from starting import RUN, Starter
from troubles import trouble

pytestmark = pytest.mark.usefixtures("here")

STEPS = 24
LONG = (f"batch.global_batch_size={2 * STEPS}", "batch.drop_last=true", "train.max_updates=4")
"""4 updates of 24 micro-steps on one rank, with an evaluation after the 3rd and the 4th."""
SLOW = {"SECONDS_PER_FORWARD": "0.03"}
GRACE = "checkpoint.grace_seconds=0.05"
"""Time for one more micro-step, and to save."""


def nth(update: int, micro_step: int, ranks: int) -> int:
    """Which forward it is, of a run from its start."""
    return (update - 1) * STEPS // ranks + micro_step


def left_in_the_middle(runs: Starter, *settings: str, troubles: list[dict[str, Any]], ranks: int) -> str:
    """Runs into signals to all ranks; returns what the run says."""
    ended = runs.run(*RUN, *LONG, GRACE, *settings, ranks=ranks, troubles=troubles, **SLOW)
    assert (ended.statuses, ended.err) == ([75] * ranks, "")
    assert leftovers() == []
    return ended.out


@pytest.mark.parametrize(
    ("ranks", "update", "settings"),
    [
        (1, 1, ()),
        (2, 2, ("strategy=ddp",)),
        (
            4,
            2,
            (
                "strategy=ddp",
                "strategy.shard_optimizer=true",
                "strategy.gradient_as_bucket_view=false",
                "strategy.broadcast_buffers=false",
                "train.on_nonfinite=skip",
            ),
        ),
    ],
    ids=["single", "ddp", "zero"],
)
def test_a_window_left_in_the_middle_goes_on_there(
    runs: Starter, ranks: int, update: int, settings: tuple[str, ...]
) -> None:
    """Ranks get the signal at different micro-steps, and once more in what is left of the window."""
    chance = random.Random(str(settings))
    at = [chance.randint(1, STEPS // ranks // 2) for _ in range(ranks)]
    troubles = [trouble("forward", "SIGTERM", nth=nth(update, at[rank], ranks), rank=rank) for rank in range(ranks)]
    said = left_in_the_middle(runs, *settings, ranks=ranks, troubles=troubles)
    assert f"update {update}: no time is left to finish its window; " in said
    assert saved_updates()[0] == update - 1
    made = min(at)
    if ranks < 4:  # else so few micro-steps are left that a rank may be in its last one
        again = [trouble("forward", "SIGTERM", nth=1, rank=None)]
        said = left_in_the_middle(runs, *settings, ranks=ranks, troubles=again)
        assert f"update {update}: going on in the middle of its window, after " in said
        assert saved_updates()[0] == update - 1
        made += 1
    # What has been made is not made again.
    never = (5 - update) * STEPS // ranks - made + 1
    troubles = [trouble("forward", "touch", nth=never, rank=None, path="made again")]
    ended = runs.run(*RUN, *LONG, *settings, ranks=ranks, troubles=troubles)
    assert ended.statuses == [0] * ranks, ended
    assert f"update {update}: going on in the middle of its window, after " in ended.out
    assert not Path("made again").exists()
    assert outcome() == undisturbed(runs, *LONG, *settings, ranks=ranks)


def test_one_number_more_is_noticed(runs: Starter) -> None:
    """The comparison can fail: a number drawn in the window's second part, or a statistic that moves."""
    left_in_the_middle(runs, troubles=[trouble("forward", "SIGTERM", nth=5)], ranks=1)
    for name in ("draw", "move buffer"):
        shutil.copytree("run", "kept")
        assert runs.run(*RUN, *LONG, troubles=[trouble("forward", name)]).statuses == [0]
        assert outcome()[0] != undisturbed(runs, *LONG)[0]
        shutil.rmtree("run")
        Path("kept").rename("run")


def test_another_cut_begins_the_window_again(runs: Starter) -> None:
    """To the same bits as going on, in that way, from a run that was stopped at the update before."""
    early = [trouble("forward", "SIGTERM", nth=nth(1, 2, 2), rank=None)]
    assert runs.run(*RUN, *LONG, "strategy=ddp", ranks=2, troubles=early).statuses == [75, 75]
    assert saved_updates() == [1]
    Path("run").rename("whole")
    both = [trouble("forward", "SIGTERM", nth=nth(2, 3, 2), rank=None)]
    left_in_the_middle(runs, "strategy=ddp", troubles=both, ranks=2)
    assert saved_updates()[0] == 1
    Path("run").rename("left")
    for ranks, settings, reason in (
        (1, ("strategy=single",), "it was left by 2 ranks"),
        (
            2,
            ("strategy=ddp", "batch.micro_batch_size=4"),
            "the configuration has changed (batch.micro_batch",
        ),
    ):
        outcomes = []
        for before in ("whole", "left"):
            shutil.copytree(before, "run")
            ended = runs.run(*RUN, *LONG, *settings, ranks=ranks)
            assert ended.statuses == [0] * ranks, ended
            said = f"update 2: its window was left in the middle, and is begun again: {reason}"
            assert (said in ended.out) == (before == "left"), ended.out
            outcomes.append(outcome())
            shutil.rmtree("run")
        assert outcomes[0] == outcomes[1]
