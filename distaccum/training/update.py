"""How a run makes the update of a window: learning rate, micro-steps, and what a signal asks for meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from distaccum.accumulation import Accumulator
from distaccum.accumulation.gradient_caching import Stage, accumulate_coupled
from distaccum.accumulation.result import UpdateResult
from distaccum.errors import UserError
from distaccum.loaders import Window
from distaccum.runtime.compilation import CompileClock
from distaccum.runtime.devices import Precision
from distaccum.runtime.heartbeat import Heartbeat
from distaccum.runtime.nested import tensors_of
from distaccum.runtime.stop_signals import Interruption
from distaccum.tasks import CoupledTask, TaskOutput, checked_output
from distaccum.training.grace import Grace, WindowDroppedError
from distaccum.training.memory_line import MemoryLine
from distaccum.training.optim import Schedule

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Updater:
    """Makes one update after the other, and says on the way what this rank is doing.

    Attributes:
        model: as it is called.
        task, precision, schedule, interruption, heartbeat, compile_clock: as the trainer has them.
        grace: settles whether a window is finished once the run is to stop.
        memory_line: shown the first forward.
    """

    model: nn.Module
    task: Callable[[nn.Module, Any], TaskOutput]
    accumulator: Accumulator
    precision: Precision
    schedule: Schedule | None
    interruption: Interruption
    grace: Grace
    heartbeat: Heartbeat
    memory_line: MemoryLine
    compile_clock: CompileClock | None

    def update(self, number: int, window: Window, lr_factor: float = 1.0) -> tuple[UpdateResult, float]:
        """Makes the update of a window; returns its result and its learning rate.

        Args:
            number: of the update, from 1.
            lr_factor: what the schedule's learning rate is multiplied by.

        Raises:
            WindowDroppedError: a signal has come, and there was no time left to finish the window.
            UserError: as `Accumulator.step`.
        """
        with self.compile_clock.counting() if self.compile_clock is not None else nullcontext():
            if self.schedule is not None:
                lr = self.schedule.apply(number, lr_factor)
            else:
                lr = float(self.accumulator.optimizer.param_groups[0]["lr"])
            self.grace.begin(number, len(window))
            try:
                if isinstance(self.task, CoupledTask):
                    result = self._coupled(self.task, window, number)
                else:
                    phase = partial(self._begin_phase, number)
                    result = self.accumulator.run(window, partial(self._forward, window), phase)
            except WindowDroppedError:
                self.grace.put_back()
                logger.info("update %d: no time is left to finish its window, which is dropped", number)
                raise
            self.heartbeat.doing("end", update=number)
            self.grace.end(result.flags)
            return result, lr

    def _forward(self, window: Window, batch: Any) -> TaskOutput:
        with self.memory_line.watching(window.sizes[0]):
            return checked_output(self._computed(self.task, batch))

    def _computed(self, forward: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        try:
            with self.precision.autocast():
                return forward(self.model, batch)
        except AttributeError as error:
            strategy = self.accumulator.strategy
            if error.obj is not strategy.model or not hasattr(strategy.module, error.name or ""):
                raise
            raise UserError(
                f"the task asks the model for .{error.name}, and {type(strategy.model).__name__} has none: gradients "
                "cross the network only where the model itself is called, as in model(inputs). Let its forward do that "
                f"(an argument can ask for it); getattr(model, 'module', model).{error.name} is for settings."
            ) from error
        except RuntimeError as error:
            wanted = self.precision.parameter_dtype
            others = {t.dtype for t in tensors_of(batch) if t.is_floating_point() and t.dtype != wanted}
            if not others or not ("dtype" in str(error) or "scalar type" in str(error)):
                raise
            raise UserError(
                f"the micro-batches have tensors of {', '.join(sorted(map(str, others)))} and the model's "
                f"parameters are {wanted}, which don't go together: {error}. Have the dataset give {wanted}, or "
                "set precision."
            ) from error

    def _begin_phase(self, number: int, what: str, micro_step: int, is_last: bool) -> None:
        doing = self.heartbeat.doing
        if what == "step":
            doing("step", update=number, waits=True)
        elif what == "loading":
            doing("loading of a micro-batch", update=number, micro_step=micro_step)
        elif what == "forward":
            if self.interruption.is_requested():
                self.grace.check(micro_step, is_last=is_last)
            doing("forward", update=number, micro_step=micro_step)
        else:
            how = "backward with the gradient sync" if is_last else "backward"
            doing(how, update=number, micro_step=micro_step, waits=is_last)

    def _coupled(self, task: CoupledTask, window: Window, number: int) -> UpdateResult:
        def between(stage: Stage, step: int) -> None:
            # After the last embedding the ranks meet, and from there on nobody may leave. What is still to come then
            # takes about three times as long.
            if stage is Stage.embedding and self.interruption.is_requested():
                self.grace.check(step, to_come=3 * len(window))
            self.heartbeat.doing(stage.value, update=number, micro_step=step, waits=stage.waits)

        self._begin_phase(number, "loading", 1, is_last=False)
        accumulate_coupled(
            self.accumulator, window, embed=partial(self._computed, task.embed), loss=task.window_loss, between=between
        )
        self._begin_phase(number, "step", len(window), is_last=True)
        return self.accumulator.step()
