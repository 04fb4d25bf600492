"""Makes the update of a window: sets the learning rate, then runs the micro-steps and the optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from distaccum.accumulation import Accumulator
from distaccum.accumulation.gradient_caching import accumulate_coupled
from distaccum.accumulation.result import UpdateResult
from distaccum.errors import UserError, is_one_value_per_channel
from distaccum.loaders import Window
from distaccum.runtime.compilation import CompileClock
from distaccum.runtime.devices import Precision
from distaccum.runtime.nested import tensors_of
from distaccum.tasks import CoupledTask, TaskOutput, checked_output
from distaccum.training.layer_norms import LayerNorms
from distaccum.training.memory_line import MemoryLine
from distaccum.training.optim import Schedule
from distaccum.training.supervision import DroppedError, Supervision

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Updater:
    """Makes one update after the other.

    Attributes:
        task: any callable `(model, batch) -> TaskOutput`; a `CoupledTask` for a loss that couples a window's samples.
        accumulator: of the placed model and its optimizer.
        schedule: sets the learning rate of each update.
        precision: the format to compute in.
        supervision: reports what this rank is doing; drops the window if a signal leaves no time to finish it.
        memory_line: measures the activations of the first forward.
        compile_clock: counts the seconds spent compiling; None if nothing is compiled.
        layer_norms: measures the blocks of the model; None for not at all.
        layers: what it has measured in the last update; None if that wasn't measured.
        unfinished: what the window that was dropped had accumulated on this rank, as `Accumulator.take_out` returns it;
            None as long as none was dropped.
    """

    task: Callable[[nn.Module, Any], TaskOutput]
    accumulator: Accumulator
    schedule: Schedule
    precision: Precision
    supervision: Supervision
    memory_line: MemoryLine
    compile_clock: CompileClock | None = None
    layer_norms: LayerNorms | None = None
    layers: dict[str, dict[str, float]] | None = None
    unfinished: dict[str, Tensor] | None = None

    def update(self, number: int, window: Window, size_ratio: float = 1.0) -> tuple[UpdateResult, float]:
        """Makes the update of a window; returns its result and its learning rate.

        Args:
            number: of the update, from 1.
            size_ratio: the window's planned size over the one that the learning rate is configured for.

        Raises:
            DroppedError: a signal has come, and there was no time left to finish the window.
            UserError: as `Accumulator.step`.
        """
        with self.compile_clock.counting() if self.compile_clock is not None else nullcontext():
            lr = self.schedule.apply(number, size_ratio)
            self.supervision.begin_window(number, len(window.sizes), window.done)
            if self.layer_norms is not None:
                self.layer_norms.begin(number)
            try:
                if isinstance(self.task, CoupledTask):
                    result = self._coupled(self.task, window)
                else:
                    result = self.accumulator.run(window, partial(self._forward, window), self._begin_phase)
            except DroppedError:
                self.unfinished = self.unfinished or {}
                self.supervision.put_back()
                raise
            finally:
                self.schedule.after_update()
            self.layers = self.layer_norms.end() if self.layer_norms is not None else None
            self.supervision.end_window(result.flags)
            return result, lr

    def _begin_phase(self, phase: str, micro_step: int, is_last: bool) -> None:
        try:
            self.supervision.begin_phase(phase, micro_step, is_last)
        except DroppedError:
            self.unfinished = self.accumulator.take_out()
            raise

    def loss(self, batch: Any) -> Tensor:
        """Returns the loss sum of a micro-batch that belongs to no update."""
        with self.precision.autocast():
            return checked_output(self.task(self.accumulator.strategy.model, batch)).joined()

    def _forward(self, window: Window, batch: Any) -> TaskOutput:
        with self.memory_line.watching(window.sizes[window.done]):
            return checked_output(self._computed(self.task, batch))

    def _computed(self, forward: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        try:
            with self.precision.autocast():
                return forward(self.accumulator.strategy.model, batch)
        except AttributeError as error:
            strategy = self.accumulator.strategy
            if error.obj is not strategy.model or not hasattr(strategy.module, error.name or ""):
                raise
            raise UserError(
                f"the task asks the model for .{error.name}, and {type(strategy.model).__name__} has none: gradients "
                "cross the network only where the model itself is called, as in model(inputs). Let its forward do that "
                f"(an argument can ask for it); getattr(model, 'module', model).{error.name} is for settings."
            ) from error
        except ValueError as error:
            if not is_one_value_per_channel(error):
                raise
            raise UserError(
                "a micro-batch has one sample, and BatchNorm needs more than one value per channel in training. If it "
                "is of an epoch's last, smaller window, set batch.drop_last=true; else give larger micro-batches "
                "(batch.micro_batch_size, batch.global_batch_size), or use GroupNorm or LayerNorm."
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

    def _coupled(self, task: CoupledTask, window: Window) -> UpdateResult:
        self.supervision.begin_phase("loading", 1, is_last=False)
        accumulate_coupled(
            self.accumulator,
            window,
            embed=partial(self._computed, task.embed),
            loss=task.window_loss,
            between=self.supervision.begin_stage,
        )
        self.supervision.begin_phase("step", len(window), is_last=True)
        return self.accumulator.step()
