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
from distaccum.planning import resolve_batch
from distaccum.planning.by_length import CostFit, CostModel, Grouping, cut_by_length

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
    for lengths in ([2.0, 3.0], np.array([2, 3], np.uint8), torch.tensor([2, 3])):
        assert Grouping(lengths, plan, 2, None).lengths.tolist() == [2, 3]  # type: ignore[arg-type]
