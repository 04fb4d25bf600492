"""Loads windows of tensors to the device: sharded sampler, data loader and copy to the GPU in one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray
from torch.utils.data import Dataset

from distaccum import planning
from distaccum.errors import require
from distaccum.loaders.fetch import BatchSource, MicroBatches, Request
from distaccum.loaders.look_ahead import LookAhead
from distaccum.loaders.options import LoaderOptions, lengths_unknown, on_device, placement, size_of
from distaccum.loaders.pack import packing_of
from distaccum.loaders.waiting import Waits
from distaccum.loaders.window import Window
from distaccum.planning.lengths import EpochLengths
from distaccum.planning.window_sizes import BatchSizes, SizeRule
from distaccum.runtime.nested import to_device


class WindowLoader:
    """A data loader of windows. Iterating over it gives the windows of an epoch; each iteration is the next epoch.

    It takes the place of `DataLoader` with `DistributedSampler`: shuffled anew each epoch, nothing duplicated, nothing
    dropped unless asked, and the same samples in update *t* for any number of ranks. Random numbers that the dataset
    draws from the global generators (`torch`, `random`, `numpy.random`) are the same for a sample in an epoch, wherever
    and whenever it is loaded, and loading leaves those generators as they were.

    Args:
        dataset: map-style dataset (`__len__` and `__getitem__`), or a `distaccum.data.Stream`.
        global_batch_size, micro_batch_size, accumulation_steps: see `distaccum.planning.batch_plan.resolve_batch`.
        lengths: of all samples; given, samples of like length share a micro-batch, within each window (see
            `distaccum.planning.by_length.cut_by_length`). An array of integers, of any size and mapped from a file or
            not, is used as it is.
        max_tokens: most tokens in such a micro-batch, padding included. Default: `micro_batch_size` times the longest.
        packed: put the samples of a micro-batch end to end instead, without padding (see
            `distaccum.planning.packed.cut_packed`); the model must keep attention inside each sample. Needs `lengths`.
        drop_last: leave out an epoch's last window when it is smaller than the others.
        seed: decides the order together with the epoch, and the dataset's random numbers.
        collate_fn: makes a micro-batch of a list of samples. Default: the dataset's own `collate_fn` if it has one,
            else stacking with dynamic padding (`PadCollate`). With `packed`: the dataset's `pack_fn`, else
            `PackCollate()`.
        rank, world_size: default to those of the process group, or to 0 and 1 without one.
        equal_micro_steps: give all ranks the same number of micro-steps.
        split_every: cut each so-many-th window into two micro-steps where it would be one on one rank: those in which
            the noise scale is measured, which takes parts.
        schedule: of the sizes of windows. Default: all have the global batch size.
        options: workers, pinning, device.

    Attributes:
        cuts: which samples each micro-batch has, and what changes that on the way.
        waits: how long the training waits for data, and what would help.

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
        lengths: Sequence[int] | NDArray[Any] | EpochLengths | None = None,
        max_tokens: int | None = None,
        packed: bool = False,
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
        self.dataset = dataset
        self.num_samples = size_of(dataset, "training")
        if packed:
            require(lengths is not None, "packed=True needs the samples' lengths: give lengths=…, one for each sample.")
            collate_fn = collate_fn or packing_of(dataset)
        is_ordered = bool(getattr(dataset, "is_ordered", False))
        if lengths is not None and hasattr(dataset, "samples_of_epoch") and not isinstance(lengths, EpochLengths):
            raise lengths_unknown(dataset)
        rank, world_size = placement(rank, world_size)
        plan = planning.resolve_batch(
            world_size=world_size,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            equal_micro_steps=equal_micro_steps,
        )
        self._options = options or LoaderOptions()
        self.cuts = planning.CutSchedule(
            plan,
            self.num_samples,
            rank=rank,
            seed=seed,
            drop_last=drop_last,
            size_rule=schedule,
            lengths=lengths,
            max_tokens=max_tokens,
            is_packed=packed,
            overhead=self._options.micro_step_overhead,
            split_every=split_every,
            windows_ahead=self._options.windows_ahead,
            is_ordered=is_ordered,
        )
        self.seed = seed
        self.next_epoch = 0
        self.waits = Waits(self._options)
        self._source = BatchSource(MicroBatches(dataset, collate_fn, "training", seed), self._options)
        self._in_use: tuple[int, int] | None = None
        self._cursors: list[dict[str, Any]] = []

    @property
    def plan(self) -> planning.BatchPlan:
        """Global batch, ranks, micro-batch."""
        return self.cuts.plan

    @property
    def sizes(self) -> BatchSizes:
        """The numbers of samples of the windows."""
        return self.cuts.sizes

    def __len__(self) -> int:
        """Returns the number of windows in an epoch; with a schedule of their sizes, in the next one."""
        return self.sizes.count(self.next_epoch)

    def __iter__(self) -> Iterator[Window]:
        epoch = self.next_epoch
        self.next_epoch += 1
        return self.epoch(epoch)

    def epoch(self, epoch: int, first_window: int = 0, done: int = 0) -> Iterator[Window]:
        """Yields the windows of one epoch, from `first_window` on, whose first `done` micro-batches are left out."""
        begins_anew = True
        for index in self._indices(epoch, first_window):
            if begins_anew:
                requests = partial(self._requests, epoch, index, done)
                ahead = LookAhead(self._source.batches(requests), int(self._options.copies_ahead))
                batches, passed = self.waits.timed(on_device(ahead, self._options)), 0
            sizes = self.cuts.micro_batch_sizes(epoch, index)
            window = Window(
                epoch=epoch,
                index=index,
                number=self.sizes.number(epoch, index),
                num_samples=self.sizes.size(epoch, index),
                sizes=sizes,
                batches=batches,
                equal_micro_steps=self.plan.equal_micro_steps or self.plan.world_size == 1,
                sample_indices=partial(self.cuts.micro_batches, epoch, index),
                cuts=self.cuts,
                load=partial(self.load, epoch, index),
                shown=partial(ahead.shown, passed, len(sizes) - done),
                together=self._source.options.waits_for_loading,
                done=done,
            )
            passed, done = passed + len(window), 0
            self._in_use = epoch, index
            started = time.perf_counter()
            yield window
            window.skip_rest()
            begins_anew = self.waits.end_window(self._source, len(sizes), time.perf_counter() - started)

    def sample_micro_batch(self, epoch: int, window: int) -> Any:
        """Loads this rank's first micro-batch of a window to the device; an iteration under way isn't disturbed.

        Args:
            epoch, window: numbers from 0, the window's counted in its epoch. If the rank has nothing to do in that
                window, it is the placeholder (see `Window`).

        Raises:
            UserError: a sample can't be loaded.
        """
        (batch,) = self.load(epoch, window, self.cuts.micro_batches(epoch, window)[:1])
        return batch

    def load(self, epoch: int, index: int, pieces: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Loads micro-batches of given samples of a window to the device; disturbs no iteration under way.

        Args:
            epoch, index: of the window.
            pieces: dataset indices of each micro-batch; an empty one gives the window's placeholder.
        """
        placeholder = self.cuts.placeholder(epoch, index)
        device, float_dtype = self._options.device, self._options.float_dtype
        for batch in self._source.aside([self._request(epoch, list(piece) or placeholder) for piece in pieces]):
            yield batch if device is None else to_device(batch, device, float_dtype=float_dtype)

    @property
    def options(self) -> LoaderOptions:
        """The options in use: with `num_workers="auto"`, the number of workers by now."""
        return self._source.options

    def close(self) -> None:
        """Ends the worker processes. The loader can be used on, with new ones."""
        self._source.close()

    def explain(self) -> str:
        """Says in one line how a window is cut."""
        return self.cuts.explain()

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been put in force of cuts and sizes of windows since the beginning.

        Of a dataset that can only be read forwards also where reading goes on, be the window in use done or not.
        """
        state = self.cuts.state_dict()
        if self.cuts.is_ordered and self._in_use is not None:
            epoch, index = self._in_use
            self._cursors = self.dataset.cursors_at(epoch, self.sizes.bounds(epoch)[index])  # type: ignore[attr-defined]
        return {**state, "cursors": self._cursors} if self.cuts.is_ordered else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`'s answer, as far as it fits: speeds and sizes are those of as many ranks."""
        self.cuts.load_state_dict(state)
        self.load_places(state)

    def load_places(self, state: dict[str, Any]) -> None:
        """Restores of `state_dict()`'s answer what says where the next windows are: their sizes, and where to read."""
        self.sizes.load_state_dict(state)
        if self.cuts.is_ordered:
            self._cursors = list(state.get("cursors", []))
            self.dataset.learn(self._cursors)  # type: ignore[attr-defined]

    def _requests(self, epoch: int, first_window: int, done: int) -> Iterator[Request]:
        for index in self._indices(epoch, first_window):
            for indices in self.cuts.micro_batches(epoch, index)[done if index == first_window else 0 :]:
                yield self._request(epoch, indices or self.cuts.placeholder(epoch, index))

    def _request(self, epoch: int, indices: list[int]) -> Request:
        if isinstance(self.cuts.lengths, EpochLengths):
            indices = [index % self.num_samples for index in indices]
        return Request(epoch, indices)

    def _indices(self, epoch: int, first_window: int) -> Iterator[int]:
        index = first_window
        while index < self.sizes.count(epoch):  # sizes may change on the way
            yield index
            index += 1
