from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaccum.config.enums import Goal
from distaccum.errors import UserError
from distaccum.observers import EarlyStopping


def _stops_at(stopping: EarlyStopping, values: list[float]) -> int | None:
    """Number of the evaluation, from 1, at which it says stop."""
    for number, value in enumerate(values, start=1):
        if stopping.update({stopping.metric: value, "other": 0.0}):
            return number
    return None


def test_less_loss_is_better() -> None:
    stopping = EarlyStopping("loss", patience=2)
    assert _stops_at(stopping, [3.0, 2.0, 2.5, 1.0, 1.5, 1.2, 0.5]) == 6
    assert (stopping.best, stopping.best_evaluation, stopping.evaluations) == (1.0, 4, 6)


def test_more_of_everything_else_is_better() -> None:
    assert _stops_at(EarlyStopping("accuracy", patience=1), [0.1, 0.2, 0.3, 0.25]) == 4


def test_the_goal_can_be_given() -> None:
    assert _stops_at(EarlyStopping("perplexity", patience=1, goal=Goal.min), [9.0, 8.0, 8.5]) == 3
    assert _stops_at(EarlyStopping("loss", patience=1, goal=Goal.max), [1.0, 2.0, 1.5]) == 3


def test_a_tie_is_no_improvement() -> None:
    assert _stops_at(EarlyStopping("accuracy", patience=2), [1.0, 1.0, 1.0]) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("goal", list(Goal))
def test_what_is_not_finite_is_no_improvement(value: float, goal: Goal) -> None:
    stopping = EarlyStopping("loss", patience=3, goal=goal)
    assert _stops_at(stopping, [value, value, 0.5, value, value, value]) == 6
    assert stopping.best == 0.5


def test_a_metric_that_never_was_finite_stops_the_run_and_says_so() -> None:
    stopping = EarlyStopping("loss", patience=2)
    assert _stops_at(stopping, [math.nan, math.nan]) == 2
    assert stopping.reason == "loss was not finite in 2 evaluations"


def test_the_reason_names_metric_and_best() -> None:
    stopping = EarlyStopping("pixel_accuracy", patience=1)
    assert _stops_at(stopping, [0.5, 0.25]) == 2
    assert stopping.reason == "pixel accuracy has not improved on 0.5000 for 1 evaluation"


def test_an_unknown_metric_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"train\.early_stopping\.metric=acuracy .* accuracy, loss\."):
        EarlyStopping("acuracy", patience=1).update({"loss": 0.1, "accuracy": 0.9})


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=12),
    st.integers(1, 4),
    st.sampled_from(Goal),
    st.integers(0, 12),
)
def test_a_restored_one_goes_on_as_if_never_stopped(
    values: list[float], patience: int, goal: Goal, restart_after: int
) -> None:
    unbroken = EarlyStopping("m", patience, goal)
    broken = EarlyStopping("m", patience, goal)
    for number, value in enumerate(values):
        if number == restart_after:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = EarlyStopping("m", patience, goal)
            broken.load_state_dict(state)
        assert unbroken.update({"m": value}) == broken.update({"m": value})
    assert unbroken.state_dict() == broken.state_dict()


def test_a_tasks_own_numbers_can_be_saved() -> None:
    stopping = EarlyStopping("f1", patience=2)
    stopping.update({"f1": np.float32(0.1)})  # type: ignore[dict-item]
    assert json.loads(json.dumps(stopping.state_dict())) == {
        "best": float(np.float32(0.1)),
        "best_evaluation": 1,
        "evaluations": 1,
    }
