from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaccum.tools.tune.network_model import ComputeTime, Link, buckets_of, fit_compute, fit_link, update_seconds

SIZES = (256, 2**20, 2**22, 2**23)
positive = st.floats(1e-5, 1e-2)
speeds = st.floats(1e6, 1e9)
worlds = st.integers(2, 16)


@given(latency=positive, speed=speeds, world_size=worlds)
def test_a_link_is_found_again(latency: float, speed: float, world_size: int) -> None:
    link = Link(latency, speed)
    found = fit_link({size: link.all_reduce_seconds(size, world_size) for size in SIZES}, world_size)
    assert found.latency_seconds == pytest.approx(latency, rel=1e-3, abs=1e-9)
    assert found.bytes_per_second == pytest.approx(speed, rel=1e-3)


def test_noise_alone_is_no_endless_speed() -> None:
    link = fit_link(dict.fromkeys(SIZES, 1e-4), 2)
    assert link.bytes_per_second == 2**23 / 1e-4
    assert 0 < link.latency_seconds <= 1e-4


def test_a_link_whose_first_bytes_cost_nothing_has_no_negative_latency() -> None:
    assert fit_link({256: 1e-6, 2**20: 1.0, 2**21: 2.0}, 2).latency_seconds == 0


@given(fixed=positive, step=positive)
def test_what_computing_takes_is_found_again(fixed: float, step: float) -> None:
    found = fit_compute({count: fixed + count * step for count in (1, 2, 8)})
    assert (found.fixed_seconds, found.micro_step_seconds) == pytest.approx((fixed, step), rel=1e-6)


@pytest.mark.parametrize("seconds", [{1: 0.1}, {1: 0.3, 2: 0.3, 4: 0.2}, {1: 0.1, 2: 0.25, 4: 0.6}])
def test_computing_takes_no_negative_time(seconds: dict[int, float]) -> None:
    found = fit_compute(seconds)
    assert found.fixed_seconds >= 0
    assert found.micro_step_seconds >= 0
    assert min(seconds.values()) / 2 <= found.seconds(1) <= max(seconds.values())


@given(step=positive, latency=positive, speed=speeds, world_size=worlds, count=st.integers(1, 9))
def test_hiding_behind_the_backward(step: float, latency: float, speed: float, world_size: int, count: int) -> None:
    link, buckets = Link(latency, speed), buckets_of(8e6, count)
    assert sum(buckets) == pytest.approx(8e6)
    assert len(buckets) == count
    all_of_it = sum(link.all_reduce_seconds(size, world_size) for size in buckets)
    found = update_seconds(1.0, step, buckets, link, world_size) - 1.0
    # The last bucket is sent after the backward; no more than the backward is hidden.
    last = link.all_reduce_seconds(buckets[-1], world_size)
    assert max(last, all_of_it - 2 / 3 * step) * (1 - 1e-9) <= found + 1e-12
    assert found <= all_of_it * (1 + 1e-9) + 1e-12
    assert update_seconds(1.0, 0.0, buckets, link, world_size) - 1.0 == pytest.approx(all_of_it)


def test_seconds_of_parts_of_micro_steps() -> None:
    assert ComputeTime(1.0, 2.0).seconds(0.5) == 2.0
