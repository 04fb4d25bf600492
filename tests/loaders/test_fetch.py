from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import WITH_WORKERS, Noisy, Numbers, is_alive, new_fetcher, new_source, requests

from distaccum import UserError
from distaccum.loaders.collate import PadCollate, Stacked
from distaccum.loaders.fetch import MicroBatches, Request
from distaccum.runtime.randomness import GlobalStates

pytestmark = WITH_WORKERS


class Recording(Numbers):
    """Keeps the state of Python's generator at each sample."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def __getitem__(self, index: int) -> Any:
        self.states.append(random.getstate())
        return index


def test_a_dataset_that_draws_nothing_is_not_seeded() -> None:
    data = Recording()
    fetcher = new_fetcher(data)
    state = random.getstate()
    for epoch in range(3):
        assert fetcher[Request(epoch, [1, 2, 3])] == [1, 2, 3]
    assert len(data.states) == 9
    assert all(found == state for found in data.states)
    assert not fetcher.is_random


def test_a_dataset_that_draws_is_loaded_again_once() -> None:
    class Counting(Noisy):
        loads = 0

        def __getitem__(self, index: int) -> Any:
            self.loads += 1
            return super().__getitem__(index)

    data = Counting()
    fetcher = new_fetcher(data)
    first = fetcher[Request(0, [1, 2])]
    assert (fetcher.is_random, data.loads) == (True, 4)
    assert fetcher[Request(0, [1, 2])] == first
    assert data.loads == 6


def test_samples_that_draw_are_noticed_wherever_they_come() -> None:
    class Sometimes(Numbers):
        def __getitem__(self, index: int) -> Any:
            return (index, random.random()) if index == 70 else (index, 0.0)

    late, early = new_fetcher(Sometimes()), new_fetcher(Sometimes())
    for start in range(0, 70, 10):
        late[Request(0, list(range(start, start + 10)))]
    assert not late.is_random
    assert late[Request(0, [69, 70])][1] == early[Request(0, [70])][0]


def test_numbers_differ_by_seed_epoch_sample_and_role() -> None:
    found = {
        number
        for seed in (1, 2)
        for role in ("training", "evaluation")
        for epoch in (0, 1)
        for sample in MicroBatches(Noisy(), list, role, seed)[Request(epoch, [5, 6, 7])]
        for number in sample[1:]
    }
    assert len(found) == 2 * 2 * 2 * 3 * 3


def test_the_training_draws_what_it_would_without_loading() -> None:
    fetcher = new_fetcher(Noisy())
    for _ in range(3):  # not random yet, just found out, known
        before = GlobalStates.now()
        wanted = [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()]
        before.put_back()
        fetcher[Request(0, [1, 2, 3])]
        assert [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()] == wanted


def test_a_collate_that_draws_depends_on_the_first_sample() -> None:
    def mixing(samples: list[Any]) -> Any:
        return samples, random.random()

    one, other = new_fetcher(Numbers(), mixing), new_fetcher(Numbers(), mixing)
    other[Request(0, [8])]
    assert one[Request(0, [3, 4])][1] == other[Request(0, [3, 5, 6])][1]
    assert one[Request(0, [3, 4])][1] != one[Request(1, [3, 4])][1]
    assert one[Request(0, [3, 4])][1] != one[Request(0, [4])][1]


def test_batched_loading_stays_batched_unless_it_draws() -> None:
    class Batched(Numbers):
        calls: list[list[int]]

        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.calls.append(indices)
            return [super(Batched, self).__getitem__(index) for index in indices]

    class BatchedNoisy(Batched):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [(index, random.random()) for index, _ in super().__getitems__(indices)]

    def draws(samples: list[Any]) -> Any:
        return samples, random.random()

    data = Batched()
    data.calls = []
    fetcher = new_fetcher(data, draws)
    fetcher[Request(0, [1, 2])], fetcher[Request(0, [3, 4])]
    assert data.calls == [[1, 2], [1, 2], [3, 4]]

    noisy = BatchedNoisy()
    noisy.calls = []
    fetcher = new_fetcher(noisy)
    first = fetcher[Request(0, [1, 2])]
    assert fetcher[Request(0, [2, 9])][0] == first[1]
    assert noisy.calls[-2:] == [[2], [9]]


def test_micro_batches_that_a_dataset_makes_itself_stay_whole() -> None:
    class Columns(Numbers):
        def __getitems__(self, indices: list[int]) -> Any:
            return torch.tensor(indices) + torch.rand(())

    one, other = new_fetcher(Columns(), lambda batch: batch), new_fetcher(Columns(), lambda batch: batch)
    assert torch.equal(one[Request(0, [1, 2])], other[Request(0, [1, 2])])


def test_samples_of_one_micro_batch_that_draw_are_asked_for_one_by_one() -> None:
    class StackedNoisy(Numbers):
        def __getitems__(self, indices: list[int]) -> Any:
            return Stacked((torch.tensor(indices), torch.rand(len(indices))))

    one, other = new_fetcher(StackedNoisy(), PadCollate()), new_fetcher(StackedNoisy(), PadCollate())
    together = one[Request(0, [1, 2, 3])][1].tolist()
    assert together == [other[Request(0, [index])][1].item() for index in (1, 2, 3)]


def test_a_collate_function_gets_a_list_of_samples() -> None:
    class Together(Numbers):
        def __getitems__(self, indices: list[int]) -> Any:
            return Stacked(torch.tensor(indices))

    assert new_fetcher(Together(), lambda samples: samples)[Request(0, [3, 4])] == [3, 4]


def test_failures_name_the_sample_also_when_random() -> None:
    class Bad(Noisy):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            if index == 4:
                raise ValueError(f"no {sample[1]}")
            return sample

    fetcher = new_fetcher(Bad())
    failures = [fetcher[Request(0, [3, 4])] for _ in range(2)]
    assert all(isinstance(failure, UserError) for failure in failures)
    assert str(failures[0]).startswith("sample 4 of the training data could not be loaded: ValueError: no 0.")
    assert str(failures[0]) == str(failures[1])


@pytest.mark.parametrize("samples", [[("a/0.png", 0), ("b/1.png", 1)], ["a/0.png", Path("b/1.png")]])
def test_the_file_of_a_sample_is_named(samples: list[Any]) -> None:
    class Files:
        def __init__(self, samples: list[Any]) -> None:
            self.samples = samples

        def __getitem__(self, index: int) -> Any:
            raise OSError("image file is truncated")

    failure = MicroBatches(Files(samples), None, "training", 1)[Request(0, [1])]
    wanted = "sample 1 (b/1.png) of the training data could not be loaded: OSError: image file is truncated"
    assert str(failure) == wanted
    assert str(MicroBatches(Files([3, 4]), None, "training", 1)[Request(0, [1])]) == wanted.replace(" (b/1.png)", "")


@pytest.mark.parametrize("persistent", [True, False])
def test_two_iterations_at_once_are_refused(persistent: bool) -> None:
    with new_source(Numbers(), 1, persistent=persistent) as source:
        one, other = (source.batches(lambda: requests(5)) for _ in range(2))
        next(one), next(other)
        with pytest.raises(UserError, match="Finish one before the next"):
            next(one)
        assert len(list(other)) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_micro_batch_leaves_an_iteration_alone(num_workers: int) -> None:
    with new_source(Noisy(), num_workers) as source:
        wanted = [batch[1].tolist() for batch in source.batches(lambda: requests(6))]
        batches = source.batches(lambda: requests(6))
        found = [next(batches)[1].tolist()]
        assert next(source.aside([Request(0, [2, 3])]))[1].tolist() == wanted[1]
        assert found + [batch[1].tolist() for batch in batches] == wanted


def test_one_micro_batch_is_loaded_by_a_worker_where_there_are_workers() -> None:
    with new_source(Numbers(), 2) as source:
        pid = int(next(source.aside([Request(0, [1])]))[1][0])
        assert pid != os.getpid()
        assert not is_alive(pid)
