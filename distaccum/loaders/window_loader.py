"""Windows of tensors on the device: the sharded sampler, the data loader and the copy to the GPU in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from distaccum import planning
from distaccum.loaders.fetch import BatchSource, MicroBatches, Request
from distaccum.loaders.options import LoaderOptions, on_device, placement, size_of
from distaccum.loaders.window import Recutting, Window
from distaccum.planning import recut as recutting
from distaccum.planning.by_length import CostModel, Grouping, Timeline
from distaccum.planning.window_sizes import BatchSizes, ConstantSize, SizeRule
from distaccum.runtime.nested import to_device


class WindowLoader:
    """A data loader of windows. Iterating over it gives the windows of an epoch; each iteration is the next epoch.

    It takes the place of `DataLoader` with `DistributedSampler`: shuffled anew each epoch, nothing duplicated, nothing
    dropped unless asked, and the same samples in update *t* for any number of ranks. Random numbers that the dataset
    draws from the global generators (`torch`, `random`, `numpy.random`) are the same for a sample in an epoch, wherever
    and whenever it is loaded, and loading leaves those generators as they were.

    Args:
        dataset: map-style dataset (`__len__` and `__getitem__`).
        global_batch_size, micro_batch_size, accumulation_steps: see `distaccum.planning.batch_plan.resolve_batch`.
        lengths: of all samples; given, samples of like length share a micro-batch, within each window (see
            `distaccum.planning.by_length.cut_by_length`).
        max_tokens: most tokens in such a micro-batch, padding included. Default: `micro_batch_size` times the longest.
        drop_last: leave out an epoch's last window when it is smaller than the others.
        seed: decides the order together with the epoch, and the dataset's random numbers.
        collate_fn: makes a micro-batch of a list of samples. Default: the dataset's own `collate_fn` if it has one,
            else stacking with dynamic padding (`PadCollate`).
        rank, world_size: default to those of the process group, or to 0 and 1 without one.
        equal_micro_steps: give all ranks the same number of micro-steps.
        split_every: cut each so-many-th window into two micro-steps where it would be one on one rank: those in which
            the noise scale is measured, which takes parts.
        schedule: of the sizes of windows. Default: all have the global batch size.
        options: workers, pinning, device.

    Raises:
        UserError: the batch numbers or the dataset don't fit; while iterating, a sample that can't be loaded.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        global_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        accumulation_steps: int | None = None,
        lengths: Sequence[int] | NDArray[np.int64] | None = None,
        max_tokens: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        equal_micro_steps: bool = False,
        split_every: int | None = None,
        schedule: SizeRule | None = None,
        options: LoaderOptions | None = None,
    ) -> None:
        self.num_samples = size_of(dataset, "training")
        self.rank, world_size = placement(rank, world_size)
        self.plan = planning.resolve_batch(
            world_size=world_size,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            equal_micro_steps=equal_micro_steps,
        )
        self.sizes = BatchSizes(schedule or ConstantSize(self.plan.global_batch_size), self.num_samples, drop_last)
        """How many samples each window has."""
        if schedule is not None:
            planning.check_base_size(self.plan, schedule.base)
            self.sizes.check(world_size)
        planning.check_data_size(self.plan, self.num_samples, drop_last and schedule is None)
        self.drop_last = drop_last
        self.seed = seed
        self._order = planning.EpochOrder(self.num_samples, seed)
        self.next_epoch = 0
        self._split_every = split_every
        self._cuts: dict[tuple[int, tuple[float, ...] | None, int], planning.Cut] = {}
        self.speeds: Timeline[tuple[float, ...] | None] = Timeline(None)
        """Of the ranks: windows are dealt out in proportion to them. None: evenly."""
        self.grouping = Grouping(lengths, self.plan, self.num_samples, max_tokens) if lengths is not None else None
        """How windows are cut by length, if they are."""
        self.found_sizes: tuple[int, ...] | None = None
        """Largest micro-batch that was found to fit on each rank (see `set_sizes`); None where the plan gives it."""
        self.limits: tuple[int | None, ...] = (None,) * world_size
        """Sizes that micro-batches of each rank have come down to since, because memory ran out, as far as known."""
        self._limit: Timeline[int | None] = Timeline(None)
        self._options = options or LoaderOptions()
        self._loads_together = self._options.waits_for_loading
        self._source = BatchSource(MicroBatches(dataset, collate_fn, "training", seed), self._options)

    def __len__(self) -> int:
        """Windows in an epoch; with a schedule of their sizes, in the next one."""
        return self.sizes.count(self.next_epoch)

    def __iter__(self) -> Iterator[Window]:
        epoch = self.next_epoch
        self.next_epoch += 1
        return self.epoch(epoch)

    def epoch(self, epoch: int, first_window: int = 0) -> Iterator[Window]:
        """The windows of one epoch, from `first_window` on."""
        batches = on_device(self._source.batches(lambda: self._requests(epoch, first_window)), self._options)
        for index in self._indices(epoch, first_window):
            window = Window(
                epoch=epoch,
                index=index,
                number=self.number(epoch, index),
                num_samples=self._size(epoch, index),
                sizes=self._sizes(epoch, index),
                batches=batches,
                equal_micro_steps=self.plan.equal_micro_steps or self.plan.world_size == 1,
                is_by_length=self.grouping is not None,
                sample_indices=lambda index=index: self._sample_indices(epoch, index),  # type: ignore[misc]
                recutting=self._recutting(epoch, index),
                together=self._loads_together,
            )
            yield window
            window.skip_rest()

    def sample_micro_batch(self, epoch: int, window: int) -> Any:
        """This rank's first micro-batch of a window, on the device; an iteration under way isn't disturbed.

        Args:
            epoch, window: numbers from 0, the window's counted in its epoch. If the rank has nothing to do in that
                window, it is the placeholder (see `Window`).

        Raises:
            UserError: a sample can't be loaded.
        """
        (batch,) = self._source.aside([next(self._requests(epoch, window))])
        return self._moved(batch)

    def _moved(self, batch: Any) -> Any:
        options = self._options
        return batch if options.device is None else to_device(batch, options.device, float_dtype=options.float_dtype)

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """Of all samples, where windows are cut by length: sizes of micro-batches are then in tokens, not samples."""
        return self.grouping.lengths if self.grouping is not None else None

    @property
    def limit(self) -> int | None:
        """Size that this rank's micro-batches have come down to because memory ran out; None if it never did."""
        return self._limit.changes[-1][1]

    @property
    def micro_batch_size(self) -> int:
        """Samples of the largest micro-batch; where windows are cut by length, of the longest that fit into one."""
        if self.grouping is not None:
            return max(1, self.grouping.max_tokens // int(self.grouping.lengths.max()))
        return max(size for sizes in self.plan.cut(self.plan.global_batch_size).sizes for size in sizes)

    def set_sizes(self, sizes: Sequence[int]) -> None:
        """Sets the largest micro-batch of each rank, in place of `micro_batch_size` or `max_tokens`, before any window.

        Where all ranks must agree on the cut (equal micro-steps, cuts by length) the smallest of them counts.

        Args:
            sizes: in samples, or in tokens where windows are cut by length.
        """
        self.found_sizes = tuple(sizes)
        self._cuts.clear()
        if self.grouping is not None:
            self.grouping.set_max_tokens(min(sizes))
        else:
            size = min(sizes) if self.plan.equal_micro_steps else sizes[self.rank]
            self.plan = replace(self.plan, micro_batch_size=size, accumulation_steps=None)

    def load(self, epoch: int, index: int, pieces: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Micro-batches of given samples as they are in a window, on the device; disturbs no iteration under way.

        Args:
            epoch, index: of the window.
            pieces: dataset indices of each micro-batch; an empty one gives the window's placeholder.
        """
        placeholder = self._placeholder(epoch, index)
        for batch in self._source.aside([Request(epoch, list(piece) or placeholder) for piece in pieces]):
            yield self._moved(batch)

    def _recutting(self, epoch: int, index: int) -> Recutting:
        def split(samples: Sequence[int]) -> list[list[int]]:
            limit = self.limit
            return [list(samples)] if limit is None else recutting.recut([samples], limit, self.lengths)

        def forbid(samples: Sequence[int]) -> int:
            half = recutting.size_of_half(samples, self.lengths)
            limit = half if self.limit is None else min(half, self.limit)
            now = self.number(epoch, index)
            # What has been asked of workers by now comes as it was cut before, and is cut anew by those who use it.
            self._limit.change(limit, now + self.windows_ahead + 1, now)
            self.limits = (*self.limits[: self.rank], limit, *self.limits[self.rank + 1 :])
            return limit

        return Recutting(
            cut=lambda: self._sample_indices(epoch, index, self.limit),
            split=split,
            forbid=forbid,
            unit="samples" if self.lengths is None else "tokens",
            load=lambda pieces: self.load(epoch, index, pieces),
        )

    @property
    def windows_ahead(self) -> int:
        """Most windows that may have begun to load before the one in use is done."""
        # torch's own default loads two micro-batches ahead for each worker; one more is on its way to the device.
        options = self._options
        return options.num_workers * (options.prefetch_factor or 2) + 2

    def close(self) -> None:
        """Ends the worker processes. The loader can be used on, with new ones."""
        self._source.close()

    def explain(self) -> str:
        """One line that says how a window is cut."""
        how = self.grouping.explain() if self.grouping is not None else None
        if self.sizes.is_constant:
            return self.plan.explain(self.num_samples, self.drop_last, how)
        return f"{self.plan.explain(how=how)}; sizes by schedule: {self.sizes.rule}"

    def number(self, epoch: int, index: int) -> int:
        """The number of a window, counted over all epochs."""
        return self.sizes.first_number(epoch) + index

    def state_dict(self) -> dict[str, Any]:
        """What has been measured of costs and ranks, by which windows are cut, and of noise, by which they grow."""
        state: dict[str, Any] = {"speeds": self.speeds.changes, **self.sizes.state_dict()}
        if self.grouping is not None:
            costs = self.grouping.costs.changes
            state["costs"] = [[first, value.quadratic, value.overhead] for first, value in costs]
        if self.found_sizes is not None:
            state |= {"found_sizes": self.found_sizes, "limits": self.limits}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`'s answer, as far as it fits: speeds and sizes are those of as many ranks."""
        if self.found_sizes is not None and len(state.get("found_sizes") or ()) == self.plan.world_size:
            sizes = state["found_sizes"]
            if self.plan.equal_micro_steps:  # smaller ones may be why the run has been started again
                sizes = [min(pair) for pair in zip(sizes, self.found_sizes, strict=True)]
            self.set_sizes(sizes)
            self.limits = tuple(state["limits"])
            self._limit = Timeline(self.limits[self.rank])
        self.sizes.load_state_dict(state)
        speeds = [(first, tuple(values) if values is not None else None) for first, values in state["speeds"]]
        if all(values is None or len(values) == self.plan.world_size for _, values in speeds):
            self.speeds.changes = speeds
        if self.grouping is not None and "costs" in state:
            self.grouping.costs.changes = [
                (first, CostModel(quadratic=quadratic, overhead=overhead))
                for first, quadratic, overhead in state["costs"]
            ]

    def _cut(self, epoch: int, index: int) -> planning.Cut:
        size = self._size(epoch, index)
        number = self.number(epoch, index)
        speeds = self.speeds.at(number)
        parts = 2 if self._split_every is not None and (number + 1) % self._split_every == 0 else 1
        if (size, speeds, parts) not in self._cuts:
            if len(self._cuts) >= 64:
                self._cuts.clear()  # speeds that change from time to time
            self._cuts[size, speeds, parts] = self.plan.cut(size, speeds, parts)
        return self._cuts[size, speeds, parts]

    def _sizes(self, epoch: int, index: int) -> tuple[int, ...]:
        if self.grouping is None and self._limit.at(self.number(epoch, index)) is None:
            return self._cut(epoch, index).sizes[self.rank]
        return tuple(map(len, self._sample_indices(epoch, index)))

    def _sample_indices(self, epoch: int, index: int, limit: int | None = None) -> list[list[int]]:
        """Dataset indices of this rank's micro-batches.

        Args:
            limit: largest size allowed; None for what was in force when the window began to load.
        """
        pieces = self._planned_indices(epoch, index)
        limit = limit or self._limit.at(self.number(epoch, index))
        return pieces if limit is None else recutting.recut(pieces, limit, self.lengths)

    def _planned_indices(self, epoch: int, index: int) -> list[list[int]]:
        if self.grouping is not None:
            order = self._order.samples(epoch, *self.sizes.bounds(epoch)[index])
            number = self.number(epoch, index)
            groups = self.grouping.cut(order, number, self.speeds.at(number))[self.rank]
            return [order[list(group)].tolist() for group in groups]
        start = self.sizes.bounds(epoch)[index][0]
        bounds = list(self._cut(epoch, index).micro_batches(self.rank))
        first = bounds[0][0]
        order = self._order.samples(epoch, start + first, start + bounds[-1][1]).tolist()
        return [order[begin - first : end - first] for begin, end in bounds]

    def _requests(self, epoch: int, first_window: int) -> Iterator[Request]:
        for index in self._indices(epoch, first_window):
            for indices in self._sample_indices(epoch, index):
                yield Request(epoch, indices or self._placeholder(epoch, index))

    def _indices(self, epoch: int, first_window: int) -> Iterator[int]:
        index = first_window
        while index < self.sizes.count(epoch):  # sizes may change on the way
            yield index
            index += 1

    def _size(self, epoch: int, index: int) -> int:
        start, stop = self.sizes.bounds(epoch)[index]
        return stop - start

    def _placeholder(self, epoch: int, index: int) -> list[int]:
        first = self.sizes.bounds(epoch)[index][0]
        return self._order.samples(epoch, first, first + 1).tolist()  # type: ignore[no-any-return]
