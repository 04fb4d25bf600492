"""Going on when memory runs out: the micro-batch is cut smaller, and the update stays what it was.

What has to be done again depends on how far this rank has come:

- in a forward, nothing has been accumulated yet: the micro-batch is cut in two, and the rank goes on;
- in a backward before the last one, a part of the gradients may be in: the rank drops its own, and takes its share of
  the window from the start (so it does after a forward too, if the model has buffers, which that may have changed);
- in the last backward, the other ranks wait in the gradient sync: it is brought to its end with NaN for what is
  missing. All ranks see that the norm of the gradient is NaN, ask each other why, and take the window from the start.

None of this costs a collective as long as all goes well. Windows to come are cut smaller on this rank from then on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distaccum.accumulation.open_window import OpenWindow, with_last
from distaccum.accumulation.result import UpdateResult
from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.runtime.memory import free_cached_memory, is_out_of_memory
from distaccum.strategies import Strategy

if TYPE_CHECKING:
    from distaccum.accumulation.accumulator import Accumulator

logger = logging.getLogger(__name__)

Tell = Callable[[str, int, bool], None]
"""Told what begins ("loading", "forward", "backward", "step"), in which micro-step (from 1), and whether that is the
last one."""


class MicroStepOutput(Protocol):
    """What a forward gives; `distaccum.TaskOutput` is one."""

    @property
    def loss_sum(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor | float: ...
    @property
    def sums(self) -> dict[str, Tensor]: ...


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """Asks an accumulator to go on with smaller micro-batches when memory runs out.

    Attributes:
        on_smaller: called on the rank that ran out, with the size that its micro-batches have from then on, in samples
            (in tokens, where windows are cut by length).
    """

    on_smaller: Callable[[int], None] = _nothing


def is_lost_on_any_rank(window: OpenWindow, strategy: Strategy) -> bool:
    """Whether NaN means that a rank has run out of memory. All ranks see it, so they may ask each other."""
    is_lost = torch.tensor(float(window.is_lost), device=strategy.device)
    if strategy.process_group is not None:
        dist.all_reduce(is_lost, dist.ReduceOp.MAX, group=strategy.process_group)
    return bool(is_lost)


class Share:
    """This rank's share of a window: micro-batches that can still be cut smaller."""

    def __init__(self, window: Window) -> None:
        if window.recutting is None:
            raise UserError(
                "recovery from out-of-memory needs windows that can be cut anew: those of a WindowLoader, used in the "
                "process that made them."
            )
        self._window = window
        self._recutting = window.recutting
        self.taken: list[list[int]] = []
        """Dataset indices of the micro-batches handed out so far, the current one last."""
        self.sizes: list[int] = []
        self._left: deque[tuple[list[int], Iterator[Any]]] = deque()
        planned, allowed = window.sample_indices, self._recutting.cut()
        if planned == allowed:
            stream = iter(window)
            self._left.extend((piece, stream) for piece in planned)
        else:  # it was being loaded already when memory ran out
            self.begin_again()

    def micro_batches(self) -> Iterator[tuple[Any, bool]]:
        """Each micro-batch, and whether it is the last one."""
        while self._left:
            piece, batches = self._left.popleft()
            parts = self._recutting.split(piece)
            if len(parts) > 1:
                next(batches)  # too large by now
                self._put_first(parts)
                continue
            self.taken.append(piece)
            self.sizes.append(len(piece))
            yield next(batches), not self._left

    def forbid_current(self) -> int:
        """Has micro-batches as large as the current one cut smaller from now on; gives the size that is allowed."""
        return self._recutting.forbid(self.taken[-1])

    def take_current_again(self) -> None:
        """Puts the current micro-batch back, in parts if it is too large."""
        self.sizes.pop()
        self._put_first(self._recutting.split(self.taken.pop()))

    def begin_again(self) -> None:
        """Puts everything back."""
        self._window.skip_rest()
        self.taken.clear()
        self.sizes.clear()
        self._left.clear()
        self._put_first(self._recutting.cut())

    def _put_first(self, pieces: Sequence[list[int]]) -> None:
        batches = self._recutting.load(pieces)
        self._left.extendleft((piece, batches) for piece in reversed(pieces))


class WindowRun:
    """The micro-steps and the update of one window, with as many attempts as memory makes necessary.

    Args:
        accumulator: whose window it is.
        micro_batches: as for `Accumulator.window`.
        forward: as for `Accumulator.run`.
        tell: what to tell of what begins.
    """

    def __init__(
        self, accumulator: Accumulator, micro_batches: Any, forward: Callable[[Any], MicroStepOutput], tell: Tell | None
    ) -> None:
        self._accumulator = accumulator
        self._micro_batches = micro_batches
        self._forward = forward
        self._tell = tell or _nothing
        self._window = micro_batches if isinstance(micro_batches, Window) else None
        self._device = accumulator.strategy.device
        self._share: Share | None = None
        self._has_retried = False
        self._unit = self._window.recutting.unit if self._window is not None and self._window.recutting else ""
        if accumulator.recoverable is not None:
            if self._window is None:
                raise UserError("recovery from out-of-memory needs the windows of a WindowLoader.")
            self._share = Share(self._window)

    def result(self) -> UpdateResult:
        """Makes the update."""
        while (result := self._attempt()) is None:
            assert self._share is not None
            logger.info("update %d: a rank has run out of memory, so its window is taken again", self._number)
            self._share.begin_again()
        if self._share is not None and self._window is not None:
            self._window.was_cut(self._share.taken)
        return result

    @property
    def _number(self) -> int:
        return self._accumulator.updates + 1

    def _attempt(self) -> UpdateResult | None:
        """None: a rank was out of memory in its last backward, and nothing has changed."""
        items = self._share.micro_batches() if self._share is not None else with_last(self._micro_batches)
        sizes = self._share.sizes if self._share is not None else None
        self._tell("loading", 1, False)
        with self._accumulator.opened(self._micro_batches, items, sizes) as (window, micro_batches):
            for batch in micro_batches:
                trouble = self._micro_step(window, batch)
                if trouble is not None:
                    del batch
                    self._recover(window, *trouble)
                self._tell("loading", window.micro_steps + 1, False)
        self._tell("step", window.micro_steps, True)
        return self._accumulator.finished()

    def _micro_step(self, window: OpenWindow, batch: Any) -> tuple[str, str] | None:
        """Forward and backward; if memory runs out, in which of them, and what was said."""
        step, is_last = window.micro_steps, window.is_last
        during = "forward"
        try:
            self._tell("forward", step, is_last)
            output = self._forward(batch)
            during = "backward"
            self._tell("backward", step, is_last)
            self._accumulator.backward(output.loss_sum, output.weight, output.sums)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            if self._share is None:
                raise self._explained(window, during, said) from error
        # Outside of the block above: the exception's traceback holds on to all that the forward has computed.
        return during, said

    def _recover(self, window: OpenWindow, during: str, said: str) -> None:
        share = self._share
        assert share is not None
        free_cached_memory(self._device)
        window.awaiting_backward = False
        self._make_smaller(share, during, said)
        strategy = self._accumulator.recoverable
        if window.is_syncing and strategy is not None and strategy.process_group is not None:
            window.is_lost = True
            strategy.complete_sync()
            window.is_syncing = False
            if window.micro_gradients is not None:
                window.micro_gradients.start(1.0)  # the other ranks have; nobody uses what it gives
        elif during == "forward" and not window.buffers:
            window.micro_steps -= 1
            share.take_current_again()
        else:
            self._accumulator.begin_again(window)
            share.begin_again()

    def _make_smaller(self, share: Share, during: str, said: str) -> None:
        samples = share.taken[-1]
        if len(samples) > 1:
            size = share.forbid_current()
            logger.warning(
                "update %d: out of memory in the %s of %d samples; micro-batches of this rank are at most %d %s from "
                "here on",
                self._number,
                during,
                len(samples),
                size,
                self._unit,
            )
            assert self._accumulator.recovery is not None
            self._accumulator.recovery.on_smaller(size)
        elif self._has_retried:
            raise UserError(
                f"update {self._number}: out of memory in the {during} of a single sample"
                f"{f' (number {samples[0]} of the data)' if samples else ''}: {said}. No micro-batch is smaller. "
                "Take a smaller model, shorter or smaller samples, a smaller number format (precision=bf16), "
                "model.activation_checkpointing=true where the model has it, or a larger device."
            )
        self._has_retried = len(samples) < 2

    def _explained(self, window: OpenWindow, during: str, said: str) -> UserError:
        """What to say where there is no going on in place."""
        step = window.micro_steps
        samples = self._window.sample_indices[step - 1] if self._window is not None else []
        of = f" of {len(samples)} sample{'' if len(samples) == 1 else 's'}" if self._window is not None else ""
        where = f"update {self._number}: out of memory in the {during} of a micro-batch{of}: {said}."
        if self._accumulator.recovery is None:
            return UserError(
                f"{where} Set batch.micro_batch_size=auto, which finds a size that fits and cuts smaller when one no "
                "longer does; or give a smaller one by hand (the update stays the same)."
            )
        if len(samples) < 2 or self._window is None or self._window.recutting is None:
            return UserError(f"{where} No micro-batch is smaller: take a smaller model, sample or number format.")
        size = self._window.recutting.forbid(samples)
        self._accumulator.recovery.on_smaller(size)
        return UserError(
            f"{where} All ranks are in the middle of a collective of this micro-step (FSDP, a static graph, "
            f"SyncBatchNorm), so they can't go on. The smaller size {size} is remembered: start the same command again "
            "(torchrun --max-restarts does so by itself), and the run goes on from its last checkpoint with it."
        )
