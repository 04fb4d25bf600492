from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaccum.errors import UserError
from distaccum.planning import (
    DEFAULT_MICRO_BATCH_SIZE,
    BatchPlan,
    resolve_batch,
    shuffled,
    split_evenly,
    window_bounds,
)
from distaccum.planning.batch_plan import split_by_speed
from distaccum.planning.order import EpochOrder

sizes = st.integers(1, 2000)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)
GOLDEN = [699738, 133260, 171984]


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_split_evenly_adds_up_and_differs_by_at_most_one(total: int, parts: int) -> None:
    split = split_evenly(total, parts)
    assert sum(split) == total
    assert len(split) == parts
    assert max(split) - min(split) <= 1


@given(sizes, seeds, epochs)
def test_shuffled_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = shuffled(range(num_samples), num_samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_samples))


@given(sizes, seeds, epochs, st.data())
def test_shuffled_can_be_asked_for_any_part(num_samples: int, seed: int, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_samples - 1))
    stop = data.draw(st.integers(start, num_samples))
    whole = shuffled(range(num_samples), num_samples, seed, epoch)
    assert shuffled(range(start, stop), num_samples, seed, epoch).tolist() == whole[start:stop].tolist()


def test_shuffled_stays_the_same_for_ever() -> None:
    # A changed order would make old runs impossible to resume or repeat.
    assert shuffled(range(10), 10, seed=0, epoch=0).tolist() == [8, 4, 7, 5, 0, 1, 9, 3, 2, 6]
    assert shuffled([0, 1, 999_999], 1_000_000, seed=7, epoch=3).tolist() == GOLDEN


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = {tuple(shuffled(range(50), 50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("num_samples", [5, 16, 37])
def test_every_sample_is_equally_likely_at_every_position(num_samples: int) -> None:
    repeats = 4000
    counts = np.zeros((num_samples, num_samples))
    for epoch in range(repeats):
        counts[np.arange(num_samples), shuffled(range(num_samples), num_samples, 1, epoch)] += 1
    expected = repeats / num_samples
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (num_samples - 1) ** 2
    # Mean `degrees`, standard deviation sqrt(2 · degrees): five of those.
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_neighbours_do_not_stay_neighbours() -> None:
    order = shuffled(range(10_000), 10_000, 0, 0)
    distance = np.abs(np.diff(order)).mean()
    assert distance == pytest.approx(10_000 / 3, rel=0.05)


@given(st.integers(1, 500), st.integers(1, 200), st.booleans())
def test_windows_cover_the_epoch_once(num_samples: int, global_batch_size: int, drop_last: bool) -> None:
    bounds = window_bounds(num_samples, global_batch_size, drop_last)
    positions = [position for start, stop in bounds for position in range(start, stop)]
    assert positions == list(range(len(positions)))
    left_out = num_samples - len(positions)
    assert left_out == (num_samples % global_batch_size if drop_last else 0)
    assert all(stop - start == global_batch_size for start, stop in bounds[:-1])


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    world_size = draw(st.integers(1, 9))
    global_batch_size = draw(st.integers(world_size, 300))
    by_steps = draw(st.booleans())
    return resolve_batch(
        world_size=world_size,
        global_batch_size=global_batch_size,
        micro_batch_size=None if by_steps else draw(st.integers(1, global_batch_size)),
        accumulation_steps=draw(st.integers(1, global_batch_size // world_size)) if by_steps else None,
        equal_micro_steps=draw(st.booleans()),
    )


@given(plans(), st.integers(1, 300))
def test_a_cut_deals_every_sample_once(plan: BatchPlan, window_size: int) -> None:
    cut = plan.cut(window_size)
    positions = [
        position
        for rank in range(plan.world_size)
        for start, stop in cut.micro_batches(rank)
        for position in range(start, stop)
    ]
    assert sorted(positions) == list(range(window_size))
    assert cut.window_size == window_size


@given(plans(), st.integers(1, 300))
def test_a_cut_is_even_and_within_bounds(plan: BatchPlan, window_size: int) -> None:
    cut = plan.cut(window_size)
    shares = [sum(sizes) for sizes in cut.sizes]
    assert max(shares) - min(shares) <= 1
    for sizes in cut.sizes:
        assert len(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert sizes == tuple(sorted(sizes, reverse=True))
        if plan.micro_batch_size is not None:
            assert max(sizes) <= plan.micro_batch_size
        # A placeholder is the only reason for an empty micro-step, and only for want of samples.
        assert min(sizes) > 0 or sum(sizes) < len(sizes)
    if plan.equal_micro_steps:
        assert len({len(sizes) for sizes in cut.sizes}) == 1


@given(plans())
def test_a_full_window_has_the_accumulation_steps_asked_for(plan: BatchPlan) -> None:
    if plan.accumulation_steps is not None:
        assert {len(sizes) for sizes in plan.cut(plan.global_batch_size).sizes} == {plan.accumulation_steps}


def test_what_is_not_given_follows() -> None:
    assert resolve_batch(world_size=4, global_batch_size=256).micro_batch_size == DEFAULT_MICRO_BATCH_SIZE
    assert resolve_batch(world_size=4, micro_batch_size=8, accumulation_steps=3).global_batch_size == 96
    by_steps = resolve_batch(world_size=3, global_batch_size=50, accumulation_steps=4)
    assert by_steps.cut(50).sizes == ((5, 4, 4, 4), (5, 4, 4, 4), (4, 4, 4, 4))
    agreed = resolve_batch(world_size=2, global_batch_size=12, micro_batch_size=3, accumulation_steps=2)
    assert agreed.cut(12).sizes == ((3, 3), (3, 3))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            {"global_batch_size": 256, "micro_batch_size": 16, "accumulation_steps": 5},
            "16 × 5 × 4 ranks = 320, not 256",
        ),
        ({"micro_batch_size": 16}, "without a global batch both"),
        ({"accumulation_steps": 16}, "without a global batch both"),
        ({}, "without a global batch both"),
        ({"global_batch_size": 3}, "at least one sample per rank"),
        ({"global_batch_size": 8, "micro_batch_size": 9}, "can't be larger than the window"),
        ({"global_batch_size": 8, "accumulation_steps": 3}, "share of the window is 2 samples"),
        ({"global_batch_size": 0}, "at least 1"),
    ],
)
def test_impossible_numbers_are_refused_with_all_of_them(numbers: dict[str, int], said: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_batch(world_size=4, **numbers)
    message = str(error.value)
    assert said in message
    assert "world size 4" in message
    for name in ("global_batch_size", "micro_batch_size", "accumulation_steps"):
        assert f"batch.{name}={numbers.get(name, 'null')}" in message


def test_the_plan_explains_itself() -> None:
    plan = resolve_batch(world_size=4, global_batch_size=256)
    assert plan.explain().startswith("window 256 = 4 ranks × 4 micro-steps × 16; 1 sync per update")
    assert plan.explain(1437).endswith("6 windows an epoch, the last of 157")
    assert plan.explain(1437, drop_last=True).endswith("5 windows an epoch, 157 samples left out")
    assert "all 100 samples there are" in plan.explain(100)
    single = resolve_batch(world_size=1, global_batch_size=10, micro_batch_size=10)
    assert single.explain() == "window 10 = 1 rank × 1 micro-step × 10; no sync needed"
    uneven = resolve_batch(world_size=3, global_batch_size=10, micro_batch_size=3)
    assert uneven.explain().startswith("window 10 = 3 ranks × 1–2 micro-steps × 2–3")


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 500))
def test_parts_by_speed(speeds: list[float], more: int) -> None:
    total = len(speeds) + more
    parts = split_by_speed(total, speeds)
    assert sum(parts) == total
    assert min(parts) >= 1
    for part, speed in zip(parts, speeds, strict=True):
        assert abs(part - 1 - more * speed / sum(speeds)) < 1
    assert split_by_speed(12, [3.0, 1.0]) == [9, 3] or split_by_speed(12, [3.0, 1.0]) == [8, 4]


@pytest.mark.parametrize("equal", [False, True])
def test_windows_are_dealt_out_by_speed(equal: bool) -> None:
    plan = resolve_batch(world_size=3, global_batch_size=64, micro_batch_size=8, equal_micro_steps=equal)
    cut = plan.cut(64, (0.5, 0.3, 0.2))
    shares = [sum(sizes) for sizes in cut.sizes]
    assert shares == [32, 19, 13]
    assert max(size for sizes in cut.sizes for size in sizes) <= 8
    assert [len(sizes) for sizes in cut.sizes] == ([4, 4, 4] if equal else [4, 3, 2])
    assert plan.cut(2, (0.5, 0.3, 0.2)) == plan.cut(2), "too few to tell ranks apart"


@given(st.integers(1, 20_000), st.data())
def test_the_order_in_blocks_is_the_order(num_samples: int, data: st.DataObject) -> None:
    order = EpochOrder(num_samples, seed=5)
    for _ in range(3):
        epoch = data.draw(st.integers(0, 2))
        start = data.draw(st.integers(0, num_samples - 1))
        stop = data.draw(st.integers(start + 1, min(num_samples, start + 6000)))
        wanted = shuffled(range(start, stop), num_samples, 5, epoch)
        assert order.samples(epoch, start, stop).tolist() == wanted.tolist()


def test_the_order_is_kept_for_a_few_blocks_only() -> None:
    order = EpochOrder(100_000, seed=0)
    for start in range(0, 100_000, 500):
        order.samples(0, start, start + 500)
    assert order._block.cache_info().currsize <= 4
