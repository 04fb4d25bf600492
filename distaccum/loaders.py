"""Windows of tensors on the device: the sharded sampler, the data loader and the copy to the GPU in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset

from distaccum import planning
from distaccum.data.collate import PadCollate
from distaccum.devices import tensors_of, to_device
from distaccum.errors import UserError
from distaccum.fetching import BatchSource, MicroBatches, Request
from distaccum.grouping import CostModel, Grouping, Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """How samples are loaded and brought to the device; the names are those of `torch.utils.data.DataLoader`.

    Attributes:
        device: where micro-batches are moved; None leaves them where the collate made them.
        float_dtype: floating-point tensors are cast to it; None leaves them as they are.
        non_blocking: on CUDA, copy the next micro-batch on a stream of its own while this one computes.
    """

    num_workers: int = 0
    pin_memory: bool = False
    persistent_workers: bool = False
    prefetch_factor: int | None = None
    device: torch.device | None = None
    float_dtype: torch.dtype | None = None
    non_blocking: bool = True


class Window:
    """One update's samples, as far as they are this rank's: iterate over it once for its micro-batches.

    Attributes:
        epoch: number of the epoch, from 0.
        index: number of the window in its epoch, from 0.
        num_samples: samples of the window over all ranks.
        equal_micro_steps: every rank has the same number of micro-batches.
        sizes: samples of each of this rank's micro-batches. Size 0 is a placeholder: a micro-batch made of the
            window's first sample, which counts nothing and is there because the other ranks wait for this one in
            their collectives.
    """

    def __init__(
        self,
        *,
        epoch: int,
        index: int,
        num_samples: int,
        sizes: tuple[int, ...],
        batches: Iterator[Any],
        sample_indices: Callable[[], list[list[int]]],
        equal_micro_steps: bool = False,
    ) -> None:
        self.epoch = epoch
        self.index = index
        self.num_samples = num_samples
        self.sizes = sizes
        self.equal_micro_steps = equal_micro_steps
        self._batches = batches
        self._left = len(sizes)
        self._sample_indices = sample_indices

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        while self._left:
            self._left -= 1
            yield next(self._batches)

    @property
    def sample_indices(self) -> list[list[int]]:
        """Dataset indices of each micro-batch; empty for placeholders."""
        return self._sample_indices()

    def skip_rest(self) -> None:
        """Passes over the micro-batches that nobody has asked for, so that the next window starts at its own."""
        for _ in self:
            pass


class WindowLoader:
    """A data loader of windows. Iterating over it gives the windows of an epoch; each iteration is the next epoch.

    It takes the place of `DataLoader` with `DistributedSampler`: shuffled anew each epoch, nothing duplicated, nothing
    dropped unless asked, and the same samples in update *t* for any number of ranks. Random numbers that the dataset
    draws from the global generators (`torch`, `random`, `numpy.random`) are the same for a sample in an epoch, wherever
    and whenever it is loaded, and loading leaves those generators as they were.

    Args:
        dataset: map-style dataset (`__len__` and `__getitem__`).
        global_batch_size, micro_batch_size, accumulation_steps: see `distaccum.planning.resolve_batch`.
        lengths: of all samples; given, samples of like length share a micro-batch, within each window (see
            `distaccum.grouping.cut_by_length`).
        max_tokens: most tokens in such a micro-batch, padding included. Default: `micro_batch_size` times the longest.
        drop_last: leave out an epoch's last window when it is smaller than the others.
        seed: decides the order together with the epoch, and the dataset's random numbers.
        collate_fn: makes a micro-batch of a list of samples. Default: the dataset's own `collate_fn` if it has one,
            else stacking with dynamic padding (`PadCollate`).
        rank, world_size: default to those of the process group, or to 0 and 1 without one.
        equal_micro_steps: give all ranks the same number of micro-steps.
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
        options: LoaderOptions | None = None,
    ) -> None:
        self.num_samples = _size_of(dataset, "training")
        self.rank, world_size = _placement(rank, world_size)
        self.plan = planning.resolve_batch(
            world_size=world_size,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            equal_micro_steps=equal_micro_steps,
        )
        planning.check_data_size(self.plan, self.num_samples, drop_last)
        self.drop_last = drop_last
        self.seed = seed
        self._order = planning.EpochOrder(self.num_samples, seed)
        self.next_epoch = 0
        self._bounds = planning.window_bounds(self.num_samples, self.plan.global_batch_size, drop_last)
        self._cuts: dict[tuple[int, tuple[float, ...] | None], planning.Cut] = {}
        self.speeds: Timeline[tuple[float, ...] | None] = Timeline(None)
        """Of the ranks: windows are dealt out in proportion to them. None: evenly."""
        self.grouping = Grouping(lengths, self.plan, self.num_samples, max_tokens) if lengths is not None else None
        """How windows are cut by length, if they are."""
        self._options = options or LoaderOptions()
        self._source = _batch_source(dataset, collate_fn, "training", self._options, seed)

    def __len__(self) -> int:
        """Windows in an epoch."""
        return len(self._bounds)

    def __iter__(self) -> Iterator[Window]:
        epoch = self.next_epoch
        self.next_epoch += 1
        return self.epoch(epoch)

    def epoch(self, epoch: int, first_window: int = 0) -> Iterator[Window]:
        """The windows of one epoch, from `first_window` on."""
        batches = _on_device(self._source.batches(lambda: self._requests(epoch, first_window)), self._options)
        for index in range(first_window, len(self)):
            window = Window(
                epoch=epoch,
                index=index,
                num_samples=self._bounds[index][1] - self._bounds[index][0],
                sizes=self._sizes(epoch, index),
                batches=batches,
                equal_micro_steps=self.plan.equal_micro_steps or self.plan.world_size == 1,
                sample_indices=lambda index=index: self._sample_indices(epoch, index),  # type: ignore[misc]
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
        batch = self._source.one(next(self._requests(epoch, window)))
        if self._options.device is None:
            return batch
        return to_device(batch, self._options.device, float_dtype=self._options.float_dtype)

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
        return self.plan.explain(self.num_samples, self.drop_last, how)

    def number(self, epoch: int, index: int) -> int:
        """The number of a window, counted over all epochs."""
        return epoch * len(self) + index

    def state_dict(self) -> dict[str, Any]:
        """What has been measured of costs and ranks, by which windows are cut."""
        state: dict[str, Any] = {"speeds": self.speeds.changes}
        if self.grouping is not None:
            costs = self.grouping.costs.changes
            state["costs"] = [[first, value.quadratic, value.overhead] for first, value in costs]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`'s answer, as far as it fits: speeds are those of as many ranks."""
        speeds = [(first, tuple(values) if values is not None else None) for first, values in state["speeds"]]
        if all(values is None or len(values) == self.plan.world_size for _, values in speeds):
            self.speeds.changes = speeds
        if self.grouping is not None and "costs" in state:
            self.grouping.costs.changes = [
                (first, CostModel(quadratic=quadratic, overhead=overhead))
                for first, quadratic, overhead in state["costs"]
            ]

    def _cut(self, epoch: int, index: int) -> planning.Cut:
        size = self._bounds[index][1] - self._bounds[index][0]
        speeds = self.speeds.at(self.number(epoch, index))
        if (size, speeds) not in self._cuts:
            if len(self._cuts) >= 64:
                self._cuts.clear()  # speeds that change from time to time
            self._cuts[size, speeds] = self.plan.cut(size, speeds)
        return self._cuts[size, speeds]

    def _sizes(self, epoch: int, index: int) -> tuple[int, ...]:
        if self.grouping is None:
            return self._cut(epoch, index).sizes[self.rank]
        return tuple(map(len, self._sample_indices(epoch, index)))

    def _sample_indices(self, epoch: int, index: int) -> list[list[int]]:
        if self.grouping is not None:
            order = self._order.samples(epoch, *self._bounds[index])
            number = self.number(epoch, index)
            groups = self.grouping.cut(order, number, self.speeds.at(number))[self.rank]
            return [order[list(group)].tolist() for group in groups]
        start = self._bounds[index][0]
        bounds = list(self._cut(epoch, index).micro_batches(self.rank))
        first = bounds[0][0]
        order = self._order.samples(epoch, start + first, start + bounds[-1][1]).tolist()
        return [order[begin - first : end - first] for begin, end in bounds]

    def _requests(self, epoch: int, first_window: int) -> Iterator[Request]:
        for index in range(first_window, len(self)):
            for indices in self._sample_indices(epoch, index):
                first = self._bounds[index][0]
                yield Request(epoch, indices or self._order.samples(epoch, first, first + 1).tolist())


class EvaluationLoader:
    """Batches of a dataset in its own order, each sample on exactly one rank and no sample twice.

    Args:
        dataset: map-style dataset.
        batch_size: samples per batch; each rank's last one may be smaller.
        collate_fn, rank, world_size, options: as for `WindowLoader`.
        equal_batches: give all ranks the same number of batches, by placeholders of size 0 (see `Window`).

    Attributes:
        sizes: samples of each of this rank's batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        options: LoaderOptions | None = None,
        equal_batches: bool = False,
    ) -> None:
        self.num_samples = _size_of(dataset, "evaluation")
        rank, world_size = _placement(rank, world_size)
        shares = planning.split_evenly(self.num_samples, world_size)
        start = sum(shares[:rank])
        stop = start + shares[rank]
        batches = [range(begin, min(begin + batch_size, stop)) for begin in range(start, stop, batch_size)]
        if equal_batches:
            batches += [range(0)] * (-(-shares[0] // batch_size) - len(batches))
        self.sizes = [len(batch) for batch in batches]
        # Always the same epoch: random numbers of a dataset are the same in all evaluations, which stay comparable.
        self._requests = lambda: (Request(0, list(batch) or [0]) for batch in batches)
        self._options = options or LoaderOptions()
        self._source = _batch_source(dataset, collate_fn, "evaluation", self._options, seed=0)

    def __iter__(self) -> Iterator[Any]:
        return _on_device(self._source.batches(self._requests), self._options)

    def close(self) -> None:
        """Ends the worker processes. The loader can be used on, with new ones."""
        self._source.close()


def _batch_source(
    dataset: Dataset[Any],
    collate_fn: Callable[[list[Any]], Any] | None,
    role: str,
    options: LoaderOptions,
    seed: int,
) -> BatchSource:
    collate = collate_fn or getattr(dataset, "collate_fn", None) or PadCollate()
    return BatchSource(
        MicroBatches(dataset, collate, role, seed),
        num_workers=options.num_workers,
        pin_memory=options.pin_memory,
        persistent_workers=options.persistent_workers,
        prefetch_factor=options.prefetch_factor,
    )


def _on_device(batches: Iterator[Any], options: LoaderOptions) -> Iterator[Any]:
    """Micro-batches on the device, in their final floating-point format."""
    if options.device is None:
        return batches
    if options.device.type == "cuda" and options.non_blocking:
        return _copied_ahead(batches, options.device, options.float_dtype)
    device, float_dtype = options.device, options.float_dtype
    return (to_device(batch, device, float_dtype=float_dtype) for batch in batches)


def _copied_ahead(batches: Iterator[Any], device: torch.device, float_dtype: torch.dtype | None) -> Iterator[Any]:
    """Copies each micro-batch on a stream of its own while the one before it computes.

    One micro-batch ahead, across the ends of windows too: the copy of a window's first micro-batch overlaps with the
    last backward and the optimizer step of the window before.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[Any, torch.cuda.Event] | None = None

    def use(batch: Any, copied: torch.cuda.Event) -> Any:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in tensors_of(batch):
            # The memory belongs to the copying stream; it must not be reused before the computing one is done with it.
            tensor.record_stream(computing)
        return batch

    for batch in batches:
        # An object that moves itself doesn't show its tensors to record_stream: what was computed with the batch before
        # the last must be done before its memory is used again. The copy still overlaps with the computing to come.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            moved = to_device(batch, device, non_blocking=True, float_dtype=float_dtype)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        if ahead is not None:
            yield use(*ahead)
        ahead = moved, copied
    if ahead is not None:
        yield use(*ahead)


def _size_of(dataset: Any, role: str) -> int:
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"the {role} data is a {type(dataset).__name__}, which has no __len__ and __getitem__. Windows need a "
            "map-style dataset: one whose samples have numbers."
        )
    if len(dataset) == 0:
        raise UserError(f"the {role} data ({type(dataset).__name__}) is empty. Give it at least one sample per rank.")
    return len(dataset)


def _placement(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise UserError(f"give both rank and world_size or neither; got rank={rank}, world_size={world_size}.")
    if rank is None or world_size is None:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not 0 <= rank < world_size:
        raise UserError(f"rank={rank} is not a rank of world_size={world_size}.")
    return rank, world_size
