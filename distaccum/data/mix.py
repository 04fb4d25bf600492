"""Samples of several datasets, mixed by weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from distaccum.errors import UserError, listed, require
from distaccum.loaders.lengths import lengths_of
from distaccum.loaders.options import size_of
from distaccum.planning.lengths import EpochLengths, SampleLengths
from distaccum.planning.order import shuffled
from distaccum.runtime.randomness import derived_seed

logger = logging.getLogger("distaccum.data")


class _Draw(NamedTuple):
    """Samples that are drawn from one source in one time round: their places among those asked for, and numbers."""

    source: str
    time_round: int
    places: NDArray[np.int64]
    samples: NDArray[np.int64]


class Mix(Dataset[Any]):
    """Draws samples from several datasets, of which each has its share of an epoch.

    Which source a sample is from, and which of its samples it is, is a function of seed, epoch and position alone. A
    source with the weight w of the sum W gives N · w / W of an epoch's N samples, rounded by largest remainders: the
    first positions are the first source's, and so on, as a loader shuffles positions. It is gone through in a shuffled
    order that goes on from epoch to epoch: no sample comes again before all others have come, and each time round the
    order is another one. So of a source that is larger than its share each epoch has other samples, and one that is
    smaller is repeated.

    Attributes that are the same for all sources (`vocab_size`, `num_classes`, …) are the mix's too; `collate_fn` and
    `pack_fn` are the first one's, and must be of the same type in all.

    Args:
        sources: map-style datasets by name. They may be mixes themselves, whose epochs are their times round.
        weights: a positive number for each.
        num_samples: N. None: as many as all sources have together.
        seed: decides the order of each source.

    Attributes:
        counts: how many samples of an epoch are from each source, by name.
        order: describes the order. With an equal seed, equal words mean equal windows.

    Raises:
        UserError: the weights don't fit the sources, or a source has no share or can only be read forwards.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        weights: Mapping[str, float],
        *,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        require(
            len(sources) > 0 and sources.keys() == weights.keys(),
            "data.mix must give each source a weight, and no other: the sources are "
            f"{listed(list(sources), 8) or 'none'}, and the weights are for {listed(list(weights), 8) or 'none'}.",
        )
        for name, weight in weights.items():
            require(
                0 < weight < float("inf"), f"data.mix.{name}={weight} must be positive. Leave out a source without one."
            )
        self._sources = dict(sources)
        self._sizes = {name: _size(name, source) for name, source in sources.items()}
        total = sum(self._sizes.values()) if num_samples is None else num_samples
        self.counts = apportioned(total, {name: weights[name] for name in sources})
        for name, count in self.counts.items():
            require(
                count > 0,
                f"data.mix: of {total:,} samples an epoch none are from {name}, as its weight is {weights[name]}. Give "
                "a larger data.mix_samples, or leave the source out.",
            )
        self._seeds = {name: derived_seed(seed, "mix", name) for name in sources}
        self._starts = np.array([0, *accumulate(self.counts.values())])
        for name in ("collate_fn", "pack_fn"):
            self._take_function(name)
        self.order = ", ".join(f"{name} {count} of {self._sizes[name]}" for name, count in self.counts.items())
        shares = (
            f"{name} {count:,} of its {self._sizes[name]:,} ({count / self._sizes[name]:.3g} times round)"
            for name, count in self.counts.items()
        )
        logger.info("mix of %s samples an epoch: %s", f"{total:,}", ", ".join(shares))

    def _take_function(self, name: str) -> None:
        found = [getattr(source, name, None) for source in self._sources.values()]
        kinds = {type(function) for function in found}
        require(
            len(kinds) == 1,
            f"data.mix: the sources make micro-batches in different ways, by their attributes {name}: "
            f"{listed(sorted(kind.__name__ for kind in kinds), 6)}. Give data.collate_fn, and sources without one.",
        )
        if found[0] is not None:
            setattr(self, name, found[0])

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name != "lengths":
            first, *others = (getattr(source, name, None) for source in self._sources.values())
            if isinstance(first, int | float | str | tuple | list) and all(_same(other, first) for other in others):
                return first
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Any:
        """Returns the sample at a position of the first epoch."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.samples_of_epoch(0, [index % len(self)])[0]

    def samples_of_epoch(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        """Returns the samples at positions of an epoch."""
        found: list[Any] = [None] * len(indices)
        for draw in self._draws(epoch, np.asarray(indices, dtype=np.int64)):
            for place, sample in zip(draw.places.tolist(), self._loaded(draw), strict=True):
                found[place] = sample
        return found

    def drawn(self, epoch: int, indices: Sequence[int]) -> list[tuple[str, int]]:
        """Returns of positions of an epoch the source's name, and which of its samples it is."""
        found = [("", 0)] * len(indices)
        for draw in self._draws(epoch, np.asarray(indices, dtype=np.int64)):
            for place, sample in zip(draw.places.tolist(), draw.samples.tolist(), strict=True):
                found[place] = draw.source, sample
        return found

    def find_lengths(self) -> EpochLengths:
        """Returns the lengths of the samples of all epochs, by those of the sources.

        Raises:
            UserError: a source's lengths can't be found, or would have to be measured.
        """
        lengths: dict[str, SampleLengths] = {}
        for name, source in self._sources.items():
            # What is measured here would be kept nowhere: each rank would load all samples, at each start.
            require(
                getattr(source, "lengths", None) is not None or hasattr(source, "find_lengths"),
                f"data.sources.{name}: batch=by_length and batch=packed take the lengths of a mix from its sources, "
                f"and a {type(source).__name__} doesn't know its own. Give it an attribute `lengths`, one number for "
                "each sample, or a method `find_lengths()` that returns them; or set batch=uniform.",
            )
            try:
                found = lengths_of(source)
            except UserError as error:
                raise UserError(f"data.sources.{name}: {error}") from error
            if not isinstance(found, EpochLengths):
                found = SampleLengths(found, self._sizes[name], f"data.sources.{name}")
            lengths[name] = found

        def of_epoch(epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
            own = np.empty(len(indices), np.int64)
            for draw in self._draws(epoch, indices):
                of_source = lengths[draw.source]
                before = draw.time_round * len(of_source) if isinstance(of_source, EpochLengths) else 0
                own[draw.places] = of_source[draw.samples + before]
            return own

        return EpochLengths(of_epoch, len(self), max(found.longest for found in lengths.values()))

    def _draws(self, epoch: int, indices: NDArray[np.int64]) -> Iterator[_Draw]:
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        for number, (name, size) in enumerate(self._sizes.items()):
            places = np.flatnonzero(owners == number)
            times, positions = np.divmod(epoch * self.counts[name] + indices[places] - self._starts[number], size)
            for time in np.unique(times).tolist():
                own = times == time
                yield _Draw(name, time, places[own], shuffled(positions[own], size, self._seeds[name], time))

    def _loaded(self, draw: _Draw) -> Any:
        source, samples = self._sources[draw.source], draw.samples.tolist()
        try:
            if hasattr(source, "samples_of_epoch"):
                return source.samples_of_epoch(draw.time_round, samples)
            if hasattr(source, "__getitems__"):
                return source.__getitems__(samples)
            return [source[sample] for sample in samples]
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f"{draw.source}, samples {listed(samples, 8)}: {said}") from error


def apportioned(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divides a number in proportion to weights, by largest remainders; of equal ones the first comes first.

    Weights are taken as the decimal numbers that they are written as: 0.7 and 0.3 of 10 are 7 and 3.
    """
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    whole = sum(exact.values())
    quotas = {name: total * weight / whole for name, weight in exact.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _size(name: str, source: Any) -> int:
    require(
        not getattr(source, "is_ordered", False),
        f"data.mix: {name} is a {type(source).__name__}, which can only be read forwards: samples of a mix need "
        "numbers. Read the same files by an index.",
    )
    return size_of(source, f"data.sources.{name}")


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
