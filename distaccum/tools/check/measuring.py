"""The update of a window under one cut: the gradient that the optimizer gets, and the parameters after its step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distaccum.accumulation import Accumulator
from distaccum.accumulation.gradient_caching import accumulate_coupled
from distaccum.accumulation.terms import TermError
from distaccum.config import DDPConfig, Fp16Config
from distaccum.config.enums import PrecisionName
from distaccum.strategies import SingleStrategy, Strategy, place
from distaccum.strategies.optimizers import refuse_closure
from distaccum.tasks import CoupledTask, weights_of
from distaccum.tools.check.report import Difference
from distaccum.tools.check.subject import Subject
from distaccum.training.optim import build_optimizer

_SMALLEST_SHARE = 1e-4
"""A gradient that is a smaller share of the whole one is compared with this share of the whole: its own digits are the
rounding of larger numbers."""


@dataclass(slots=True)
class Update:
    """One update. Tensors are float64 on the CPU.

    Attributes:
        gradients: by parameter; empty if the loss or the gradient was not finite, or the weight not positive.
        without_gradient: parameters that require a gradient and got none.
        failure: why there is no update.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    without_gradient: list[str] = field(default_factory=list)
    loss: float = math.nan
    weight: float = math.nan
    sync_calls: int = 0
    failure: str = ""
    is_miscounted: bool = False
    """The failure is that a term's weights don't add up to what was counted beforehand."""


def measure(subject: Subject, micro_batches: Sequence[Sequence[int]], *, ddp: DDPConfig | None = None) -> Update:
    """Makes the update of micro-batches, given as dataset indices, from the model's first state.

    Args:
        ddp: places the model on the ranks; `micro_batches` are then this rank's.
    """
    precision = PrecisionName.fp64 if subject.in_float64 else subject.precision.name
    config = subject.config.precision
    scale = config.init_scale if isinstance(config, Fp16Config) and not subject.in_float64 else None
    while True:
        model = subject.fresh_model()
        strategy = SingleStrategy(model) if ddp is None else place(model, ddp, subject.device, precision)
        update = _measure_once(subject, strategy, micro_batches, scale)
        # The scaler of a training lowers its scale when float16 overflows, and goes on.
        if ddp is not None or scale is None or not update.failure or scale <= 1:
            return update
        scale /= 16


def _measure_once(
    subject: Subject, strategy: Strategy, micro_batches: Sequence[Sequence[int]], loss_scale: float | None
) -> Update:
    model = strategy.module
    optimizer = build_optimizer(subject.config.optim, model, subject.device)
    refuse_closure(optimizer, "how a task accumulates doesn't depend on the optimizer, and is proved by updates")
    scaler = None if loss_scale is None else torch.amp.GradScaler(subject.device.type, init_scale=loss_scale)
    # Without clipping: it would hide a gradient that is wrong by a factor.
    task = subject.fresh_task()
    count = weights_of(task)
    accumulator = Accumulator(
        strategy.model,
        optimizer,
        strategy=strategy,
        skip_nonfinite=True,
        scaler=scaler,
        weights=None if count is None else lambda indices: count(subject.batch(indices)),
    )
    update = Update()

    def capture(*_: object) -> None:
        update.gradients = {
            name: _as_float64(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    hook = optimizer.register_step_pre_hook(capture)
    is_one_shot = strategy.world_size == 1 and len(micro_batches) == 1
    if isinstance(task, CoupledTask) and not is_one_shot:
        _accumulate_coupled(subject, accumulator, task, micro_batches)
    else:
        with accumulator.window(list(micro_batches)) as cut:
            for indices in cut:
                output = subject.output(strategy.model, task, subject.batch(indices))
                with subject.stillness():
                    accumulator.backward(output.loss_sum, output.weight, terms=output.terms)
    update.without_gradient = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    try:
        result = accumulator.step()
    except TermError as error:
        return Update(failure=str(error), is_miscounted=True)
    finally:
        hook.remove()
    update.loss, update.weight, update.sync_calls = result.loss, result.weight, result.sync_calls
    if not update.gradients:
        if not result.weight > 0:
            update.failure = f"the total weight is {result.weight:g}"
        elif not math.isfinite(result.loss):
            update.failure = f"the loss is {result.loss}"
        else:
            update.failure = f"the norm of the gradient is {result.grad_norm}"
    update.parameters = {name: _as_float64(parameter) for name, parameter in model.named_parameters()}
    return update


def _accumulate_coupled(
    subject: Subject, accumulator: Accumulator, task: CoupledTask, micro_batches: Sequence[Sequence[int]]
) -> None:
    """Accumulates the window by gradient caching, for comparison with the plain backward of one shot."""

    def embed(indices: Sequence[int]) -> Any:
        with subject.computing():
            return task.embed(accumulator.strategy.model, subject.batch(indices))

    with subject.stillness():  # encloses the backwards
        accumulate_coupled(accumulator, [list(part) for part in micro_batches], embed=embed, loss=task.window_loss)


def _as_float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


def difference(found: Update, wanted: Update) -> tuple[Difference, dict[str, float], dict[str, float]]:
    """Compares an update with the one-shot update.

    Returns:
        The difference; and by parameter, ‖difference‖ / ‖gradient‖, and ‖difference‖ / ‖parameter‖ after the step.
    """
    names = [name for name in wanted.parameters if name in wanted.gradients or name in found.gradients]
    ours = {name: found.gradients.get(name, torch.zeros(())) for name in names}
    theirs = {name: wanted.gradients.get(name, torch.zeros(())) for name in names}
    size = _norm(list(theirs.values()))
    by_parameter = {
        name: _ratio(float((ours[name] - theirs[name]).norm()), max(float(theirs[name].norm()), _SMALLEST_SHARE * size))
        for name in names
    }
    moved = {name: found.parameters[name] - wanted.parameters[name] for name in wanted.parameters}
    dot = sum(float((ours[name] * theirs[name]).sum()) for name in names)
    worst = max(by_parameter, key=by_parameter.__getitem__, default=None)
    overall = Difference(
        gradient_error=_ratio(_norm([ours[name] - theirs[name] for name in names]), size),
        worst_parameter=worst,
        worst_error=by_parameter[worst] if worst is not None else None,
        parameters_error=_ratio(_norm(list(moved.values())), _norm(list(wanted.parameters.values()))),
        factor=_ratio(dot, size * size),
    )
    steps = {name: _ratio(float(moved[name].norm()), float(wanted.parameters[name].norm())) for name in moved}
    return overall, by_parameter, steps


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(math.fsum(float(tensor.square().sum()) for tensor in tensors))


def _ratio(value: float, scale: float) -> float:
    if value == 0:
        return 0.0
    return value / scale if scale else math.inf


def ddp_config(subject: Subject) -> DDPConfig:
    """Returns the user's DDP options, as far as they can change the gradient."""
    chosen = subject.config.strategy if isinstance(subject.config.strategy, DDPConfig) else DDPConfig()
    return dataclasses.replace(
        chosen,
        shard_optimizer=False,
        find_unused_parameters=chosen.find_unused_parameters or subject.has_unused,
        static_graph=chosen.static_graph and not subject.has_unused,
    )
