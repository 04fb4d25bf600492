"""How a run makes the update of a window: learning rate, micro-steps, and what a signal asks for meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
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


class Updater:
    """Makes one update after the other, and says on the way what this rank is doing.

    Args:
        model: as it is called.
        task: any callable `(model, batch) -> TaskOutput`; a `CoupledTask` for a loss that couples a window's samples.
        accumulator: of the model.
        precision: the format to compute in.
        schedule: sets the learning rate of each update; None leaves it alone.
        interruption: tells when the run is to stop.
        grace: settles whether a window is finished once it is.
        heartbeat: told what this rank is doing.
        memory_line: shown the first forward.
        compile_clock: counts what the updates spend compiling; None if nothing is compiled.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        task: Callable[[nn.Module, Any], TaskOutput],
        accumulator: Accumulator,
        precision: Precision,
        schedule: Schedule | None,
        interruption: Interruption,
        grace: Grace,
        heartbeat: Heartbeat,
        memory_line: MemoryLine,
        compile_clock: CompileClock | None,
    ) -> None:
        self._model = model
        self._task = task
        self._accumulator = accumulator
        self._precision = precision
        self._schedule = schedule
        self._interruption = interruption
        self._grace = grace
        self._heartbeat = heartbeat
        self._memory_line = memory_line
        self._compile_clock = compile_clock

    def update(self, number: int, window: Window, lr_factor: float = 1.0) -> tuple[UpdateResult, float]:
        """Makes the update of a window; returns its result and its learning rate.

        Args:
            number: of the update, from 1.
            lr_factor: what the schedule's learning rate is multiplied by.

        Raises:
            WindowDroppedError: a signal has come, and there was no time left to finish the window.
            UserError: as `Accumulator.step`.
        """
        with self._compile_clock.counting() if self._compile_clock is not None else nullcontext():
            if self._schedule is not None:
                lr = self._schedule.apply(number, lr_factor)
            else:
                lr = float(self._accumulator.optimizer.param_groups[0]["lr"])
            self._grace.begin(number, len(window))
            try:
                result = self._make(number, window)
            except WindowDroppedError:
                self._grace.put_back()
                logger.info("update %d: no time is left to finish its window, which is dropped", number)
                raise
            self._heartbeat.doing("end", update=number)
            self._grace.end(result.flags)
            return result, lr

    def _make(self, number: int, window: Window) -> UpdateResult:
        if isinstance(self._task, CoupledTask):
            return self._coupled(self._task, window, number)
        return self._accumulator.run(window, partial(self._forward, window), partial(self._begin_phase, number))

    def _forward(self, window: Window, batch: Any) -> TaskOutput:
        with self._memory_line.watching(window.sizes[0]):
            return checked_output(self._computed(self._task, batch))

    def _computed(self, forward: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        try:
            with self._precision.autocast():
                return forward(self._model, batch)
        except AttributeError as error:
            strategy = self._accumulator.strategy
            if error.obj is not strategy.model or not hasattr(strategy.module, error.name or ""):
                raise
            raise UserError(
                f"the task asks the model for .{error.name}, and {type(strategy.model).__name__} has none: gradients "
                "cross the network only where the model itself is called, as in model(inputs). Let its forward do that "
                f"(an argument can ask for it); getattr(model, 'module', model).{error.name} is for settings."
            ) from error
        except RuntimeError as error:
            wanted = self._precision.parameter_dtype
            others = {t.dtype for t in tensors_of(batch) if t.is_floating_point() and t.dtype != wanted}
            if not others or not ("dtype" in str(error) or "scalar type" in str(error)):
                raise
            raise UserError(
                f"the micro-batches have tensors of {', '.join(sorted(map(str, others)))} and the model's "
                f"parameters are {wanted}, which don't go together: {error}. Have the dataset give {wanted}, or "
                "set precision."
            ) from error

    def _begin_phase(self, number: int, what: str, micro_step: int, is_last: bool) -> None:
        doing = self._heartbeat.doing
        if what == "step":
            doing("step", update=number, waits=True)
        elif what == "loading":
            doing("loading of a micro-batch", update=number, micro_step=micro_step)
        elif what == "forward":
            if self._interruption.is_requested():
                self._grace.check(micro_step, is_last=is_last)
            doing("forward", update=number, micro_step=micro_step)
        else:
            how = "backward with the gradient sync" if is_last else "backward"
            doing(how, update=number, micro_step=micro_step, waits=is_last)

    def _coupled(self, task: CoupledTask, window: Window, number: int) -> UpdateResult:
        def between(stage: Stage, step: int) -> None:
            # After the last embedding the ranks meet, and from there on nobody may leave. What is still to come then
            # takes about three times as long.
            if stage is Stage.embedding and self._interruption.is_requested():
                self._grace.check(step, to_come=3 * len(window))
            self._heartbeat.doing(stage.value, update=number, micro_step=step, waits=stage.waits)

        self._begin_phase(number, "loading", 1, is_last=False)
        accumulate_coupled(
            self._accumulator, window, embed=partial(self._computed, task.embed), loss=task.window_loss, between=between
        )
        self._begin_phase(number, "step", len(window), is_last=True)
        return self._accumulator.step()
