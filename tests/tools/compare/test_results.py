from __future__ import annotations

import pytest
from rows_by_hand import row

from distaccum.tools.bench.rounds import middle_half, round_of
from distaccum.tools.compare.results import add_speedups, is_within_noise


def test_the_slowest_rank_counts_and_shares_are_those_of_all_ranks() -> None:
    first = {"seconds": [1.0, 4.0, 2.0], "data_seconds": [0.7, 0.0, 0.0], "sync_seconds": [0.0, 0.7, 0.7]}
    second = {"seconds": [3.0, 2.0, 2.0], "data_seconds": [0.7, 0.7, 0.7], "sync_seconds": [0.0, 0.0, 0.0]}
    counts = {"samples": 8, "sync_calls": 2, "sync_bytes": 64}
    turn = round_of([{**first, **counts}, {**second, **counts}])
    assert turn.seconds == 3.0  # the median of 3, 4 and 2
    assert turn.data_share == pytest.approx((0.1 + 0.3) / 2)
    assert turn.sync_share == pytest.approx((0.2 + 0.0) / 2)
    assert (turn.sync_calls, turn.sync_bytes) == (2, 64)


def test_medians_quartiles_and_speed() -> None:
    made = row("ddp", (10, 12, 11, 90, 9), world_size=2)
    assert made.seconds == pytest.approx(0.011)
    assert (made.low_seconds, made.high_seconds) == (pytest.approx(0.010), pytest.approx(0.012))
    assert made.samples_per_second == pytest.approx(256 / 0.011)
    assert made.compute_share == pytest.approx(0.7)
    assert middle_half([5.0]) == (5.0, 5.0)


def test_speedup_is_against_accumulation_with_as_many_steps_or_its_fastest() -> None:
    rows = [
        row("single", (20,), accumulation_steps=2),
        row("single", (40,), accumulation_steps=8),
        row("ddp", (10,), world_size=2, accumulation_steps=8),
        row("ddp", (10,), world_size=2, accumulation_steps=3),
        row("fsdp", world_size=2, reason="no"),
    ]
    add_speedups(rows)
    assert [made.speedup for made in rows] == [1.0, 1.0, 4.0, 2.0, None]


def test_noise_is_where_the_middle_halves_overlap() -> None:
    steady = row("single", (10, 10, 11, 11, 12))
    assert is_within_noise(steady, row("ddp", (11, 11, 12, 14, 15), world_size=2))
    assert not is_within_noise(steady, row("ddp", (13, 13, 14, 14, 10), world_size=2))
