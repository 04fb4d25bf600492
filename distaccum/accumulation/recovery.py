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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distaccum.accumulation.open_window import OpenWindow
from distaccum.accumulation.optimizer_step import said_of_memory
from distaccum.accumulation.result import TaskOutput
from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.runtime.memory import free_cached_memory

logger = logging.getLogger(__name__)

Tell = Callable[[str, int, bool], None]
"""Called with what begins ("loading", "counting" of the terms' weights over the ranks, "forward", "backward", "step"),
in which micro-step (from 1), and whether that is the last one. With "evaluation" and its number (from 2), where an
optimizer has the window taken once more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """Asks an accumulator to go on with smaller micro-batches when memory runs out.

    Attributes:
        on_smaller: called on the rank that ran out, with the size that its micro-batches have from then on, in samples
            (in tokens, where windows are cut by length).
    """

    on_smaller: Callable[[int], None] = lambda size: None


class Share:
    """This rank's share of a window: micro-batches that can still be cut smaller.

    Raises:
        UserError: the window isn't one that can be cut anew.
    """

    def __init__(self, window: Iterable[Any], recovery: Recovery) -> None:
        if not isinstance(window, Window) or window.cuts is None or window.load is None:
            raise UserError("recovery from out-of-memory needs the windows of a WindowLoader, which can be cut anew.")
        self._window, self._cuts, self._load = window, window.cuts, window.load
        self._recovery = recovery
        self._has_retried = False
        self.taken: list[list[int]] = []
        """Dataset indices of the micro-batches handed out so far, the current one last."""
        self.sizes: list[int] = []
        self._left: deque[tuple[list[int], Iterator[Any]]] = deque()
        planned = window.sample_indices
        if planned == self._allowed():
            stream = iter(window)
            self.taken += planned[: window.done]
            self.sizes += map(len, self.taken)
            self._left.extend((piece, stream) for piece in planned[window.done :])
        else:  # it was being loaded already when memory ran out
            self.begin_again()

    def micro_batches(self) -> Iterator[tuple[Any, bool]]:
        """Each micro-batch, and whether it is the last one."""
        while self._left:
            piece, batches = self._left.popleft()
            parts = self._cuts.split(piece)
            if len(parts) > 1:
                next(batches)  # too large by now
                self._put_first(parts)
                continue
            self.taken.append(piece)
            self.sizes.append(len(piece))
            yield next(batches), not self._left

    def take_again(self, window: OpenWindow, during: str, said: str) -> None:
        """Prepares to go on with smaller micro-batches, after the current one has not fitted.

        Raises:
            UserError: it is a single sample, which has not fitted twice.
        """
        free_cached_memory(window.strategy.device)
        window.awaiting_backward = False
        self._make_smaller(window.number, during, said)
        if window.is_syncing and window.strategy.process_group is not None:
            window.lose()
        elif during == "forward" and not window.buffers:
            window.micro_steps -= 1
            self.sizes.pop()
            self._put_first(self._cuts.split(self.taken.pop()))
        else:
            window.begin_again()
            self.begin_again()

    def _make_smaller(self, update: int, during: str, said: str) -> None:
        """Cuts micro-batches as large as the current one smaller from now on."""
        samples = self.taken[-1]
        if len(samples) > 1:
            size = self._cuts.forbid(samples, now=self._window.number)
            logger.warning(
                "update %d: out of memory in the %s of %d samples; micro-batches of this rank are at most %d %s from "
                "here on",
                update,
                during,
                len(samples),
                size,
                self._cuts.unit,
            )
            self._recovery.on_smaller(size)
        elif self._has_retried:
            number = f" (number {samples[0] % self._cuts.sizes.num_samples} of the data)" if samples else ""
            raise UserError(
                f"update {update}: out of memory in the {during} of a single sample{number}: {said}. No micro-batch is "
                "smaller. Take a smaller model, shorter or smaller samples, a smaller number format (precision=bf16), "
                "model.activation_checkpointing=true where the model has it, or a larger device."
            )
        self._has_retried = len(samples) < 2

    def begin_again(self) -> None:
        """Starts over with all of this rank's samples, cut as small as is known to be needed."""
        self._window.skip_rest()
        self.taken.clear()
        self.sizes.clear()
        self._left.clear()
        self._put_first(self._allowed())

    def begin_again_on_all_ranks(self, update: int) -> None:
        """Starts over as `begin_again`, after a rank has run out of memory in its last backward."""
        logger.info("update %d: a rank has run out of memory, so its window is taken again", update)
        self.begin_again()

    def end(self) -> None:
        """Reports to the window how it has been cut in the end."""
        self._window.was_cut(self.taken)

    def _allowed(self) -> list[list[int]]:
        """Returns this rank's micro-batches, as dataset indices, in sizes that are allowed by now."""
        return self._cuts.micro_batches(self._window.epoch, self._window.index, self._cuts.limit)

    def _put_first(self, pieces: Sequence[list[int]]) -> None:
        batches = self._load(pieces)
        self._left.extendleft((piece, batches) for piece in reversed(pieces))


def micro_step(
    window: OpenWindow,
    batch: Any,
    forward: Callable[[Any], TaskOutput],
    backward: Callable[..., None],
    tell: Tell,
    recovery: Recovery | None,
) -> tuple[str, str] | None:
    """Takes forward and backward; if memory runs out, returns in which of them, and the error's message.

    Args:
        backward: the accumulator's.

    Raises:
        UserError: memory has run out, and the window can't be taken again.
    """
    during = "forward"
    try:
        tell("forward", window.micro_steps, window.is_last)
        output = forward(batch)
        during = "backward"
        tell("backward", window.micro_steps, window.is_last)
        backward(output.loss_sum, output.weight, output.sums, terms=output.terms)
        return None
    except Exception as error:
        said = said_of_memory(error)
        if said is None:
            raise
        if not window.can_recover:
            raise explained(window, recovery, during, said) from error
    # Outside of the block above: the exception's traceback holds on to all that the forward has computed.
    return during, said


@contextmanager
def explaining_memory_of_step() -> Iterator[None]:
    """Encloses an optimizer's step; raises a `UserError` in the place of torch's error if memory runs out."""
    try:
        yield
    except Exception as error:
        if (said := said_of_memory(error)) is None:
            raise
        raise UserError(
            f"out of memory in the optimizer's step: {said}. It makes its state in the first one. Take an optimizer "
            "with less state, strategy.shard_optimizer=true or strategy=fsdp on several ranks, or a smaller model."
        ) from error


def explained(opened: OpenWindow, recovery: Recovery | None, during: str, said: str) -> UserError:
    """The error for running out of memory where the window can't be taken again.

    Args:
        during: "forward" or "backward".
        said: torch's own message.
    """
    window = opened.source if isinstance(opened.source, Window) else None
    samples = window.sample_indices[opened.micro_steps - 1] if window is not None else []
    of = f" of {len(samples)} sample{'' if len(samples) == 1 else 's'}" if window is not None else ""
    where = f"update {opened.number}: out of memory in the {during} of a micro-batch{of}: {said}."
    if recovery is None:
        return UserError(
            f"{where} Set batch.micro_batch_size=auto, which finds a size that fits and cuts smaller when one no "
            "longer does; or give a smaller one by hand (the update stays the same)."
        )
    if len(samples) < 2 or window is None or window.cuts is None:
        return UserError(f"{where} No micro-batch is smaller: take a smaller model, sample or number format.")
    size = window.cuts.forbid(samples, now=window.number)
    recovery.on_smaller(size)
    return UserError(
        f"{where} All ranks are in the middle of a collective of this micro-step (FSDP, a static graph, "
        f"SyncBatchNorm), so they can't go on. The smaller size {size} is remembered: start the same command again "
        "(torchrun --max-restarts does so by itself), and the run goes on from its last checkpoint with it."
    )
