"""Datasets and micro-batches for the tests of loading."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

from distaccum.loaders import LoaderOptions
from distaccum.loaders.fetch import BatchSource, MicroBatches, Request

WITH_WORKERS = [
    # A worker that dies at a bad moment could make its reader wait for ever.
    pytest.mark.timeout(60),
    # multiprocessing and torch leave connections and temporary files behind when a worker dies while they talk to it.
    pytest.mark.usefixtures("collects_garbage"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
"""Marks of tests that start data workers."""


class Numbers(Dataset[Any]):
    """Sample i is i, and the process that loaded it."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


class Noisy(Numbers):
    def __getitem__(self, index: int) -> Any:
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def new_fetcher(dataset: Any, collate_fn: Any = list, seed: int = 1) -> MicroBatches:
    return MicroBatches(dataset, collate_fn, "training", seed)


def new_source(
    dataset: Any,
    num_workers: int,
    *,
    persistent: bool = True,
    collate_fn: Any = default_collate,
    pin_memory: bool = False,
) -> Any:
    options = LoaderOptions(
        num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent and num_workers > 0
    )
    return closing(BatchSource(new_fetcher(dataset, collate_fn), options))


def requests(count: int, size: int = 2) -> Iterator[Request]:
    return (Request(0, list(range(size * number, size * number + size))) for number in range(count))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
