"""Finds out, before the first update, whether a model keeps packed samples apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distaccum.config.enums import PrecisionName
from distaccum.errors import UserError
from distaccum.loaders.collate import PadCollate, is_numbers
from distaccum.loaders.pack import packing_of
from distaccum.models.outputs import logits_of
from distaccum.planning import CutSchedule
from distaccum.runtime.devices import Precision
from distaccum.runtime.nested import gather_objects, to_device
from distaccum.runtime.randomness import GlobalStates
from distaccum.strategies import Strategy, local_parts
from distaccum.tasks import CoupledTask, checked_output
from distaccum.training.model import evaluation_mode

_TOKENS = 12
"""Of each of the two samples, at most the last so many."""
_NOISE_STD = 0.02
_TOLERANCES = {"float64": (1e-9, 0.0), "float32": (1e-4, 0.01), "16 bits": (4e-3, 0.1)}
"""By format: the relative difference that is rounding in any case, and the part of a full leak that still is."""


class _Seen(NamedTuple):
    """Results of a forward: the model's logits `[T, …]` (None where it gives none), loss and weight."""

    logits: Tensor | None
    loss: float
    weight: float


def refuse_leaks(task: Any, data: Any, cuts: CutSchedule, strategy: Strategy, precision: Precision) -> None:
    """Refuses a model or task that `leak_of` finds a reason against. All ranks call it.

    Raises:
        UserError: what the model gives for a sample depends on those before it, or the task can't be packed.
    """
    if reason := leak_of(task, data, cuts, strategy, precision):
        raise UserError(
            f"batch=packed is not supported by this model and task: {reason}. Set batch=by_length, which pads little "
            "and asks nothing of them."
        )


def leak_of(task: Any, data: Any, cuts: CutSchedule, strategy: Strategy, precision: Precision) -> str | None:
    """Computes the ends of two samples packed and alone, if windows are packed. All ranks call it.

    Nothing of it stays. Parameters that are all zeros (such as the last layer of a block often is at first) are random
    numbers meanwhile, as they would hide what is behind them.

    Args:
        task, data: of the training.
        cuts: of the windows.

    Returns:
        Why samples can't be packed; None if they can, or if windows are not packed.
    """
    if not cuts.is_packed or cuts.lengths is None:
        return None
    if isinstance(task, CoupledTask):
        return f"the loss of {type(task).__name__} couples samples, and needs a row for each"
    longest = cuts.lengths.longest_samples(2)
    # Both together are no longer than a sample may be, as the model may have no positions beyond.
    most = max(1, min(_TOKENS, cuts.lengths.longest // 2))
    with GlobalStates.now(strategy.device):
        samples = [_ending(data[index], int(cuts.lengths[index]), most) for index in longest]
        with _no_zeros(strategy), evaluation_mode(strategy.module), torch.no_grad():
            reason = _leak(task, data, samples, strategy, precision)
    reasons = gather_objects(reason, strategy.process_group)
    return next(filter(None, reasons), None)


def _leak(task: Any, data: Any, samples: list[Any], strategy: Strategy, precision: Precision) -> str | None:
    """Returns why the samples can't be packed; None if they can."""
    pad = getattr(data, "collate_fn", None) or PadCollate()

    def seen(batch: Any) -> _Seen:
        return _forward(task, strategy.module, _placed(batch, strategy.device, precision), precision)

    alone = [seen(pad([sample])) for sample in samples]
    joined = seen(pad([_joined(*samples)]))  # as if they were one: what a model makes that doesn't tell them apart
    try:
        packed = seen(packing_of(data)(samples))
    except (TypeError, ValueError, RuntimeError, UserError) as error:
        if isinstance(error, UserError) and isinstance(error.__cause__, TypeError):
            error = error.__cause__  # of a field that the user's samples don't have
        return f"it can't compute packed samples ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    weight = sum(one.weight for one in alone)
    if packed.weight != weight:
        return f"two samples together have the weight {weight:g}, and {packed.weight:g} when they are packed"
    rounding, share = _TOLERANCES[_format(strategy.module, precision)]
    if packed.logits is not None and all(one.logits is not None for one in alone):
        wanted = torch.cat([one.logits for one in alone if one.logits is not None])
        found = _difference(packed.logits, wanted)
        full = _difference(joined.logits, wanted) if joined.logits is not None else 0.0
        what = "logits"
    else:
        wanted_loss = sum(one.loss for one in alone)
        scale = abs(wanted_loss) or 1.0
        found, full, what = abs(packed.loss - wanted_loss) / scale, abs(joined.loss - wanted_loss) / scale, "loss"
    if found <= max(rounding, share * full):
        return None
    return (
        f"the {what} of two samples change by {found:.1e} of their size when they are packed, so a sample is not kept "
        "apart from the one before it. A transformer must take what says where samples begin (position_ids, without an "
        "attention_mask; or sample_lengths) for both its positions and its attention; recurrent, convolutional and "
        "state-space layers pass on what came before"
    )


def _forward(task: Any, module: nn.Module, batch: Any, precision: Precision) -> _Seen:
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda _, arguments, output: outputs.append(output))
    try:
        with precision.autocast():
            output = checked_output(task(module, batch))
    finally:
        hook.remove()
    logits = None
    if outputs:
        try:
            logits = logits_of(outputs[-1])
        except UserError:  # the task may make them of what the model gives
            logits = None
    rows = None if logits is None or logits.dim() < 2 else logits.flatten(0, 1).double()
    return _Seen(rows, float(output.loss_sum), float(output.weight))


def _placed(batch: Any, device: torch.device, precision: Precision) -> Any:
    return to_device(batch, device, float_dtype=precision.input_dtype)


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _format(module: nn.Module, precision: Precision) -> str:
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if precision.name not in (PrecisionName.fp32, PrecisionName.fp64) or dtypes & {torch.float16, torch.bfloat16}:
        return "16 bits"
    return "float64" if dtypes == {torch.float64} else "float32"


def _ending(sample: Any, length: int, most: int) -> Any:
    """Returns the end of a sample: the last tokens of each field that has as many as the sample is long."""
    return _mapped(sample, lambda field: field[-most:] if len(field) == length else field)


def _joined(first: Any, second: Any) -> Any:
    """Returns one sample of two."""
    fields = iter(list(_fields(second)))

    def join(field: Any) -> Any:
        other = next(fields)
        if isinstance(field, Tensor):
            return torch.cat([field, other])
        return np.concatenate([field, other]) if isinstance(field, np.ndarray) else [*field, *other]

    return _mapped(first, join)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a sample with each of its sequences (tensors, arrays and lists of numbers) replaced."""
    if (isinstance(value, Tensor | np.ndarray) and value.ndim > 0) or is_numbers(value):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, function) for key, entry in value.items()}
    return tuple(_mapped(entry, function) for entry in value) if isinstance(value, tuple | list) else value


def _fields(sample: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(sample, found.append)
    return found


@contextmanager
def _no_zeros(strategy: Strategy) -> Iterator[None]:
    """Fills parameters that are all zeros with random numbers, and with zeros again at its end."""
    parameters = [p for p in strategy.module.parameters() if p.is_floating_point() and p.numel()]
    zeros = [part for part in local_parts([p.detach() for p in parameters]) if part.numel() and not part.any()]
    generator = torch.Generator(strategy.device).manual_seed(0)
    try:
        for part in zeros:
            noise = torch.randn(part.shape, generator=generator, device=strategy.device)
            part.copy_(noise * _NOISE_STD)
        yield
    finally:
        strategy.at_rest()
        for part in zeros:
            part.zero_()
