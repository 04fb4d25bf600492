from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distaccum.errors import UserError
from distaccum.planning import by_length, resolve_batch
from distaccum.planning.by_length import Grouping, cut_by_length
from distaccum.planning.costs import CostFit, CostModel
from distaccum.planning.dealing import Dealer

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=80).map(lambda found: np.array(found, dtype=np.int64))
COSTS = st.builds(CostModel, quadratic=st.sampled_from([0.0, 0.01]), overhead=st.sampled_from([0.0, 20.0, 500.0]))


def loads(cut: tuple[tuple[tuple[int, ...], ...], ...], lengths: NDArray[np.int64], costs: CostModel) -> list[float]:
    def cost(step: tuple[int, ...]) -> float:
        longest = float(lengths[list(step)].max()) if step else 0.0
        return len(step) * longest * (1 + costs.quadratic * longest) + costs.overhead if step else 0.0

    return [sum(map(cost, rank)) for rank in cut]


@given(LENGTHS, st.integers(1, 5), st.integers(1, 1000), st.booleans(), COSTS)
@settings(max_examples=300, deadline=None)
def test_every_sample_is_computed_once_within_the_budget(
    lengths: NDArray[np.int64], world_size: int, max_tokens: int, equal: bool, costs: CostModel
) -> None:
    cut = cut_by_length(lengths, world_size=world_size, max_tokens=max_tokens, equal_micro_steps=equal, costs=costs)
    assert len(cut) == world_size
    assert sorted(position for rank in cut for step in rank for position in step) == list(range(len(lengths)))
    assert all(rank for rank in cut), "a rank without samples takes a placeholder"
    for rank in cut:
        for step in rank:
            assert len(step) <= 1 or len(step) * max(lengths[list(step)]) <= max_tokens
    if equal:
        assert len({len(rank) for rank in cut}) == 1


def test_the_same_window_is_cut_the_same_by_everyone() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 64)
    cuts = [cut_by_length(lengths.copy(), world_size=3, max_tokens=2000) for _ in range(3)]
    assert cuts[0] == cuts[1] == cuts[2]


def test_the_grouping_is_the_cheapest_that_keeps_the_order() -> None:
    """Against all ways to cut the sorted samples into consecutive groups."""
    generator = np.random.default_rng(1)
    for _ in range(40):
        lengths = np.sort(generator.integers(1, 50, 9))[::-1].copy()
        costs = CostModel(quadratic=0.02, overhead=float(generator.integers(0, 80)))
        cheapest = np.inf
        for mask in range(2**8):
            edges = [0, *(place + 1 for place in range(8) if mask >> place & 1), 9]
            groups = [tuple(range(a, b)) for a, b in itertools.pairwise(edges)]
            if all(len(group) == 1 or len(group) * lengths[group[0]] <= 120 for group in groups):
                cheapest = min(cheapest, loads((tuple(groups),), lengths, costs)[0])
        found = cut_by_length(lengths, world_size=1, max_tokens=120, costs=costs)
        assert loads(found, lengths, costs)[0] == pytest.approx(cheapest)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_get_equal_costs_and_little_is_padded(world_size: int) -> None:
    generator = np.random.default_rng(2)
    costs = CostModel(quadratic=0.003, overhead=60.0)
    for _ in range(20):
        lengths = np.clip(generator.lognormal(4.7, 0.9, 64), 1, 512).astype(np.int64)
        cut = cut_by_length(lengths, world_size=world_size, max_tokens=8 * 512, costs=costs)
        found = loads(cut, lengths, costs)
        assert max(found) / np.mean(found) < 1.15
        padded = sum(len(step) * lengths[list(step)].max() for rank in cut for step in rank)
        uniform = sum(8 * lengths[start : start + 8].max() for start in range(0, 64, 8))
        assert padded / lengths.sum() < 1.2 < 2.0 < uniform / lengths.sum()


def test_large_windows_take_little_time() -> None:
    lengths = np.random.default_rng(3).integers(1, 500, 20_000)
    cut = cut_by_length(lengths, world_size=8, max_tokens=4000, costs=CostModel(overhead=60.0))
    assert sorted(position for rank in cut for step in rank for position in step) == list(range(20_000))
    padded = sum(len(step) * lengths[list(step)].max() for rank in cut for step in rank)
    assert padded / lengths.sum() < 1.1


def dealt_by_halving(
    groups: list[tuple[int, int]], lengths: NDArray[np.int64], speeds: list[float], costs: CostModel
) -> float:
    """The longest time by a simpler rule: the slowest rank's largest group is halved, and all are dealt anew."""

    def cost(group: tuple[int, int]) -> float:
        longest = float(lengths[group[0]])
        return (group[1] - group[0]) * longest * (1 + costs.quadratic * longest) + costs.overhead

    while True:
        ranks: list[list[tuple[int, int]]] = [[] for _ in speeds]
        times = [0.0] * len(speeds)
        for group in sorted(groups, key=cost, reverse=True):
            after = [time + cost(group) / speed for time, speed in zip(times, speeds, strict=True)]
            rank = after.index(min(after))
            ranks[rank].append(group)
            times[rank] = after[rank]
        slowest = times.index(max(times))
        start, stop = max(ranks[slowest], key=cost)
        movable = cost((start, stop)) / speeds[slowest]
        gain = min(max(times) - min(times), movable) / 2 - costs.overhead / speeds[slowest]
        if len(speeds) == 1 or stop - start < 2 or gain <= 0.02 * max(times):
            return max(times)
        groups = [*(group for group in groups if group != (start, stop)), (start, (start + stop) // 2)]
        groups.append(((start + stop) // 2, stop))


def test_ranks_finish_sooner_than_when_groups_are_halved() -> None:
    generator = np.random.default_rng(6)
    ratios = []
    for number in range(150):
        lengths = np.clip(generator.lognormal(4.7, 0.9, int(generator.integers(1, 250))), 1, 512).astype(np.int64)
        lengths = np.sort(lengths)[::-1].copy()
        world_size = int(generator.choice([1, 2, 3, 8, 16]))
        speeds = generator.uniform(0.3, 1, world_size).tolist() if number % 2 else [1.0] * world_size
        max_tokens = int(generator.choice([1, 4, 16])) * 512
        costs = CostModel(
            quadratic=float(generator.choice([0, 0.003])), overhead=max_tokens * float(generator.choice([0, 0.02, 0.2]))
        )
        cut = cut_by_length(lengths, world_size=world_size, max_tokens=max_tokens, costs=costs, speeds=speeds)
        speeds = [speed / max(speeds) for speed in speeds]
        longest = max(load / speed for load, speed in zip(loads(cut, lengths, costs), speeds, strict=True))
        groups = by_length._cheapest_groups(lengths.astype(np.float64), max_tokens, costs)
        ratios.append(longest / dealt_by_halving(groups, lengths, speeds, costs))
    assert np.mean(ratios) < 0.99
    assert max(ratios) < 1.05
    assert np.mean(np.array(ratios) > 1 + 1e-9) < 0.05


def test_hundreds_of_ranks_take_no_longer_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is counted, not timed: groups dealt in all tries, and moves."""
    lengths = np.clip(np.random.default_rng(7).lognormal(4.7, 0.9, 4096), 1, 512).astype(np.int64)
    counts = {"dealt": 0, "moves": 0}
    dealt, move = Dealer._largest_first, Dealer._move

    def counted_deal(self: Dealer, parts: Any) -> Any:
        counts["dealt"] += len(parts)
        return dealt(self, parts)

    def counted_move(self: Dealer, *args: Any) -> Any:
        counts["moves"] += 1
        return move(self, *args)

    monkeypatch.setattr(Dealer, "_largest_first", counted_deal)
    monkeypatch.setattr(Dealer, "_move", counted_move)
    cut = cut_by_length(lengths, world_size=256, max_tokens=8192, costs=CostModel(overhead=128.0))
    assert sorted(position for rank in cut for step in rank for position in step) == list(range(4096))
    found = loads(cut, lengths, CostModel(overhead=128.0))
    assert max(found) < 1.1 * np.mean(found)
    assert counts["dealt"] < 4000
    assert counts["moves"] < 3000


# Costs


@pytest.mark.parametrize("model", [CostModel(), CostModel(quadratic=0.004, overhead=100.0), CostModel(overhead=30.0)])
def test_costs_are_found_again_in_noisy_times(model: CostModel) -> None:
    generator = np.random.default_rng(4)
    fit = CostFit()
    assert fit.fit() is None
    for _ in range(200):
        count, length = int(generator.integers(1, 30)), int(generator.integers(1, 500))
        seconds = 1e-5 * float(model.cost(np.float64(count), np.float64(length)))  # type: ignore[arg-type]
        fit.add(count, length, seconds * float(generator.uniform(0.95, 1.05)))
    found = fit.fit()
    assert found is not None
    for count, length in ((1, 500), (30, 20), (8, 100)):
        wanted = model.cost(np.float64(count), np.float64(length))  # type: ignore[arg-type]
        assert found.cost(np.float64(count), np.float64(length)) == pytest.approx(wanted, rel=0.1)  # type: ignore[arg-type]


def test_too_little_is_not_fitted() -> None:
    fit = CostFit()
    for _ in range(20):
        fit.add(4, 100, 0.01)
    assert fit.fit() is None


def grouping(lengths: NDArray[np.int64], **plan: int) -> Grouping:
    numbers = {"world_size": 2, "global_batch_size": 16, "micro_batch_size": 4, **plan}
    return Grouping(lengths, resolve_batch(**numbers), len(lengths), None)


def test_new_costs_count_from_the_window_they_are_meant_for() -> None:
    lengths = np.random.default_rng(5).integers(1, 100, 64)
    one = grouping(lengths)
    assert one.max_tokens == 4 * lengths.max()
    samples = np.arange(16)
    before = [one.cut(samples, number) for number in (0, 5)]
    costs = CostModel(overhead=1e6)
    one.costs.change(costs, 6)
    assert [one.cut(samples, number) for number in (0, 5)] == before
    assert one.costs.at(5) != costs == one.costs.at(6)
    assert one.cut(samples, 6) != before[0]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (np.ones((4, 2), np.int64), r"the dataset has 16 samples, and its `lengths` have the shape \(4, 2\)"),
        (np.array([3] * 15 + [0]), r"sample 15 has the length 0, and lengths are at least 1\."),
        *(
            ([wrong] * 16, r"`lengths` are not whole numbers, one for each sample: \[")
            for wrong in (3.7, np.nan, np.inf, "long", "3", None, [1, [2]], 2**70)
        ),
    ],
)
def test_lengths_that_cannot_be(lengths: Any, said: str) -> None:
    plan = resolve_batch(world_size=1, global_batch_size=4)
    with pytest.raises(UserError, match=said):
        Grouping(lengths, plan, 16, None)


def test_whole_numbers_of_any_format_are_lengths() -> None:
    plan = resolve_batch(world_size=1, global_batch_size=4)
    for lengths in ([2.0, 3.0], np.array([2, 3], np.uint8), np.array([2, 3], np.uint64), torch.tensor([2, 3])):
        assert Grouping(lengths, plan, 2, None).lengths[:].tolist() == [2, 3]  # type: ignore[arg-type]
