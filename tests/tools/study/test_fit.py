from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaccum.tools.study.fit import Measured, fit


def planted(
    sizes: list[float], min_updates: float, critical: float, factors: list[float] | None = None
) -> list[Measured]:
    points = []
    for size, factor in zip(sizes, factors or [1.0] * len(sizes), strict=True):
        updates = min_updates * (1 + critical / size) * factor
        points.append(Measured(batch_size=size, updates=updates, samples=updates * size))
    return points


@settings(max_examples=25, deadline=None)
@given(st.floats(3, 1e5), st.floats(10, 3000))
def test_what_was_planted_is_found(min_updates: float, critical: float) -> None:
    found = fit(planted([8, 32, 128, 512, 2048], min_updates, critical))
    assert found is not None
    assert found.critical_batch_size == pytest.approx(critical, rel=0.04)
    assert found.min_updates == pytest.approx(min_updates, rel=0.05)
    assert found.min_samples == pytest.approx(min_updates * critical, rel=0.05)
    assert found.low <= critical <= found.high
    # The equation of the paper, at any batch size.
    updates, samples = found.updates(100.0), found.samples(100.0)
    product = (updates / found.min_updates - 1) * (samples / found.min_samples - 1)
    assert product == pytest.approx(1.0)
    assert samples == pytest.approx(100.0 * updates)


def test_the_range_holds_what_was_planted_in_noise() -> None:
    """With errors of a tenth, the range is right in most of many studies, and narrower than the batch sizes tried."""
    draw = random.Random(1)
    inside = 0
    for _ in range(40):
        factors = [math.exp(draw.gauss(0, 0.1)) for _ in range(5)]
        found = fit(planted([16, 64, 256, 1024, 4096], 50, 300, factors))
        assert found is not None
        inside += found.low <= 300 <= found.high
        assert 60 < found.critical_batch_size < 1500
    assert inside >= 31


def test_one_run_that_went_astray_does_not_decide() -> None:
    sizes = [16.0, 32, 64, 128, 256, 512, 1024]
    found = fit(planted(sizes, 50, 200, [1, 1, 1, 4.0, 1, 1, 1]))
    assert found is not None
    assert found.critical_batch_size == pytest.approx(200, rel=0.15)


def test_what_the_points_do_not_say_is_left_open() -> None:
    below = fit(planted([8, 16, 32], 50, 1e5))
    assert below is not None
    assert (below.high, below.low > 100) == (math.inf, True), "the updates halve with each doubling"
    above = fit(planted([1024, 2048, 4096], 50, 1.0))
    assert above is not None
    assert (above.low, above.high < 400) == (0.0, True), "the updates stay as they are"
    assert fit(planted([64], 50, 100)) is None
    assert fit(planted([64, 64], 50, 100)) is None
    two = fit(planted([16, 256], 50, 100))
    assert two is not None
    assert two.critical_batch_size == pytest.approx(100, rel=0.04)
