"""What follows from the name of a metric."""

from __future__ import annotations

import pytest

from distaccum.config.enums import Goal, usual_goal


@pytest.mark.parametrize("metric", ["loss", "eval/loss", "loss/router", "eval/loss/router", "ema/loss"])
def test_less_of_a_loss_and_of_its_terms_is_better(metric: str) -> None:
    assert usual_goal(metric) is Goal.min


@pytest.mark.parametrize("metric", ["accuracy", "eval/accuracy", "eval/lossless"])
def test_more_of_all_else_is_better(metric: str) -> None:
    assert usual_goal(metric) is Goal.max
