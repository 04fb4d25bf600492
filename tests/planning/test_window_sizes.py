from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from distaccum.config import LoopConfig, TrainConfig
from distaccum.config.compose import compose
from distaccum.config.tools import CompareConfig, StudyConfig, TuneConfig
from distaccum.errors import UserError
from distaccum.loaders import WindowLoader
from distaccum.planning import resolve_batch, window_bounds
from distaccum.planning.window_sizes import BatchSizes, ConstantSize, NoiseSizes, SizeRamp, SizeRule, SizeTable
from distaccum.training.data import size_rule
from distaccum.training.progress import total_updates

SIZES = st.integers(1, 20)


def _noise(base: int, smallest: int, largest: int, changes: list[tuple[int, int]]) -> NoiseSizes:
    rule = NoiseSizes(base, smallest=smallest, largest=largest)
    firsts = itertools.accumulate(gap for gap, _ in changes)
    rule.changes += [(first, size) for first, (_, size) in zip(firsts, changes, strict=True)]
    return rule


RULES = st.one_of(
    st.builds(ConstantSize, SIZES),
    st.builds(SizeTable, SIZES, st.dictionaries(st.integers(1, 30), SIZES, max_size=4)),
    st.builds(
        lambda base, table: SizeTable(base, table, by_epoch=True),
        SIZES,
        st.dictionaries(st.integers(0, 6), SIZES, max_size=4),
    ),
    st.builds(
        lambda base, start, updates: SizeRamp(base, start=start, updates=updates), SIZES, SIZES, st.integers(1, 40)
    ),
    st.builds(_noise, SIZES, st.just(1), st.just(20), st.lists(st.tuples(st.integers(1, 12), SIZES), max_size=4)),
)


def _one_by_one(rule: SizeRule, num_samples: int, drop_last: bool, epochs: int) -> list[list[tuple[int, int]]]:
    """What is meant, the slow way: window after window."""
    number, all_bounds = 0, []
    for epoch in range(epochs):
        position, bounds = 0, []
        while position < num_samples:
            size = rule.at(epoch, number)[0]
            stop = min(position + size, num_samples)
            if drop_last and stop - position < size:
                break
            bounds.append((position, stop))
            position, number = stop, number + 1
        all_bounds.append(bounds)
    return all_bounds


@settings(deadline=None, max_examples=300)
@given(RULES, st.integers(20, 90), st.booleans(), st.permutations(range(7)))
def test_windows_are_those_of_going_through_them_one_by_one(
    rule: SizeRule, num_samples: int, drop_last: bool, order: list[int]
) -> None:
    expected = _one_by_one(rule, num_samples, drop_last, len(order))
    sizes = BatchSizes(rule, num_samples, drop_last)
    for epoch in order:  # at random, so that nothing depends on what was asked before
        assert sizes.bounds(epoch) == expected[epoch]
        assert sizes.count(epoch) == len(expected[epoch])
        assert sizes.first_number(epoch) == sum(map(len, expected[:epoch]))
        for index, (start, stop) in enumerate(sizes.bounds(epoch)):
            planned = sizes.planned(epoch, index)
            assert rule.smallest <= planned <= rule.largest
            assert stop - start == planned or (stop == num_samples and not drop_last)
        seen = [place for start, stop in sizes.bounds(epoch) for place in range(start, stop)]
        assert seen == list(range(len(seen)))
        assert drop_last or len(seen) == num_samples


def test_a_constant_size_gives_the_plans_own_windows() -> None:
    sizes = BatchSizes(ConstantSize(7), 30)
    assert sizes.bounds(0) == sizes.bounds(10**9) == window_bounds(30, 7)
    assert sizes.first_number(10**9) == 5 * 10**9


def test_tables_and_ramps_begin_where_they_say() -> None:
    by_update = BatchSizes(SizeTable(4, {3: 6, 5: 2}), 100)
    assert [by_update.planned(0, index) for index in range(6)] == [4, 4, 6, 6, 2, 2]
    by_epoch = BatchSizes(SizeTable(4, {1: 6}, by_epoch=True), 12)
    assert [by_epoch.count(epoch) for epoch in range(3)] == [3, 2, 2]
    ramp = BatchSizes(SizeRamp(16, start=8, updates=4), 1000)
    assert [ramp.planned(0, index) for index in range(6)] == [8, 10, 12, 14, 16, 16]
    assert [ramp.ratio(0, index) for index in (0, 4)] == [0.5, 1.0]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 12), SIZES), min_size=1, max_size=5), st.integers(20, 60))
def test_a_change_leaves_all_windows_before_it_as_they_were(changes: list[tuple[int, int]], num_samples: int) -> None:
    sizes = BatchSizes(NoiseSizes(5, smallest=1, largest=20), num_samples)
    first = 0
    for gap, size in changes:
        first += gap
        before = [
            (e, i, b) for e in range(4) for i, b in enumerate(sizes.bounds(e)) if sizes.first_number(e) + i < first
        ]
        sizes.change(size, first)
        assert all(sizes.bounds(epoch)[index] == bounds for epoch, index, bounds in before)
    repeated = BatchSizes(NoiseSizes(5, smallest=1, largest=20), num_samples)
    repeated.load_state_dict({"size_changes": [list(change) for change in sizes.state_dict()["size_changes"]]})
    assert [repeated.bounds(epoch) for epoch in range(4)] == [sizes.bounds(epoch) for epoch in range(4)]


def test_sizes_follow_the_noise_scale_in_bounded_steps() -> None:
    rule = NoiseSizes(64, smallest=16, largest=200)
    assert rule.wanted(128.0, measurements=4) is None  # not known well enough
    assert rule.wanted(70.0, measurements=5) is None  # not worth a change
    assert rule.wanted(100.0, measurements=5) == 96
    assert rule.wanted(10_000.0, measurements=5) == 128  # twice as many at most
    assert rule.wanted(1.0, measurements=5) == 32
    rule.changes.append((9, 128))
    assert rule.wanted(float("inf"), measurements=9) == 200
    rule.changes.append((19, 200))
    assert rule.wanted(float("inf"), measurements=9) is None


def test_sizes_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UserError, match=r"windows of 3 samples, fewer than the 4 ranks"):
        BatchSizes(SizeRamp(16, start=3, updates=4), 100).check(4)
    with pytest.raises(UserError, match=r"100 samples, fewer than one window of 128"):
        BatchSizes(SizeTable(16, {9: 128}), 100, drop_last=True).check(4)
    BatchSizes(SizeTable(16, {9: 128}), 100).check(4)


def test_too_little_data_is_refused() -> None:
    BatchSizes(ConstantSize(8), 8, drop_last=True).check(4)
    BatchSizes(ConstantSize(8), 4).check(4)
    with pytest.raises(UserError, match="3 samples, fewer than the 4 ranks"):
        BatchSizes(ConstantSize(8), 3).check(4)
    with pytest.raises(UserError, match="7 samples, fewer than one window of 8"):
        BatchSizes(ConstantSize(8), 7, drop_last=True).check(4)


@pytest.mark.parametrize("rule", [SizeRamp(24, start=4, updates=9), SizeTable(8, {3: 20, 7: 5})])
@pytest.mark.parametrize("drop_last", [False, True])
def test_windows_are_the_same_on_any_number_of_ranks(rule: SizeRule, drop_last: bool) -> None:
    data = TensorDataset(torch.arange(70))

    def windows(world_size: int) -> list[list[int]]:
        found = []
        loaders = [
            WindowLoader(
                data,
                global_batch_size=rule.base,
                micro_batch_size=3,
                drop_last=drop_last,
                schedule=rule,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        for _ in range(3):
            epochs = [list(_contents(loader)) for loader in loaders]
            found += [[sample for part in window for sample in part] for window in zip(*epochs, strict=True)]
        return found

    one = windows(1)
    assert one == windows(2) == windows(4)
    sizes = BatchSizes(rule, 70, drop_last)
    assert list(map(len, one)) == [stop - start for epoch in range(3) for start, stop in sizes.bounds(epoch)]


def _contents(loader: WindowLoader) -> Iterator[list[int]]:
    for window in loader:
        assert window.number == loader.sizes.first_number(window.epoch) + window.index
        yield [int(sample) for (batch,), size in zip(window, window.sizes, strict=True) if size for sample in batch]


def test_a_size_that_changes_while_an_epoch_is_loaded_moves_its_end() -> None:
    rule = NoiseSizes(4, smallest=4, largest=16)
    loader = WindowLoader(
        TensorDataset(torch.arange(50)), global_batch_size=4, micro_batch_size=4, schedule=rule, rank=0, world_size=1
    )
    seen: list[list[int]] = []
    for window in loader.epoch(0):
        if window.index == 1:
            loader.cuts.set_window_size(16, now=window.number)
        seen.append([int(sample) for (batch,) in window for sample in batch])
    assert list(map(len, seen)) == [4, 4, 4, 4, 4, 16, 14]
    assert sorted(sample for window in seen for sample in window) == list(range(50))
    assert loader.sizes.number(1, 0) == 7
    again = WindowLoader(
        TensorDataset(torch.arange(50)),
        global_batch_size=4,
        schedule=NoiseSizes(4, smallest=4, largest=16),
        rank=0,
        world_size=1,
    )
    again.load_state_dict(loader.state_dict())
    assert [[i for part in window.sample_indices for i in part] for window in again.epoch(0)] == seen


def test_a_run_of_epochs_has_as_many_updates_as_their_windows() -> None:
    sizes = BatchSizes(SizeTable(10, {1: 20}, by_epoch=True), 100)
    assert total_updates(LoopConfig(epochs=3), sizes) == 10 + 5 + 5
    assert total_updates(LoopConfig(epochs=3, max_updates=12), sizes) == 12


NOISE = ["batch.schedule=noise", "batch.min_size=16", "batch.max_size=512"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.ramp_from=8"], "batch.ramp_from=8 means nothing with batch.schedule=constant"),
        (["batch.lr_rule=sqrt"], "batch.lr_rule=sqrt means nothing with batch.schedule=constant"),
        (["batch.schedule=ramp", "batch.ramp_from=8"], "batch.schedule=ramp needs batch.ramp_updates"),
        (["batch.schedule=table"], "batch.schedule=table needs batch.table"),
        (["batch.schedule=table", "batch.table=[[0,8]]"], "has the entry [0, 8], which is impossible"),
        (["batch.schedule=table", "batch.table=[[1]]"], "has the entry [1], which is impossible"),
        (["batch.schedule=table", "batch.table=[[1,8],[1,9]]"], "two sizes for one and the same begin"),
        (
            ["batch.schedule=table", "batch.table=[[3,8]]", "batch.accumulation_steps=4"],
            "batch.accumulation_steps=4 can't be given with batch.schedule=table",
        ),
        (NOISE, "set insight.noise_scale=true"),
        ([*NOISE, "insight.noise_scale=true", "batch.global_batch_size=8"], "batch.global_batch_size=8, which is not"),
        ([*NOISE, "insight.noise_scale=true", "schedule=cosine"], "set train.max_updates, or schedule=constant"),
    ],
)
def test_what_does_not_belong_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compose(overrides)


@pytest.mark.parametrize("tool", [CompareConfig, StudyConfig, TuneConfig])
def test_tools_for_windows_of_one_size_refuse_a_schedule(tool: type[TrainConfig]) -> None:
    config = compose(["batch.schedule=ramp", "batch.ramp_from=8", "batch.ramp_updates=4"])
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    with pytest.raises(UserError, match=r"batch.schedule=ramp changes it: set batch.schedule=constant"):
        tool(**values)


def test_what_a_configuration_says_is_built() -> None:
    table = compose(["batch.schedule=table", "batch.table=[[2,8],[1,4]]", "batch.table_unit=epoch"]).batch
    assert str(size_rule(table)) == "table by epoch: 256 from 0 on, 4 from 1 on, 8 from 2 on"
    noise = compose([*NOISE, "insight.noise_scale=true", "schedule=cosine", "train.max_updates=9"]).batch
    assert str(size_rule(noise)) == "noise scale between 16 and 512, beginning with 256"
    assert size_rule(compose([]).batch) is None


@given(st.integers(0, 60), st.integers(1, 12), st.booleans(), st.integers(-5, 70))
def test_bounds_are_a_sequence_without_a_list(num_samples: int, size: int, drop_last: bool, place: int) -> None:
    bounds = window_bounds(num_samples, size, drop_last)
    listed = list(bounds)
    assert bounds == listed
    assert bounds != [*listed, (0, 1)]
    assert [bounds[-number] for number in range(1, len(bounds) + 1)] == listed[::-1]
    assert bounds[1:place:2] == listed[1:place:2]
    assert bounds.starting_before(place) == sum(start < place for start, _ in listed)
    with pytest.raises(IndexError):
        bounds[len(bounds)]


@pytest.mark.parametrize("rule", [ConstantSize(1), SizeTable(1, {1000: 2})])
def test_an_epoch_of_any_length_takes_no_time_or_memory(rule: SizeRule) -> None:
    """10¹⁵ windows of one sample: as a list they would fit into no memory, one by one they would take days."""
    sizes = BatchSizes(rule, 10**15)
    sizes.check(1)
    assert sizes.bounds(2)[-1][1] == 10**15
    assert sizes.bounds(0).starting_before(500) == 500
    assert sizes.number(3, sizes.count(3) - 1) == sizes.first_number(4) - 1
    plan = resolve_batch(world_size=1, global_batch_size=1, micro_batch_size=1)
    assert f"; {10**15} windows an epoch" in plan.explain(10**15)
