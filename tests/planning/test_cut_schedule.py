"""The cuts of a run's windows, and with which window a change of them comes into force."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distaccum.planning import CutSchedule, by_length, resolve_batch
from distaccum.planning.costs import CostModel
from distaccum.planning.window_sizes import NoiseSizes

LENGTHS = [1 + (7 * index) % 40 for index in range(64)]


def cuts(rank: int = 0, world_size: int = 2, **more: Any) -> CutSchedule:
    plan = resolve_batch(world_size=world_size, global_batch_size=8, micro_batch_size=4)
    return CutSchedule(plan, 64, rank=rank, windows_ahead=2, **more)


def sizes(schedule: CutSchedule) -> list[tuple[int, ...]]:
    """Of the windows of the first epoch."""
    return [schedule.micro_batch_sizes(0, index) for index in range(schedule.sizes.count(0))]


def test_shares_come_into_force_when_no_rank_can_have_begun_to_load() -> None:
    first, second = cuts(rank=0), cuts(rank=1)
    assert first.shares == (0.5, 0.5)
    for schedule in (first, second):
        schedule.set_shares((0.75, 0.25), now=1)
        assert schedule.shares == (0.75, 0.25)
    assert sizes(first) == [(4,)] * 4 + [(3, 3)] * 4
    assert sizes(second) == [(4,)] * 4 + [(2,)] * 4


def test_costs_come_into_force_when_no_rank_can_have_begun_to_load() -> None:
    schedule = cuts(world_size=1, lengths=LENGTHS, max_tokens=100)
    before = [schedule.micro_batches(0, index) for index in range(8)]
    schedule.set_costs(CostModel(overhead=1e6), now=0)
    after = [schedule.micro_batches(0, index) for index in range(8)]
    assert after[:3] == before[:3]
    assert after[3:] != before[3:]
    window = before[0]
    assert schedule.work(window, 0) < schedule.work(window, 3)


def test_a_window_size_comes_into_force_one_window_later() -> None:
    schedule = cuts(size_rule=NoiseSizes(8, smallest=8, largest=32))
    assert schedule.set_window_size(16, now=0) == 4
    assert [schedule.sizes.size(0, index) for index in range(schedule.sizes.count(0))] == [8] * 4 + [16, 16]


def test_a_micro_batch_that_did_not_fit_is_cut_now_and_planned_smaller_later() -> None:
    schedule = cuts(rank=1)
    window = schedule.micro_batches(0, 0)
    assert schedule.forbid(window[0], now=0) == 2
    assert (schedule.limit, schedule.limits) == (2, (None, 2))
    assert list(map(len, schedule.split(window[0]))) == [2, 2]
    assert sizes(schedule) == [(4,)] * 3 + [(2, 2)] * 5


def test_a_state_of_earlier_versions_is_loaded() -> None:
    """As the loader saved it when it held the cuts itself."""
    state = {
        "speeds": [[0, None], [3, [0.75, 0.25]]],
        "size_changes": [[0, 8], [4, 16]],
        "costs": [[0, 0.0, 1.5], [3, 0.001, 40.0]],
        "found_sizes": [90, 80],
        "limits": [None, 50],
    }
    rule = NoiseSizes(8, smallest=8, largest=32)
    schedule = cuts(rank=1, lengths=LENGTHS, size_rule=rule)
    schedule.set_sizes([100, 100])
    schedule.load_state_dict(state)
    assert (schedule.found_sizes, schedule.limit, schedule.shares) == ((90, 80), 50, (0.75, 0.25))
    assert rule.changes == [(0, 8), (4, 16)]
    assert json.loads(json.dumps(schedule.state_dict())) == state


@pytest.mark.parametrize("windows_ahead", [0, 2, 20])
def test_a_window_is_cut_once_however_far_ahead_it_is_loaded(
    windows_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, cut_sizes = by_length.cut_by_length, []

    def counted(lengths: Any, **options: Any) -> Any:
        cut_sizes.append(len(lengths))
        return cut(lengths, **options)

    monkeypatch.setattr(by_length, "cut_by_length", counted)
    plan = resolve_batch(world_size=2, global_batch_size=2, micro_batch_size=1)
    schedule = CutSchedule(plan, 64, lengths=LENGTHS, windows_ahead=windows_ahead)
    for index in range(32 + windows_ahead):
        if index < 32:
            schedule.micro_batches(0, index)  # asked of the workers
        if index >= windows_ahead:
            schedule.micro_batch_sizes(0, index - windows_ahead)  # in use
            schedule.micro_batches(0, index - windows_ahead)
    assert len(cut_sizes) == 32
