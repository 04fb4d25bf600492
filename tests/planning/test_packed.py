from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distaccum.errors import UserError
from distaccum.planning import CutSchedule, resolve_batch
from distaccum.planning.by_length import Grouping, cut_by_length
from distaccum.planning.costs import CostFit, CostModel
from distaccum.planning.packed import cut_packed

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=80).map(lambda found: np.array(found, dtype=np.int64))
COSTS = st.builds(CostModel, quadratic=st.sampled_from([0.0, 0.01]), overhead=st.sampled_from([0.0, 20.0, 500.0]))


def text_lengths(generator: np.random.Generator, count: int) -> NDArray[np.int64]:
    return np.clip(generator.lognormal(4.7, 0.9, count), 1, 512).astype(np.int64)


def loads(cut: tuple[tuple[tuple[int, ...], ...], ...], lengths: NDArray[np.int64], costs: CostModel) -> list[float]:
    def cost(step: tuple[int, ...]) -> float:
        own = lengths[list(step)].astype(float)
        return float((own + costs.quadratic * own**2).sum()) + costs.overhead if step else 0.0

    return [sum(map(cost, rank)) for rank in cut]


@given(LENGTHS, st.integers(1, 5), st.integers(1, 1000), st.booleans(), COSTS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_sample_is_computed_once_within_the_budget(
    lengths: NDArray[np.int64], world_size: int, max_tokens: int, equal: bool, costs: CostModel, unequal_speeds: bool
) -> None:
    speeds = [1.0 + rank for rank in range(world_size)] if unequal_speeds else None
    given = {"world_size": world_size, "max_tokens": max_tokens, "equal_micro_steps": equal}
    cut = cut_packed(lengths, costs=costs, speeds=speeds, **given)  # type: ignore[arg-type]
    assert len(cut) == world_size
    assert sorted(position for rank in cut for step in rank for position in step) == list(range(len(lengths)))
    assert all(rank for rank in cut), "a rank without samples takes a placeholder"
    assert all(len(step) <= 1 or lengths[list(step)].sum() <= max_tokens for rank in cut for step in rank)
    if equal:
        assert len({len(rank) for rank in cut}) == 1
    assert cut == cut_packed(lengths.copy(), costs=costs, speeds=speeds, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_get_equal_costs_and_micro_batches_are_full(world_size: int) -> None:
    generator = np.random.default_rng(2)
    costs = CostModel(quadratic=0.003, overhead=64.0)
    for _ in range(20):
        lengths = text_lengths(generator, 128)
        cut = cut_packed(lengths, world_size=world_size, max_tokens=8 * 512, costs=costs)
        found = loads(cut, lengths, costs)
        assert max(found) / np.mean(found) < 1.03
        fewest = -(-lengths.sum() // (8 * 512))
        assert sum(map(len, cut)) <= fewest + world_size
        by_length = cut_by_length(lengths, world_size=world_size, max_tokens=8 * 512, costs=costs)
        assert sum(map(len, cut)) <= sum(map(len, by_length))


def test_lengths_squared_count_in_the_balance() -> None:
    """Negative control: dealt by tokens alone, attention's part is unequal."""
    lengths = np.array([512] * 4 + [8] * 256, dtype=np.int64)
    costs = CostModel(quadratic=0.01)
    fair = loads(cut_packed(lengths, world_size=3, max_tokens=4096, costs=costs), lengths, costs)
    naive = loads(cut_packed(lengths, world_size=3, max_tokens=4096), lengths, costs)
    assert max(naive) / np.mean(naive) > 1.2
    assert max(fair) < max(naive)


def test_a_faster_rank_gets_more() -> None:
    lengths = text_lengths(np.random.default_rng(4), 256)
    costs = CostModel(quadratic=0.003, overhead=64.0)
    slow, fast = loads(
        cut_packed(lengths, world_size=2, max_tokens=4096, costs=costs, speeds=[1.0, 2.0]), lengths, costs
    )
    assert fast / slow == pytest.approx(2.0, rel=0.03)


def test_another_micro_batch_is_begun_only_where_there_is_no_room() -> None:
    assert cut_packed(np.array([4, 3, 2, 1]), world_size=1, max_tokens=5) == (((0, 3), (1, 2)),)
    assert cut_packed(np.array([4, 3, 2, 1]), world_size=2, max_tokens=10, costs=CostModel(overhead=1.0)) == (
        ((0, 3),),
        ((1, 2),),
    )


def test_what_comes_last_costs_most() -> None:
    lengths = text_lengths(np.random.default_rng(5), 64)
    costs = CostModel(quadratic=0.003)
    for rank in cut_packed(lengths, world_size=2, max_tokens=1024, costs=costs):
        found = [loads(((step,),), lengths, costs)[0] for step in rank]
        assert found == sorted(found)


def test_large_windows_take_little_time() -> None:
    lengths = np.random.default_rng(3).integers(1, 500, 20_000)
    cut = cut_packed(lengths, world_size=8, max_tokens=4000, costs=CostModel(overhead=60.0))
    assert sorted(position for rank in cut for step in rank for position in step) == list(range(20_000))
    assert sum(map(len, cut)) <= 1.01 * lengths.sum() / 4000 + 8


def test_costs_are_fitted_to_sums_of_lengths() -> None:
    generator = np.random.default_rng(6)
    wanted = CostModel(quadratic=0.004, overhead=100.0)
    fit = CostFit(overhead=100.0)
    for _ in range(100):
        lengths = text_lengths(generator, int(generator.integers(3, 20)))
        seconds = 1e-5 * (float(wanted.of_sample(lengths.astype(float)).sum()) + wanted.overhead)
        fit.add_packed(lengths, seconds * float(generator.uniform(0.97, 1.03)))
    found = fit.fit()
    assert found is not None
    assert found.overhead == 100.0
    assert found.quadratic == pytest.approx(0.004, rel=0.2)


def test_the_plan_of_a_run() -> None:
    lengths = text_lengths(np.random.default_rng(7), 256)
    plan = resolve_batch(world_size=2, global_batch_size=64, micro_batch_size=4)
    cuts = [CutSchedule(plan, 256, rank=rank, lengths=lengths, is_packed=True) for rank in (0, 1)]
    window = [sample for one in cuts for piece in one.micro_batches(0, 1) for sample in piece]
    padded = CutSchedule(plan, 256, rank=0, lengths=lengths), CutSchedule(plan, 256, rank=1, lengths=lengths)
    assert sorted(window) == sorted(sample for one in padded for piece in one.micro_batches(0, 1) for sample in piece)
    assert "tokens, packed" in cuts[0].explain()
    assert cuts[0].micro_batch_size == 4
    pieces = cuts[0].micro_batches(0, 1)
    tokens = sum(int(lengths[piece].sum()) for piece in pieces)
    quadratic = CostModel(quadratic=0.5)
    cuts[0].set_costs(quadratic, now=-10)
    assert cuts[0].work(pieces, 1) == pytest.approx(tokens + 0.5 * sum((lengths[p] ** 2).sum() for p in pieces))


def test_smaller_micro_batches_after_memory_ran_out() -> None:
    lengths = text_lengths(np.random.default_rng(8), 64)
    plan = resolve_batch(world_size=1, global_batch_size=64, micro_batch_size=8)
    cuts = CutSchedule(plan, 64, lengths=lengths, is_packed=True)
    large = max(cuts.micro_batches(0, 0), key=lambda piece: lengths[piece].sum())
    limit = cuts.forbid(large, now=0)
    assert limit == lengths[large].sum() // 2
    parts = cuts.split(large)
    assert len(parts) >= 2
    assert sorted(sample for part in parts for sample in part) == sorted(large)
    assert all(len(part) == 1 or lengths[part].sum() <= limit for part in parts)


def test_lengths_that_cannot_be() -> None:
    plan = resolve_batch(world_size=1, global_batch_size=4)
    with pytest.raises(UserError, match="batch=packed: the dataset has 16 samples"):
        Grouping([1, 2], plan, 16, None, is_packed=True)
