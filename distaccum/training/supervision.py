"""Reports what this rank is doing, and decides with the other ranks what is still finished once a signal has come.

A signal to stop (SIGTERM, …) is only noted when it comes, by `Interruption` in `runtime/stop_signals.py`. Then:

1. `Supervision.begin_phase` asks before each forward whether the window can be finished within
   `checkpoint.grace_seconds`. If it can't, all ranks leave it (`DroppedError`), each after a micro-step of its own, and
   everything is put back as if it had never begun. `Updater.update` has taken out of it what the rank has accumulated,
   with which the resumed run goes on (`training/unfinished.py`). An evaluation is dropped in any case and made up for
   by the resumed run.
2. The result of a window that is finished has the flag `stop`, on all ranks alike, at which `Trainer._train` returns.
3. `Trainer.fit` saves a checkpoint, and `training/run.py` leaves `unfinished.json`, by which launchers start the run
   again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from distaccum.accumulation.gradient_caching import Stage
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.heartbeat import Heartbeat
from distaccum.runtime.nested import gather_objects
from distaccum.runtime.randomness import GlobalStates
from distaccum.runtime.stop_signals import Interruption
from distaccum.strategies import Strategy

_SAVING_SHARE = 0.3
"""Part of the grace period that is left for saving."""

_LONG_SHARE = 0.1
"""A window longer than this part of the grace period may have to be dropped, so the next one is prepared for that."""


class DroppedError(Exception):
    """The window or the evaluation was dropped, on all ranks, and nothing of it remains in model and generators."""


class Supervision:
    """Watches one window after another. Dropping one puts buffers and generators back to where it began.

    Strategies whose micro-steps hold collectives finish every window: their ranks can't leave one at different places.

    Args:
        strategy: of the placed model.
        interruption: notes signals to stop. Default: none ever comes.
        heartbeat: reports to the other ranks what this one is doing.
        grace_seconds: time between a signal and the end of the process.

    Attributes:
        flags: questions that the accumulator asks each rank at the end of a window: whether a signal has come, and
            whether the window was so long that the next one may have to be dropped.
    """

    def __init__(
        self,
        strategy: Strategy,
        interruption: Interruption | None = None,
        heartbeat: Heartbeat | None = None,
        grace_seconds: float = math.inf,
    ) -> None:
        self.heartbeat = heartbeat or Heartbeat(0, 1)
        self._strategy = strategy
        self._interruption = interruption or Interruption()
        self._seconds = grace_seconds * (1 - _SAVING_SHARE)
        self.flags = {"stop": self._interruption.is_requested, "long": self._is_long}
        # All ranks must be prepared alike. Nothing is known of the first window, so it may be long.
        self._next_is_long = not strategy.equal_micro_steps
        self._update = 0
        self._micro_steps, self._done = 0, 0
        self._started = 0.0
        self._undo: list[Callable[[], None]] = []
        """Restores what the window's forwards change; empty if it is not to be dropped."""

    def _is_long(self) -> bool:
        too_long = time.perf_counter() - self._started > _LONG_SHARE * self._seconds
        return too_long and not self._strategy.equal_micro_steps

    def begin_window(self, update: int, micro_steps: int, done: int = 0) -> None:
        """Begins the window of an update, of which this rank has so many micro-steps, `done` in another process."""
        self._update, self._micro_steps, self._done = update, micro_steps, done
        self._started = time.perf_counter()
        self._undo = []
        if self._next_is_long:
            # Leaving a window drops what a strategy remembers of the windows before.
            remembered = {name: value.clone() for name, value in self._strategy.state_tensors().items()}
            self._undo = [
                GlobalStates.now(self._strategy.device).put_back,
                partial(self._strategy.load_state_tensors, remembered),
                KeptBuffers(self._strategy.module).put_back,
            ]

    def begin_phase(self, phase: str, micro_step: int, is_last: bool) -> None:
        """Begins a phase of a micro-step (from 1), or an evaluation, as `Accumulator.run` names it.

        Raises:
            DroppedError: a signal has come, there is not enough time left to finish the window, and the ranks
                have agreed to drop it.
        """
        doing = self.heartbeat.doing
        if phase == "step":
            doing("step", update=self._update, waits=True)
        elif phase == "evaluation":
            self._undo = []  # the optimizer has moved the parameters: the window can't be dropped any more
            doing(f"evaluation {micro_step} of the window", update=self._update)
        elif phase == "loading":
            doing("loading of a micro-batch", update=self._update, micro_step=micro_step)
        elif phase == "counting":
            doing("count of the losses' weights", update=self._update, micro_step=micro_step, waits=True)
        elif phase == "forward":
            self._check_window(micro_step, is_last=is_last)
            doing("forward", update=self._update, micro_step=micro_step)
        else:
            how = "backward with the gradient sync" if is_last else "backward"
            doing(how, update=self._update, micro_step=micro_step, waits=is_last)

    def begin_stage(self, stage: Stage, step: int) -> None:
        """Begins a stage of a window with a coupled loss, as `accumulate_coupled` names it.

        Raises:
            DroppedError: as `begin_phase`.
        """
        # After the last embedding the ranks meet, and from there on nobody may leave. What is still to come then
        # takes about three times as long.
        if stage is Stage.embedding:
            self._check_window(step, is_last=step == self._micro_steps, to_come=3 * self._micro_steps)
        self.heartbeat.doing(stage.value, update=self._update, micro_step=step, waits=stage.waits)

    def _check_window(self, micro_step: int, *, is_last: bool, to_come: int = 0) -> None:
        """Drops the window if a signal has come and there is too little time.

        Args:
            to_come: work after the last micro-step, in micro-steps.
        """
        if self._strategy.equal_micro_steps or not self._interruption.is_requested():
            return
        window, made = f"window/{self._update}", micro_step - 1 - self._done
        if made < 1 and self._strategy.world_size > 1:
            # The first forward may hold a collective (DDP's buffers), so nobody may leave before it. The others can't,
            # as long as this rank has not been counted among those that have got the signal.
            if is_last:
                self._interruption.settle(window, "finish")
            return
        spent = time.perf_counter() - self._started
        # There may be more of them than planned, if memory has run out.
        left = max(1, self._micro_steps - micro_step + 1) + to_come
        needed = spent / max(1, made) * left
        is_too_slow = self._interruption.seconds_since() + needed > self._seconds
        fate = self._interruption.settle(window, "drop" if self._undo and is_too_slow else None)
        if fate is None and is_last:
            # A wish to drop comes to nothing as long as not all ranks have got the signal; from here on nobody may.
            fate = self._interruption.settle(window, "finish")
        if fate == "drop":
            raise DroppedError

    def end_window(self, flags: frozenset[str]) -> None:
        """Ends the window; `flags` are those of its result."""
        self.heartbeat.doing("end", update=self._update)
        self._next_is_long = "long" in flags

    def put_back(self) -> None:
        """Undoes what the forwards of a dropped window have left behind."""
        for undo in self._undo:
            undo()

    def check_evaluation(self, update: int, *, is_over: bool) -> None:
        """Drops the evaluation after an update if a signal has come, as it can be made at any time.

        To be called before each of its batches, and before ranks meet at its end (`is_over`).

        Raises:
            DroppedError: the ranks have agreed to drop it.
        """
        if self._strategy.equal_micro_steps or not self._interruption.is_requested():
            return
        if self._interruption.settle(f"evaluation/{update}", "finish" if is_over else "drop") == "drop":
            raise DroppedError

    def agreed_signal(self) -> str:
        """Returns the signal that came to the first rank that got one. All ranks call it once one has."""
        names = gather_objects(self._interruption.signal_name, self._strategy.process_group)
        return next(name for name in names if name is not None)
