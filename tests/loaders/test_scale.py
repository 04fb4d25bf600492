"""What a plan costs does not grow with the number of samples, micro-steps or epochs."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from distaccum.config import LoopConfig
from distaccum.loaders import EvaluationLoader, WindowLoader
from distaccum.planning import lengths as lengths_of_samples
from distaccum.planning.lengths import SampleLengths, longest_samples
from distaccum.planning.window_sizes import BatchSizes, NoiseSizes, SizeRamp, SizeRule, SizeTable
from distaccum.training.progress import RunProgress

WINDOW, EPOCHS = 64, 1000


class Many(Dataset[int]):
    """As many samples as one likes: sample i is i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.count
        return index


@contextmanager
def calls_counted() -> Iterator[Callable[[], int]]:
    """Counts calls of functions, which are the same at every run as seconds are not."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        yield lambda: count
    finally:
        sys.setprofile(None)


def plan(num_samples: int, rule: SizeRule | None, drop_last: bool) -> tuple[int, int]:
    """Does all that a run does with its plan; returns the calls and the most bytes that it took."""
    np.random.seed(0)  # with a normal number left over of another test, each look for draws takes thousands of calls
    tracemalloc.start()
    with calls_counted() as calls:
        loader = WindowLoader(
            Many(num_samples),
            global_batch_size=WINDOW,
            micro_batch_size=16,
            schedule=rule,
            drop_last=drop_last,
            rank=1,
            world_size=2,
        )
        loader.explain()
        progress = RunProgress(loader, LoopConfig(epochs=EPOCHS))
        assert progress.total_updates > EPOCHS
        last = loader.sizes.count(EPOCHS - 1) - 1
        for epoch, first in ((0, 0), (EPOCHS // 2, 7), (EPOCHS - 1, last)):
            window = next(loader.epoch(epoch, first))
            assert sum(map(len, window.sample_indices)) == window.num_samples // 2
            progress.epoch, progress.next_window = window.epoch, window.index + 1
            state = json.dumps([progress.state_dict(), loader.state_dict()])
        assert len(state) < 5000
        evaluation = EvaluationLoader(Many(num_samples), batch_size=16, rank=1, world_size=2)
        assert len(evaluation) == -(-(num_samples // 2) // 16)
        assert next(iter(evaluation))[-1] == num_samples // 2 + 15
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return calls(), most


RULES: dict[str, Callable[[], SizeRule | None]] = {
    "constant": lambda: None,
    "table": lambda: SizeTable(WINDOW, {1: 16, 100: 32, 200: WINDOW}),
    "by epoch": lambda: SizeTable(WINDOW, {epoch: 16 + epoch // 10 for epoch in range(0, EPOCHS, 100)}, by_epoch=True),
    "ramp": lambda: SizeRamp(WINDOW, start=16, updates=10**6),
    "noise": lambda: NoiseSizes(WINDOW, smallest=16, largest=128),
}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_plan_costs_the_same_for_any_number_of_samples(name: str, drop_last: bool) -> None:
    plan(10**6, RULES[name](), drop_last)  # fills caches
    calls, most = zip(*(plan(count, RULES[name](), drop_last) for count in (10**6, 10**9, 10**12)), strict=True)
    assert max(calls) < 1.5 * min(calls) < 30_000
    assert max(most) < 2e6


def test_a_window_costs_the_same_whenever_sizes_have_changed() -> None:
    """Thousands of changes of the noise scale, each over few windows of thousands of epochs."""

    def change(sizes: BatchSizes, times: int) -> int:
        with calls_counted() as calls:
            for _ in range(times):
                now = sizes.rule.changes[-1]  # type: ignore[attr-defined]
                sizes.change(16 if now[1] == 8 else 8, now[0] + 50)
                epoch = (now[0] + 50) // 10
                assert sizes.first_number(epoch) <= now[0] + 50 + 10 * epoch
        return calls()

    sizes = BatchSizes(NoiseSizes(8, smallest=8, largest=16), 100)
    early = change(sizes, 100)
    change(sizes, 1000)
    assert change(sizes, 100) < 1.5 * early


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 9))
def test_the_longest_samples_are_those_of_sorting_all(found: list[int], count: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lengths_of_samples, "_BLOCK", block)
        order = sorted(range(len(found)), key=lambda index: -found[index])
        assert longest_samples(found, count) == longest_samples(np.array(found, np.uint16), count) == order[:count]
        lengths = SampleLengths(np.array(found, np.uint8), len(found), "")
        assert (lengths.longest, lengths.longest_samples(count)) == (max(found), order[:count])


@pytest.mark.parametrize("packed", [False, True])
def test_lengths_in_a_file_are_not_copied(tmp_path: Path, packed: bool) -> None:
    count = 10**7
    stored = np.memmap(tmp_path / "lengths", np.uint8, mode="w+", shape=(count,))
    stored[:] = 100
    stored[count // 2 :: 3] = 200
    tracemalloc.start()
    loader = WindowLoader(
        Many(count), global_batch_size=64, max_tokens=2000, lengths=stored, packed=packed, collate_fn=list
    )
    window = next(loader.epoch(0, count // 64 - 1))
    loader.cuts.lengths.longest_samples(2)  # type: ignore[union-attr]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < count, "not even a byte for each; as int64 it would be 8"
    assert sum(window.sizes) == 64
    assert loader.cuts.lengths.longest == 200  # type: ignore[union-attr]
    wide = WindowLoader(
        Many(count), global_batch_size=64, max_tokens=2000, lengths=stored.astype(np.int64), packed=packed
    )
    assert wide.cuts.micro_batches(3, 5) == loader.cuts.micro_batches(3, 5)
