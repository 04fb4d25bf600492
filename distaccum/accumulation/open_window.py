"""What is known of an update while its window is open and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from distaccum.accumulation.micro_gradients import MicroGradients
from distaccum.errors import UserError
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.devices import Stopwatch

Batch = TypeVar("Batch")


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
    """Micro-steps may be taken again: see `distaccum.accumulation.recovery`."""
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
