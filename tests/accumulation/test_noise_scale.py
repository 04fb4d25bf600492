"""The arithmetic of the noise scale: unbiased for any parts, smoothed, with an error bar that means something."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distaccum import UserError
from distaccum.accumulation.noise_scale import Measurement, NoiseScale


def measured(parts: Sequence[NDArray[np.float64]]) -> Measurement:
    """Of parts, each of which has the gradients of its samples as rows."""
    sums = [part.sum(0) for part in parts]
    whole = np.sum(sums, axis=0)
    return Measurement(
        parts=len(parts),
        samples=sum(map(len, parts)),
        squared_sizes=sum(len(part) ** 2 for part in parts),
        whole=float(whole @ whole),
        pieces=float(sum(s @ s for s in sums)),
    )


def cut(samples: NDArray[np.float64], sizes: Sequence[int]) -> list[NDArray[np.float64]]:
    return np.split(samples, np.cumsum(sizes)[:-1])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) <= 6),
    seed=st.integers(0, 1000),
)
def test_estimates_are_unbiased_whatever_the_sizes_of_the_parts(sizes: list[int], seed: int) -> None:
    """All windows that can be drawn from three samples: the mean of the estimates is the truth itself."""
    population = np.random.default_rng(seed).normal(size=(3, 2)) + 0.5
    mean = population.mean(0)
    variance = ((population - mean) ** 2).sum(1).mean()
    drawn = [measured(cut(population[list(d)], sizes)) for d in itertools.product(range(3), repeat=sum(sizes))]
    assert np.mean([seen.gradient_square for seen in drawn]) == pytest.approx(mean @ mean, rel=1e-10)
    assert np.mean([seen.variance for seen in drawn]) == pytest.approx(variance, rel=1e-10)
    # The estimate that takes parts for alike is off: what is tested can fail.
    if len(set(sizes)) > 1:
        alike = [(seen.whole - seen.pieces) / (seen.samples**2 * (1 - 1 / seen.parts)) for seen in drawn]
        assert np.mean(alike) != pytest.approx(mean @ mean, rel=1e-3)


def test_coherence_is_the_mean_inner_product_over_the_mean_square() -> None:
    parts = list(np.random.default_rng(0).normal(size=(4, 3, 5)) + 0.3)
    sums = [part.sum(0) for part in parts]
    pairs = [a @ b for a, b in itertools.permutations(sums, 2)]
    assert measured(parts).coherence == pytest.approx(np.mean(pairs) / np.mean([s @ s for s in sums]))
    same = [np.ones((size, 2)) for size in (1, 2, 3)]
    assert measured(same).coherence == pytest.approx(1.0)
    assert measured(same).variance == pytest.approx(0.0)


def _windows(rng: np.random.Generator, number: int, sizes: Sequence[int], mean: float = 0.5) -> list[Measurement]:
    samples = rng.normal(mean, 1.0, size=(number, sum(sizes), 8))
    return [measured(cut(window, sizes)) for window in samples]


def test_smoothed_over_many_windows_it_is_the_truth() -> None:
    """|G|² = 8 · 0.25, tr Σ = 8: a noise scale of 4."""
    noise = NoiseScale(every_updates=1, smoothing=0.999)
    rng = np.random.default_rng(0)
    for sizes in ((4, 4), (3, 3, 2), (1, 6), (2, 2, 2, 1, 1)):
        for seen in _windows(rng, 500, sizes):
            assert noise.add(seen)
    assert noise.measurements == 2000
    assert noise.scale == pytest.approx(4.0, rel=0.05)
    assert abs(noise.scale - 4.0) < 3 * noise.error


@pytest.mark.parametrize("smoothing", [0.9, 0.98])
def test_the_error_bar_is_that_of_repeated_runs(smoothing: float) -> None:
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(200):
        noise = NoiseScale(every_updates=1, smoothing=smoothing)
        for seen in _windows(rng, 60, (8, 8, 8, 4)):
            noise.add(seen)
        values.append(noise.scale)
        errors.append(noise.error)
    assert np.median(errors) == pytest.approx(np.std(values), rel=0.25)


def test_a_mean_of_ratios_would_be_wrong() -> None:
    """Why numerator and denominator are smoothed apart."""
    seen = _windows(np.random.default_rng(2), 4000, (2, 2))
    ratios = [window.variance / window.gradient_square for window in seen]
    assert abs(np.mean(ratios) - 4.0) > 1.0


def test_it_follows_a_change_and_forgets_what_was() -> None:
    noise = NoiseScale(every_updates=1, smoothing=0.9)
    rng = np.random.default_rng(3)
    for mean in (1.0, 0.25):
        for seen in _windows(rng, 200, (32, 32), mean):
            noise.add(seen)
    assert noise.scale == pytest.approx(1 / 0.25**2, rel=0.5)


def test_what_can_not_be_told_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    noise = NoiseScale()
    assert math.isnan(noise.scale)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not noise.add(measured([np.ones((3, 2))]))
    advice = f"split_every={noise.every_updates}"
    assert len([record for record in caplog.records if advice in record.getMessage()]) == 1
    assert not noise.add(Measurement(parts=2, samples=4, squared_sizes=8, whole=math.inf, pieces=1.0))
    assert noise.measurements == 0
    noise.add(measured([np.array([[1.0]]), np.array([[-1.1]])]))
    assert (noise.scale, noise.error) == (math.inf, math.inf), "two parts that contradict each other"
    one = NoiseScale()
    one.add(measured([np.array([[1.0]]), np.array([[1.1]])]))
    assert math.isfinite(one.scale)
    assert one.error == math.inf, "one measurement says nothing of how far it is off"


def test_the_state_goes_on_exactly() -> None:
    rng = np.random.default_rng(4)
    one, other = NoiseScale(), NoiseScale()
    windows = _windows(rng, 10, (3, 2, 2))
    for seen in windows[:5]:
        one.add(seen)
    other.load_state_dict(one.state_dict())
    for seen in windows[5:]:
        one.add(seen)
        other.add(seen)
    assert (one.scale, one.error, one.measurements) == (other.scale, other.error, other.measurements)


def test_it_is_due_in_each_so_many_th_update() -> None:
    noise = NoiseScale(every_updates=3)
    assert [number for number in range(9) if noise.is_due(number)] == [2, 5, 8]


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(UserError, match=r"insight\.smoothing=1"):
        NoiseScale(smoothing=1.0)
    with pytest.raises(UserError, match=r"insight\.every_updates=0"):
        NoiseScale(every_updates=0)
