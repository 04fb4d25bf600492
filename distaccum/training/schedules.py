"""Learning-rate schedules as functions of the update's number."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from distaccum.config import (
    DecayScheduleConfig,
    PolynomialScheduleConfig,
    ScheduleConfig,
    StepScheduleConfig,
    WSDScheduleConfig,
)
from distaccum.config import instantiate as targets
from distaccum.config.enums import DecayShape
from distaccum.errors import UserError, require

logger = logging.getLogger(__name__)

_CHECKED_AHEAD = 1000
"""Updates, spread over the run, for which an own schedule is asked before the run starts."""

_SHAPES: dict[DecayShape, Callable[[float], float]] = {
    DecayShape.linear: lambda x: 1 - x,
    DecayShape.cosine: lambda x: (1 + math.cos(math.pi * x)) / 2,
    DecayShape.one_minus_sqrt: lambda x: 1 - math.sqrt(x),
}


def schedule_factor(section: Any, total_updates: int) -> Callable[[int], float]:
    """Returns a function that gives the factor of the learning rate for update 1, 2, …, `total_updates`.

    During the warm-up the factor of update *t* is t / (updates of the warm-up); then it is 1 (`constant`), or
    factor^⌊updates since the peak / every_updates⌋ (`step`), or decays by final + (1 − final) · f(x). x is 0 at the
    peak, the warm-up's last update, with `wsd` (Hu et al. 2024) at the last update before the decay; it is 1 at the
    last update of the run, or if final is 0, at the one after it: an update with a factor of 0 would do nothing. f(x)
    is 1 − x (`linear`), (1 + cos πx) / 2 (`cosine`; Loshchilov and Hutter 2017, without restarts), (1 − x)^power
    (`polynomial`) or 1 − √x (`one_minus_sqrt`; Hägele et al. 2024).

    Args:
        section: the section `schedule`; with `_target_`, anybody's own.

    Raises:
        UserError: the warm-up and the decay are longer than the run, or an own schedule doesn't give factors.
    """
    if not isinstance(section, ScheduleConfig):
        return _own(section, total_updates)
    warmup = section.warmup_updates
    if section.warmup_ratio is not None:
        warmup = round(section.warmup_ratio * total_updates)
        logger.info("schedule: a warm-up of %d of %d updates", warmup, total_updates)
    require(
        warmup <= total_updates,
        f"schedule.warmup_updates={warmup} is longer than the run, which has {total_updates} updates. "
        "Shorten the warm-up or train longer.",
    )
    peak = max(1, warmup)
    after_warmup: Callable[[int], float] = lambda update: 1.0  # noqa: E731
    if isinstance(section, StepScheduleConfig):
        every, factor = section.every_updates, section.factor
        after_warmup = lambda update: float(factor ** ((update - peak) // every))  # noqa: E731
    elif isinstance(section, DecayScheduleConfig):
        begin = peak
        if isinstance(section, WSDScheduleConfig):
            begin = max(peak, _last_stable_update(section, warmup, total_updates))
        after_warmup = _decay(section, begin, total_updates)
    return lambda update: update / warmup if update < warmup else after_warmup(update)


def _last_stable_update(section: WSDScheduleConfig, warmup: int, total_updates: int) -> int:
    decay = max(1, round(section.decay_ratio * total_updates))
    require(
        warmup + decay <= total_updates,
        f"schedule.decay_ratio={section.decay_ratio} makes {decay} of {total_updates} updates the decay, and the "
        f"warm-up has {warmup}, which together are longer than the run. Shorten one of them or train longer.",
    )
    logger.info("schedule: a decay in the last %d of %d updates", decay, total_updates)
    return total_updates - decay


def _decay(section: DecayScheduleConfig, begin: int, total_updates: int) -> Callable[[int], float]:
    """Returns the factor of updates after the warm-up, which is 1 up to update `begin`."""
    final = section.final_factor
    length = max(1, (total_updates if final > 0 else total_updates + 1) - begin)
    match section:
        case PolynomialScheduleConfig():
            power = section.power
            shape: Callable[[float], float] = lambda x: (1 - x) ** power  # noqa: E731
        case WSDScheduleConfig():
            shape = _SHAPES[section.shape]
        case _:
            shape = _SHAPES[DecayShape[section.name]]

    def factor(update: int) -> float:
        return float(final + (1 - final) * shape(min(1.0, max(0, update - begin) / length)))

    return factor


def _own(section: Any, total_updates: int) -> Callable[[int], float]:
    """Builds anybody's own schedule, and asks it for updates all over the run before any of them is made."""
    name = targets.arguments_of(section, "schedule")[targets.TARGET]
    function = targets.build(section, "schedule", total_updates)
    require(
        callable(function),
        f"schedule: {name} must return a function of the update's number, and returned a {type(function).__name__}.",
    )

    def factor(update: int) -> float:
        value = function(update)
        if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
            raise UserError(
                f"schedule: {name} gives {value!r} for update {update} of {total_updates}, and the factor of the "
                "learning rate must be a number, finite and at least 0."
            )
        return float(value)

    step = max(1, total_updates // _CHECKED_AHEAD)
    first = factor(1)
    for update in (*range(1, total_updates, step), total_updates):
        factor(update)
    again = factor(1)
    require(
        again == first,
        f"schedule: {name} gives {first} for update 1, and {again} when asked again. It must be a function of the "
        "update's number alone, or a run that goes on would have other learning rates.",
    )
    return factor
