"""What is known of an update while its window is open and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from distaccum.buffers import KeptBuffers
from distaccum.devices import Stopwatch
from distaccum.errors import UserError
from distaccum.micro_gradients import MicroGradients

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
    noise_scale: float | None = None
    """In samples, smoothed; infinite while the gradient can't be told from noise. None where it wasn't measured."""
    noise_scale_error: float | None = None
    """Its standard error; infinite as long as there is one measurement."""
    coherence: float | None = None
    """Of this window's micro-gradients: mean pairwise inner product over mean square. None where it wasn't measured."""


@dataclass(slots=True)
class OpenWindow:
    """What is known of a window between its first micro-step and its update."""

    scale: float
    sizes: Sequence[int] | None
    started: float
    calls_before: int
    bytes_before: int
    norm_before: float = 0.0
    """Of the gradient of the window before, as this rank has seen it; 0 if it wasn't finite."""
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
    buffers: KeptBuffers = field(default_factory=KeptBuffers)
    """The model's, as they were before the window, if it may have to be undone."""
    recovers: bool = False
    """Micro-steps may be taken again: see `distaccum.recovery`."""
    last_gradient: Tensor | None = None
    is_syncing: bool = False
    """The backward that synchronises the gradients has begun, so the other ranks wait for this one in it."""
    is_lost: bool = False
    """That backward has failed on this rank."""
    remembered: dict[str, Tensor] = field(default_factory=dict)
    """What the strategy remembered of the windows before."""

    micro_gradients: MicroGradients | None = None

    def micro_seconds(self, stopwatch: Stopwatch, last_launch: Any) -> tuple[float, ...]:
        """Time of each micro-step, if it was taken.

        Args:
            last_launch: mark of when the sync's last bucket went off, which ends the last micro-step; None for no sync.
        """
        if not self.marks:
            return ()
        *marks, (start, end) = self.marks
        marks.append((start, end if last_launch is None else last_launch))
        return tuple(stopwatch.seconds(begin, stop) for begin, stop in marks)

    def forget_micro_steps(self) -> None:
        """Nothing has been accumulated."""
        self.micro_steps = 0
        self.awaiting_backward = False
        self.loss_sums.clear()
        self.weights.clear()
        self.sums.clear()
        self.marks.clear()
        self.totals = None
        self.is_syncing = False
        if self.micro_gradients is not None:
            self.micro_gradients.forget()


def with_last(items: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each item, and whether it is the last one. Looks ahead by one item only where the length is not known.

    Raises:
        UserError: there are more items than their `len()`, or fewer.
    """
    if isinstance(items, Sized):
        count, number = len(items), 0
        for number, item in enumerate(items, 1):
            if number > count:
                break
            yield item, number == count
        if number != count:
            raise UserError(
                f"the micro-batches (a {type(items).__name__}) have the len() {count}, and there are "
                f"{'more' if number > count else number}. Give a list, or a generator, which has no len()."
            )
        return
    iterator = iter(items)
    for item in iterator:
        current = item
        for following in iterator:
            yield current, False
            current = following
        yield current, True
