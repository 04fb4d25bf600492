"""Options of loaders, and the copy of micro-batches to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from distaccum.errors import UserError
from distaccum.runtime.nested import tensors_of, to_device

AUTO = "auto"
MOST_AHEAD = 32
"""Micro-batches that all workers of `auto` together load ahead, at most."""
DEFAULT_AHEAD = 2
"""Micro-batches that torch has each worker load ahead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """Options of loading and of the copy to the device, named as in `torch.utils.data.DataLoader`.

    Attributes:
        num_workers: a number, or "auto": one worker for the first windows, then as many as the training needs in order
            not to wait (see `distaccum.loaders.waiting`), each loading as many micro-batches ahead as it takes.
        device: where micro-batches are moved; None leaves them where the collate made them.
        float_dtype: floating-point tensors are cast to it; None leaves them as they are.
        non_blocking: on CUDA, copy the next micro-batch on a stream of its own while this one computes.
    """

    num_workers: int | str = 0
    pin_memory: bool = False
    persistent_workers: bool = False
    prefetch_factor: int | None = None
    device: torch.device | None = None
    float_dtype: torch.dtype | None = None
    non_blocking: bool = True

    def __post_init__(self) -> None:
        """Refuses impossible options, which a loader without workers would not read.

        Raises:
            UserError: names the option.
        """
        if isinstance(self.num_workers, str) and not self.is_auto:
            raise UserError(f'LoaderOptions: num_workers must be a number or "auto", got {self.num_workers!r}.')
        for key, least in (("num_workers", 0), ("prefetch_factor", 1)):
            if key == "num_workers" and self.is_auto:
                continue
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"LoaderOptions: {key} must be at least {least}, got {value}.")
        for key in ("persistent_workers", "prefetch_factor"):
            if (value := getattr(self, key)) and self.num_workers == 0:
                raise UserError(
                    f"LoaderOptions: {key}={value} needs worker processes, and num_workers is 0: set num_workers, or "
                    f"leave {key} out."
                )

    @property
    def is_auto(self) -> bool:
        """Whether the number of workers is left to be found."""
        return self.num_workers == AUTO

    @property
    def workers(self) -> int:
        """The number of workers; where it is to be found, the one to begin with."""
        return 1 if isinstance(self.num_workers, str) else self.num_workers

    def with_workers(self, num_workers: int, prefetch_factor: int | None) -> LoaderOptions:
        """Returns the same options with a number of workers."""
        return replace(
            self,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=self.persistent_workers and num_workers > 0,
        )

    @property
    def windows_ahead(self) -> int:
        """Most windows that may have begun to load before the one in use is done."""
        # torch's own default loads two micro-batches ahead for each worker; one more is on its way to the device.
        each = self.prefetch_factor or DEFAULT_AHEAD
        return (max(MOST_AHEAD, each) if self.is_auto else self.workers * each) + 2

    @property
    def micro_step_overhead(self) -> float:
        """Guesses what a micro-step costs however small it is, in parts of one of the largest size."""
        # A GPU waits for its kernels to be launched: on an H200 a GPT of 124 million parameters took 28 ms for 3,000
        # tokens and 34 ms for 16,000 (benchmarks/gpu_text.py).
        return 1 / 4 if self.device is not None and self.device.type == "cuda" else 1 / 64

    @property
    def copies_ahead(self) -> bool:
        """Whether a micro-batch is copied to the device while the one before it computes."""
        return self.device is not None and self.device.type == "cuda" and self.non_blocking

    @property
    def waits_for_loading(self) -> bool:
        """Whether nothing is computed meanwhile: neither by a GPU, nor while workers load."""
        on_cpu = self.device.type == "cpu" if self.device is not None else not torch.cuda.is_available()
        return on_cpu and self.workers == 0 and not self.pin_memory


def on_device(batches: Iterator[Any], options: LoaderOptions) -> Iterator[Any]:
    """Yields micro-batches on the device, in their final floating-point format."""
    if options.device is None:
        return batches
    if options.copies_ahead:
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
    used: deque[tuple[Any, torch.cuda.Event]] = deque()
    """Batches that have been computed with, kept until a copy may take their memory, and when that was done."""

    def use(batch: Any, copied: torch.cuda.Event) -> Any:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in tensors_of(batch):
            # The memory belongs to the copying stream; it must not be reused before the computing one is done with it.
            tensor.record_stream(computing)
        return batch

    def done(batch: Any) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        used.append((batch, event))

    for batch in batches:
        # An object that moves itself doesn't show its tensors to record_stream. So a batch is kept for one more, and
        # given up when the copying stream has waited for what was computed with it: that of the batch before the last,
        # so that a copy overlaps with the computing of the last one, which the host has only queued.
        if len(used) == 2:
            stream.wait_event(used.popleft()[1])
        with torch.cuda.stream(stream):
            moved = to_device(batch, device, non_blocking=True, float_dtype=float_dtype)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
        if ahead is not None:
            yield use(*ahead)
            done(ahead[0])
        ahead = moved, copied
    if ahead is not None:
        yield use(*ahead)


def size_of(dataset: Any, role: str) -> int:
    """Returns the number of samples of a map-style dataset; refuses any other, and an empty one."""
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"the {role} data is a {type(dataset).__name__}, which has no __len__ and __getitem__. Windows need a "
            "map-style dataset: one whose samples have numbers. For what can only be read forwards take data=stream "
            "(distaccum.data.Stream around it), or read the same files by an index: data=jsonl, parquet, webdataset or "
            "tokens."
        )
    try:
        size = len(dataset)
    except (TypeError, ValueError, OverflowError) as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # of the dataset's own code
        raise UserError(
            f"the length of the {role} data ({type(dataset).__name__}) can't be taken: {error}. Its __len__ must give "
            "a whole number that is not negative."
        ) from error
    if size == 0:
        raise UserError(f"the {role} data ({type(dataset).__name__}) is empty. Give it at least one sample per rank.")
    return size


def lengths_unknown(dataset: Any) -> UserError:
    """Returns the error to raise where the lengths are needed of samples that depend on the epoch."""
    if not getattr(dataset, "is_ordered", False):
        return UserError(
            f"batch=by_length and batch=packed cut a window by the lengths of its samples, and those of a "
            f"{type(dataset).__name__} change from epoch to epoch. Take batch=uniform, or give it a method "
            "find_lengths() that returns distaccum.planning.EpochLengths."
        )
    return UserError(
        "batch=by_length and batch=packed cut a window by the lengths of all its samples, and each rank makes only its "
        f"own samples of what it reads forwards, a {type(dataset).__name__}. Take batch=uniform, or in place of a "
        "stream read the same files by an index: data=jsonl, parquet or tokens."
    )


def placement(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Returns rank and world size as given, or those of the process group, or 0 and 1 without one."""
    if (rank is None) != (world_size is None):
        raise UserError(f"give both rank and world_size or neither; got rank={rank}, world_size={world_size}.")
    if rank is None or world_size is None:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not 0 <= rank < world_size:
        raise UserError(f"rank={rank} is not a rank of world_size={world_size}.")
    return rank, world_size
