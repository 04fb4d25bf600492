"""The state of a window from its first micro-step to its update, and how to undo it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distaccum.accumulation.micro_batches import with_last
from distaccum.accumulation.micro_gradients import MicroGradients
from distaccum.accumulation.optimizer_step import Gradients
from distaccum.accumulation.result import LossTerm
from distaccum.accumulation.running_sum import RunningSum
from distaccum.accumulation.terms import WindowTerms, without_denominators
from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.devices import Stopwatch
from distaccum.strategies import Strategy


class CutAnew(Protocol):
    """Micro-batches of a rank that may be cut smaller on the way.

    Attributes:
        taken: dataset indices of those handed out so far.
        sizes: how many samples each of them has.
    """

    taken: list[list[int]]
    sizes: list[int]

    def micro_batches(self) -> Iterator[tuple[Any, bool]]:
        """Each micro-batch, and whether it is the last one."""


@dataclass(slots=True, kw_only=True)
class OpenWindow:
    """The state of a window between its first micro-step and its update."""

    number: int
    """Number of its update, from 1."""
    strategy: Strategy
    gradients: Gradients
    source: Iterable[Any]
    """The micro-batches that it was opened over."""
    scale: float
    """What every loss is multiplied by: a power of two, so that it changes no bit of the result; see `loss_scale`."""
    share: CutAnew | None
    """Micro-batches that may be taken again, cut smaller: see `distaccum.accumulation.recovery`."""
    scaler: torch.amp.GradScaler | None
    started: float
    data_seconds: float
    norm_before: float
    """Norm of the gradient of the window before, as this rank has seen it; 0 if it wasn't finite."""
    stopwatch: Stopwatch
    time_micro_steps: bool
    micro_gradients: MicroGradients | None
    terms: WindowTerms | None
    """Its losses; None if there is only one."""
    sizes: Sequence[int] | None = field(init=False)
    can_recover: bool = field(init=False)
    """Whether micro-steps may be taken again."""
    calls_before: int = field(init=False)
    bytes_before: int = field(init=False)
    micro_steps: int = 0
    seed: Tensor | None = None
    is_last: bool = False
    awaiting_backward: bool = False
    loss_sums: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | float] = field(default_factory=list)
    sums: dict[str, RunningSum] = field(default_factory=dict)
    totals: Callable[[], Tensor] | None = None
    backward_end: Any = None
    marks: list[tuple[Any, Any]] = field(default_factory=list)
    micro_step_start: Any = None
    buffers: KeptBuffers = field(default_factory=KeptBuffers)
    """The model's buffers as they were before the window, if it may have to be undone."""
    last_gradient: Tensor | None = None
    is_syncing: bool = False
    """The backward that synchronises the gradients has begun, so the other ranks wait for this one in it."""
    is_lost: bool = False
    """That backward has failed on this rank."""
    remembered: dict[str, Tensor] = field(default_factory=dict)
    """The strategy's `state_tensors` before the window."""

    def __post_init__(self) -> None:
        self.can_recover = self.share is not None
        self.sizes = self.source.sizes if isinstance(self.source, Window) else None
        self.sizes = self.share.sizes if self.share is not None else self.sizes
        self.calls_before, self.bytes_before = self.strategy.traffic.calls, self.strategy.traffic.bytes

    def remember(self, model: nn.Module, *, may_be_skipped: bool) -> None:
        """Saves what the window changes besides gradients, if it may have to be undone."""
        if self.can_recover:
            self.strategy.begin_window()
            self.remembered = {name: value.clone() for name, value in self.strategy.state_tensors().items()}
        if self.can_recover or may_be_skipped:
            self.buffers = KeptBuffers(model)

    def each(self, sync_context: Callable[[OpenWindow], AbstractContextManager[None]]) -> Generator[Any, None, None]:
        """Yields each micro-batch inside `sync_context`."""
        items = with_last(self.source) if self.share is None else self.share.micro_batches()
        while True:
            asked = time.perf_counter()
            item = next(items, None)
            self.data_seconds += time.perf_counter() - asked
            if item is None:
                return
            micro_batch, self.is_last = item
            with sync_context(self):
                self.begin_micro_step()
                yield micro_batch
                self.require_backward()

    def add(
        self, loss_sum: Tensor, weight: Tensor | float, sums: Mapping[str, Tensor], terms: Mapping[str, LossTerm]
    ) -> Tensor:
        """Notes the sums of a micro-step; returns the loss to back-propagate, of all terms together.

        Raises:
            UserError: a term was not counted, or its coefficient has changed within the window.
        """
        self.awaiting_backward = False
        if self.terms is None:
            without_denominators(terms)
            joined = loss_sum
        else:
            joined = self.terms.joined(loss_sum, terms)
        if self.sizes is not None and self.sizes[self.micro_steps - 1] == 0:  # a placeholder
            joined, weight, terms = self.strategy.placeholder_loss(joined), 0.0, {}
            loss_sum = joined
            sums = {name: torch.zeros_like(value) for name, value in sums.items()}
        if self.terms is not None:
            self.terms.add(terms)
        self.loss_sums.append(loss_sum.detach())
        self.weights.append(weight.detach() if isinstance(weight, Tensor) else weight)
        for name, value in sums.items():
            if name in self.sums:
                self.sums[name].add(value)
            else:
                self.sums[name] = RunningSum(value)
        return joined

    def count_samples(self, num_samples: int | None) -> None:
        """Notes the size of a micro-step, for the noise scale.

        Raises:
            UserError: its number of samples is not known.
        """
        num_samples = num_samples if self.sizes is None else self.sizes[self.micro_steps - 1]
        if num_samples is None:
            raise UserError(
                "the noise scale counts samples, and these windows don't say how many a micro-batch has: call "
                "accumulator.backward(loss_sum, weight, num_samples=…)"
            )
        if self.micro_gradients is not None:
            self.micro_gradients.begin(num_samples)

    def divisor(self, weight: float) -> float:
        """Returns what the gradient is divided by, given the total weight of the main loss."""
        return weight if self.terms is None else self.terms.divisor(weight)

    def begin_micro_step(self) -> None:
        """Prepares for the forward and backward of the next micro-step."""
        self.micro_steps += 1
        self.awaiting_backward = True
        if self.time_micro_steps:
            self.micro_step_start = self.stopwatch.mark()
        if self.is_last and self.can_recover:
            self.last_gradient = self.strategy.last_gradient(self.gradients.of_optimizer())

    def require_backward(self) -> None:
        """Refuses a micro-step that has ended without a backward."""
        if self.awaiting_backward:
            raise RuntimeError(f"micro-step {self.micro_steps} ended without accumulator.backward(loss_sum, weight)")

    def seed_of(self, loss_sum: Tensor) -> Tensor:
        """Returns what the backward of a micro-step starts from: `scale`, in the loss's format."""
        if self.seed is None or self.seed.dtype != loss_sum.dtype:
            self.seed = torch.full_like(loss_sum, self.scale)
        return self.seed

    def end_backward(self) -> None:
        """Completes the sync after the last micro-step's backward; marks the backward's end, if it is measured."""
        if self.is_last:
            self.strategy.finish_sync()
        self.is_syncing = False
        if self.is_last or self.time_micro_steps:
            self.backward_end = self.stopwatch.mark()
        if self.time_micro_steps:
            self.marks.append((self.micro_step_start, self.backward_end))

    def begin_sync(self, loss_sum: Tensor, totals: Tensor) -> Tensor:
        """Prepares the backward that synchronises the gradients; returns the loss that it starts from.

        Args:
            totals: this rank's sums, to be added up over the ranks beside the gradients.
        """
        if self.can_recover:
            if self.last_gradient is not None:
                loss_sum = loss_sum + self.last_gradient.to(loss_sum)
            self.strategy.begin_sync(loss_sum)
        self.is_syncing = True
        self.totals = self.strategy.summed(totals)
        return loss_sum

    def require_sync(self) -> None:
        """Refuses a window that was left too early."""
        if self.totals is None:
            raise RuntimeError(
                f"the window was left after {self.micro_steps} micro-step(s), before the backward of the last one, so "
                "its gradients were never synchronised: iterate over all of its micro-batches"
            )

    def lose(self) -> None:
        """Completes the sync whose backward has failed on this rank, as the other ranks wait in it."""
        self.is_lost = True
        self.strategy.complete_sync()
        self.is_syncing = False
        if self.micro_gradients is not None:
            self.micro_gradients.start()  # the other ranks wait in it too; the result is not used

    def is_lost_on_any_rank(self) -> bool:
        """Whether a NaN norm means that a rank has run out of memory. All ranks see the NaN, and all call this."""
        is_lost = torch.tensor(float(self.is_lost), device=self.strategy.device)
        if self.strategy.process_group is not None:
            dist.all_reduce(is_lost, dist.ReduceOp.MAX, group=self.strategy.process_group)
        return bool(is_lost)

    def begin_again(self) -> None:
        """Drops what this rank has accumulated, without the other ranks."""
        self.gradients.clear()
        self.buffers.put_back()
        self.forget_micro_steps()

    def put_back(self) -> None:
        """Restores the state from before the window, after the sync. All ranks call it."""
        self.buffers.put_back()
        self.gradients.take_back()
        self.strategy.load_state_tensors(self.remembered)

    def seconds(self) -> float:
        """Returns the seconds that the window has taken so far."""
        return time.perf_counter() - self.started

    def measured(self) -> dict[str, Any]:
        """Returns traffic and times of `UpdateResult`, once the host has waited for the device."""
        traffic = self.strategy.traffic
        launch = traffic.last_launch if traffic.calls > self.calls_before else None
        return {
            "micro_steps": self.micro_steps,
            "sync_calls": traffic.calls - self.calls_before,
            "sync_bytes": traffic.bytes - self.bytes_before,
            "seconds": self.seconds(),
            "data_seconds": self.data_seconds,
            "micro_seconds": self._micro_seconds(launch),
            "sync_seconds": self.stopwatch.seconds(launch, self.backward_end) if launch is not None else 0.0,
        }

    def _micro_seconds(self, last_launch: Any) -> tuple[float, ...]:
        """Seconds of each micro-step; empty if they were not measured, or some of them in another process.

        Args:
            last_launch: mark of the launch of the sync's last bucket, which ends the last micro-step; None for no sync.
        """
        if not self.marks or len(self.marks) < self.micro_steps:
            return ()
        *marks, (start, end) = self.marks
        marks.append((start, end if last_launch is None else last_launch))
        return tuple(self.stopwatch.seconds(begin, stop) for begin, stop in marks)

    def forget_micro_steps(self) -> None:
        """Resets the sums: nothing has been accumulated."""
        self.micro_steps = 0
        self.awaiting_backward = False
        self.loss_sums.clear()
        self.weights.clear()
        self.sums.clear()
        if self.terms is not None:
            self.terms.forget()
        self.marks.clear()
        self.totals = None
        self.is_syncing = False
        if self.micro_gradients is not None:
            self.micro_gradients.forget()
