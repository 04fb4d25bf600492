"""Which samples real ranks load from a source, by id: the same windows for any number of ranks, and after a stop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from distaccum import WindowLoader
from distaccum.loaders import LoaderOptions
from distaccum.loaders.lengths import lengths_of
from distaccum.runtime.world import World

COUNT, GLOBAL_BATCH, EPOCHS = 37, 8, 2
"""Samples of a source; of its windows the fifth and last of an epoch has 5."""
_STAGES = ((4, 3), (2, 3), (1, 2), (3, 2))
"""Ranks, and the updates that they make before the run is stopped: in the middle of an epoch, and beyond its end."""
_WORKERS = {2: 2}
"""Data workers of each rank, by the number of ranks; they serve all epochs."""

Windows = list[list[Any]]
"""The sorted ids of each update's samples, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset of `COUNT` samples, and how to tell which one is which.

    Attributes:
        write: makes its files in an empty folder, on one rank.
        open: makes the dataset of the files in a folder; asked anew for each number of ranks and each start.
        ids: returns the ids of a micro-batch's samples, which are numbers or texts.
        wanted: the ids of an epoch's samples, by the epoch.
        loader: further arguments of the `WindowLoader`.
        by_length: whether windows are cut by length, as the dataset's samples are found to be long.
    """

    write: Callable[[Path], object] = lambda folder: None
    open: Callable[[Path], Any]
    ids: Callable[[Any], Iterable[Any]] = lambda batch: batch["id"].tolist()
    wanted: Callable[[int], Iterable[Any]] = lambda epoch: range(COUNT)
    loader: dict[str, Any] = field(default_factory=dict)
    by_length: bool = False


def assert_exact(world: World, source: Source) -> None:
    """Loads two epochs on 1, 2, 3 and 4 of four ranks, with and without workers, and stops and goes on with others."""
    assert world.world_size == 4
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.from_main(own))
        if world.is_main:
            source.write(folder)
        world.gather(None)
        alone, _ = _loaded(world, source, folder, 1)
        per_epoch = -(-COUNT // GLOBAL_BATCH)
        for epoch in range(EPOCHS):
            windows = alone[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert [len(window) for window in windows] == [8, 8, 8, 8, 5]
            assert sorted(chain(*windows)) == sorted(source.wanted(epoch)), f"epoch {epoch} has other samples"
        assert alone[:per_epoch] != alone[per_epoch:], "epochs have the same order"
        for ranks in (2, 3, 4):
            found, _ = _loaded(world, source, folder, ranks)
            assert found == alone, f"{ranks} ranks have other windows"
            if ranks in _WORKERS:
                found, _ = _loaded(world, source, folder, ranks, num_workers=_WORKERS[ranks])
                assert found == alone, f"{ranks} ranks with data workers have other windows"
        moving: Windows = []
        state: Any = None
        for ranks, updates in _STAGES:
            found, state = _loaded(world, source, folder, ranks, (len(moving), len(moving) + updates), state)
            moving += found
        assert moving == alone, "a run that was stopped and went on with other ranks has other windows"
        world.gather(None)  # nobody removes what others still read


def _loaded(
    world: World,
    source: Source,
    folder: Path,
    ranks: int,
    updates: tuple[int, int] = (0, EPOCHS * -(-COUNT // GLOBAL_BATCH)),
    state: Any = None,
    num_workers: int = 0,
) -> tuple[Windows, Any]:
    """Loads on the first `ranks` ranks, from one update to another; returns the windows, and the loader's state."""
    own: list[list[Any]] = []
    if world.rank < ranks:
        dataset = source.open(folder)
        loader = WindowLoader(
            dataset,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=2,
            seed=5,
            rank=world.rank,
            world_size=ranks,
            options=LoaderOptions(num_workers=num_workers, persistent_workers=num_workers > 0),
            lengths=lengths_of(dataset) if source.by_length else None,
            **source.loader,
        )
        with closing(loader):
            if state is not None:
                loader.load_state_dict(state)
            own = [[entry for batch in window for entry in source.ids(batch)] for window in _windows(loader, *updates)]
            state = loader.state_dict()
    parts = world.gather(own)[:ranks]
    return [sorted(chain(*window)) for window in zip(*parts, strict=True)], world.from_main(state)


def _windows(loader: WindowLoader, first: int, stop: int) -> Iterator[Any]:
    """Yields the windows of updates, by their numbers; the rest of the last epoch is left as a killed run leaves it."""
    epoch, index = divmod(first, len(loader))
    while True:
        for window in loader.epoch(epoch, index):
            if first == stop:
                return
            first += 1
            yield window
        if first == stop:
            return
        epoch, index = epoch + 1, 0
