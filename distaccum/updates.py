"""What is known of an update while its window is open and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one update was. Sums and means run over all micro-steps and ranks; the same on every rank unless said."""

    loss: float
    """Mean loss of the window: Σ loss_sum / Σ weight."""
    weight: float
    """Σ weight."""
    sums: dict[str, Tensor]
    """Σ of what was passed as `sums`: float64, on the CPU."""
    flags: frozenset[str]
    """Names of the accumulator's `flags` that any rank raised."""
    reports: dict[str, tuple[float, ...]]
    """What each rank answered to the accumulator's `reports`, in the order of the ranks."""
    grad_norm: float
    """Norm of the window's mean gradient before clipping, over all parameters of the optimizer together."""
    skipped: bool
    """True when the optimizer did not step."""
    micro_steps: int
    """This rank's micro-steps."""
    sync_calls: int
    """Collectives that carried gradients, on this rank."""
    sync_bytes: int
    """Bytes handed to them, on this rank."""
    seconds: float
    """Wall time from the start of the window to the end of the step, on this rank."""
    data_seconds: float
    """Part of it spent waiting for micro-batches."""
    micro_seconds: tuple[float, ...]
    """Time of each of this rank's micro-steps, forward and backward; the last one's until the last gradient bucket was
    launched, so without waiting for other ranks (if the micro-steps hold no collectives of their own). Empty unless the
    accumulator has been told `time_micro_steps`."""
    sync_seconds: float
    """Part of it between the launch of the last gradient bucket and the end of the backward: what of the communication
    (and of waiting for slower ranks) was not hidden behind computing."""


@dataclass(slots=True)
class OpenWindow:
    """What is known of a window between its first micro-step and its update."""

    scale: float
    sizes: tuple[int, ...] | None
    started: float
    calls_before: int
    bytes_before: int
    micro_steps: int = 0
    seed: Tensor | None = None
    is_last: bool = False
    awaiting_backward: bool = False
    data_seconds: float = 0.0
    loss_sums: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | float] = field(default_factory=list)
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    totals: Callable[[], Tensor] | None = None
    backward_end: Any = None
    marks: list[tuple[Any, Any]] = field(default_factory=list)
    micro_step_start: Any = None
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def with_last(items: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each item, and whether it is the last one. Looks ahead by one item only where the length is not known."""
    if isinstance(items, Sized):
        count = len(items)
        for number, item in enumerate(items, 1):
            yield item, number == count
        return
    iterator = iter(items)
    for item in iterator:
        current = item
        for following in iterator:
            yield current, False
            current = following
        yield current, True


def added_up(values: list[Tensor], device: torch.device) -> Tensor:
    """Sum of tensors of one shape, in float64 on the device."""
    if any(value.device != device for value in values):
        values = [value.to(device, non_blocking=True) for value in values]
    return torch.stack(values).sum(0, dtype=torch.float64)


def unflatten(flat: list[float], sums: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    values = torch.tensor(flat, dtype=torch.float64)
    shapes = {name: parts[0].shape for name, parts in sums.items()}
    split = torch.split(values, [shape.numel() for shape in shapes.values()]) if shapes else ()
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), split, strict=True)}
