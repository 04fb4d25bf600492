from __future__ import annotations

import logging
import random
import re
import time
from contextlib import closing
from typing import Any

import pytest
import torch
from loading import WITH_WORKERS
from torch.utils.data import Dataset

from distaccum.errors import UserError
from distaccum.loaders import EvaluationLoader, LoaderOptions, WindowLoader, waiting
from distaccum.loaders.load_clock import LoadTimes
from distaccum.loaders.waiting import Measured


def measured(
    load: float, train: float, workers: int, *, waited: float = 0.0, busy: float = 0.1, longest: float | None = None
) -> Measured:
    """All in milliseconds."""
    times = LoadTimes(seconds=load / 1e3, processor_seconds=busy * load / 1e3, longest=(longest or load) / 1e3)
    return Measured(step=(train + waited) / 1e3, waited=waited / 1e3, load=times, num_workers=workers)


@pytest.mark.parametrize(
    ("period", "workers"),
    [
        (measured(0.1, 1, 1), (0, None)),  # read faster than handed over
        (measured(10, 100, 1), (1, 2)),
        (measured(90, 10, 1, waited=80), (12, 2)),  # 90 / 10, and a quarter more
        (measured(9, 10, 1), (2, 2)),  # as fast as needed, and no faster
        (measured(900, 10, 1, waited=890), (16, 2)),
        (measured(90, 10, 1, waited=80, busy=1, longest=85), (3, 3)),  # 3 cores beside the one that trains
        (measured(90, 10, 1, waited=80, busy=0.5), (6, 2)),
        (measured(10, 100, 1, longest=900), (1, 9)),
        (measured(10, 100, 1, longest=90_000), (1, 32)),
    ],
)
def test_as_many_workers_as_load_as_fast_as_the_training_goes(
    period: Measured, workers: tuple[int, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    assert period.workers(None) == workers
    if workers[0]:
        assert period.workers(3) == (min(workers[0], 10), 3)


def test_without_a_core_there_is_a_worker_only_for_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert measured(90, 10, 1, waited=80, busy=1).workers(None) == (0, None)
    assert measured(90, 10, 1, waited=80, busy=0.1).workers(None) == (5, 2)


@pytest.mark.parametrize(
    ("period", "said"),
    [
        (measured(10, 100, 0, waited=10), None),
        (measured(0.2, 0.2, 0, waited=0.2), None),
        (measured(90, 10, 0, waited=90), r"takes 90 ms to load and 10 ms to train on.*set data.num_workers=auto$"),
        (measured(90, 10, 2, waited=35), r"with data.num_workers=2: set auto, or 12$"),
        (measured(10, 10, 2, waited=5, longest=500), r"slowest one took 0.5 s to load: set a larger data.prefetch"),
        (measured(900, 10, 16, waited=46), r"waiting for the storage"),
        (measured(90, 10, 3, waited=20, busy=1), r"no core left"),
    ],
)
def test_what_would_help(period: Measured, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    advice = period.advice(None)
    if said is None:
        assert advice is None
    else:
        assert advice is not None
        assert re.search(said, advice[1]), advice


class Slow(Dataset[Any]):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[int, float, torch.Tensor]:
        time.sleep(self.seconds)
        return index, random.random(), torch.rand(2)


def windows(loader: WindowLoader, count: int, train_seconds: float = 0.0) -> list[list[Any]]:
    found = []
    for window in loader.epoch(0):
        found.append(list(window))
        time.sleep(train_seconds)
        if len(found) == count:
            return found
    return found


@pytest.mark.parametrize(("seconds", "workers"), [(0.01, 2), (0.0, 0)], ids=["slow", "fast"])
class TestAuto:
    pytestmark = WITH_WORKERS

    def test_the_number_is_found_and_changes_no_sample(
        self, seconds: float, workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "distaccum")
        monkeypatch.setattr(waiting, "_TO_DECIDE", (2, 0.05))
        monkeypatch.setattr(waiting, "_ENOUGH_WINDOWS", 3)
        monkeypatch.setattr(waiting, "_MOST_WORKERS", 2)
        monkeypatch.setattr(waiting, "_WORTH_A_WORKER", 4e-3)
        data = Slow(seconds)
        options = LoaderOptions(num_workers="auto", persistent_workers=True)
        loader = WindowLoader(data, global_batch_size=4, micro_batch_size=1, options=options)
        evaluation = EvaluationLoader(data, batch_size=200, options=options, workers_of=loader)
        alone = WindowLoader(Slow(0), global_batch_size=4, micro_batch_size=1)
        with closing(loader), closing(evaluation):
            assert loader.options.workers == 1
            torch.testing.assert_close(windows(loader, 14), windows(alone, 14), rtol=0, atol=0)
            assert loader.options.workers == workers
            if seconds == 0:
                assert sum(len(batch[0]) for batch in evaluation) == 400
                assert evaluation._source.options.workers == 0
        (said,) = [record.message for record in caplog.records if "data.num_workers=auto" in record.message]
        assert said.startswith(f"data.num_workers=auto: {'2 workers with' if workers else 'no worker'}")


def test_options_that_are_no_number() -> None:
    with pytest.raises(UserError, match='num_workers must be a number or "auto"'):
        LoaderOptions(num_workers="many")
    assert LoaderOptions(num_workers="auto").windows_ahead == 34
    assert LoaderOptions(num_workers="auto", prefetch_factor=50).windows_ahead == 52
    assert LoaderOptions(num_workers=3).windows_ahead == 8
