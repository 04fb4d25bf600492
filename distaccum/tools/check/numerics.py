"""Experiments on numbers: NaN and infinity, parameters without a gradient, and gradients that are not the slope."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from distaccum.config import DDPConfig
from distaccum.errors import listed
from distaccum.runtime.nested import tensors_of
from distaccum.tools.check.measuring import Update
from distaccum.tools.check.recording import described
from distaccum.tools.check.report import Finding, Severity
from distaccum.tools.check.subject import NOISE, Subject

_STEPS = (1e-5, 1e-7, 1e-8)
"""Steps of the central differences, relative to the size of a parameter. Several, because kinks (ReLU, maximum) and
bends (BatchNorm of two samples) may lie in between."""
_SPREAD = 0.1
"""Where the last two steps' slopes differ by a larger share of how far they are from the gradient, they have not
converged, and say nothing."""
_GRADIENT_TOLERANCE = 1e-3
_GROUP = 8
"""Parameters that are examined together."""


def find_nonfinite(subject: Subject, window: Sequence[int]) -> Finding:
    """Finds where NaN or infinity first appears in a window whose loss or gradient has some."""
    probe, digits = subject.probe(window), subject.digits
    for index in window:
        if not _all_finite(tensors_of(subject.samples[index])):
            return _nonfinite(f"sample {index} of the training data", "The data hold it.", digits)
    if not math.isfinite(probe.loss):
        for call in probe.calls:
            if _all_finite(call.inputs) and not _all_finite(call.outputs):
                what = "What goes into it is finite, and what comes out is not."
                return _nonfinite(described(subject.model, call.name), what, digits)
        what = f"The model's outputs are finite, and the loss is {probe.loss}."
        return _nonfinite(subject.task_name, what, digits)
    model = subject.fresh_model()
    subject.backward(subject.output(model, subject.fresh_task(), subject.batch(window)).joined())
    # The backward runs from the last parameter to the first, so the last one is where it began.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _all_finite([parameter.grad]):
            return _nonfinite(f"the gradient of {name}", "The loss is finite, and this gradient is not.", digits)
    return _nonfinite("the gradient", "Each part is finite, and their sum is not.", digits)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _nonfinite(where: str, what: str, digits: str) -> Finding:
    return Finding(
        kind="nonfinite",
        because=f"NaN or infinity comes from {where}",
        what=f"In {digits}: {what}",
        where=where,
        remedy="Look for logarithms and divisions of zero, square roots at zero (infinite slope), and exponentials of "
        "large numbers; in float16, for values above 65504.",
    )


def find_without_gradient(
    subject: Subject, update: Update, window: Sequence[int], world_size: int
) -> Iterator[Finding]:
    """Finds parameters that the loss of a window doesn't depend on, and those that only some samples' loss depends
    on."""
    never = update.without_gradient
    sometimes = [name for name in _unreached(subject, window[:4]) if name not in never]
    strategy = subject.config.strategy
    is_ddp = isinstance(strategy, DDPConfig) or world_size > 1
    will_fail = is_ddp and not (isinstance(strategy, DDPConfig) and strategy.find_unused_parameters)
    lacks = (
        ("no_gradient", "no gradient", never),
        ("sometimes_no_gradient", "no gradient from some samples", sometimes),
    )
    for kind, lack, names in lacks:
        if names:
            yield Finding(
                kind=kind,
                severity=Severity.warning if will_fail else Severity.info,
                what=f"{len(names)} of the parameters that require a gradient got {lack}"
                + (", and DDP fails or hangs when that happens." if will_fail else "."),
                where=listed(names, 6),
                remedy="Set strategy.find_unused_parameters=true; or requires_grad_(False) on them if they are never "
                "used."
                if will_fail
                else "Nothing, if that is meant: DDP then needs strategy.find_unused_parameters=true. Otherwise look "
                "for a detach(), a no_grad() or a module that is never called.",
            )


def _unreached(subject: Subject, indices: Sequence[int]) -> list[str]:
    """Returns the parameters that get no gradient from at least one of these samples alone."""
    found: dict[str, None] = {}
    for index in indices:
        model = subject.fresh_model()
        try:
            subject.backward(subject.output(model, subject.fresh_task(), subject.batch([index])).joined())
        except (ValueError, RuntimeError):
            continue  # the model refuses micro-batches of one, which the cuts show
        found |= dict.fromkeys(name for name, p in model.named_parameters() if p.requires_grad and p.grad is None)
    return list(found)


def find_wrong_gradient(subject: Subject, indices: Sequence[int], tell: Callable[[str], None]) -> Iterator[Finding]:
    """Compares the analytic gradient with central differences of the loss, in float64.

    Parameters are examined in groups of similar slopes, and one by one where a group's slopes differ.
    """
    if not subject.has_float64 or subject.noise > NOISE:
        return
    slopes = _Slopes(subject, indices)
    wrong: list[tuple[str, float, float]] = []
    for start in range(0, len(slopes.names), _GROUP):
        group = slopes.names[start : start + _GROUP]
        tell(f"slopes of the loss, {start} of {len(slopes.names)} parameters")
        if len(group) > 1 and slopes.off(group) is None:
            continue
        for name in group:
            off = slopes.off([name])
            if off is not None:
                wrong.append((name, *off))
    if wrong:
        name, analytic, numeric = wrong[-1]
        yield Finding(
            kind="wrong_gradient",
            severity=Severity.warning,
            what=f"Along a random direction of {name}, of {described(subject.model, name.rpartition('.')[0])}, the "
            f"gradient says {analytic:.6g}, and central differences of the loss in float64 say {numeric:.6g}. Every "
            "cut gives this same gradient.",
            where=listed([entry[0] for entry in wrong], 6),
            remedy="Look at the backward of custom autograd functions between this parameter and the loss, and for "
            "detach() and no_grad(). A straight-through estimator or a stopped gradient does this on purpose.",
        )


class _Slopes:
    """The slope of the loss along directions in parameter space, by the gradient and by central differences.

    The parameters are moved a little first: where they are exactly zero, as new biases are, a ReLU may be at its kink.
    """

    def __init__(self, subject: Subject, indices: Sequence[int]) -> None:
        self._subject = subject
        self._indices = indices
        self._directions: dict[str, Tensor] = {}
        self._slopes: dict[str, float] = {}
        self._model = subject.fresh_model()
        generator = torch.Generator().manual_seed(subject.config.seed + 1)
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.requires_grad and parameter.numel() > 0 and parameter.is_floating_point():
                    scale = max(float(parameter.square().mean().sqrt()), 1e-2)
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(1e-3 * scale * noise.to(parameter.device))
        model = copy.deepcopy(self._model)
        subject.backward(self._loss(model))
        generator = torch.Generator().manual_seed(subject.config.seed)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or parameter.numel() == 0:
                continue
            random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
            direction = random / random.norm()
            gradient = parameter.grad
            if gradient is not None and float(gradient.norm()) > 0:
                # Half along the gradient, so that one that is right gives a clear number.
                direction += gradient / gradient.norm()
            direction *= max(float(parameter.detach().norm()), 1e-3)
            self._directions[name] = direction
            self._slopes[name] = 0.0 if gradient is None else float((gradient * direction).sum())
        largest = max(map(abs, self._slopes.values()), default=0.0)
        self._floor = 1e-7 * largest
        self.names = sorted(self._slopes, key=lambda name: abs(self._slopes[name]))

    def off(self, names: Sequence[str]) -> tuple[float, float] | None:
        """Returns both slopes along the directions of these parameters together if they differ, else None."""
        # Scaled so that the slopes of the group weigh alike: as the smallest that is not zero.
        unit = min((abs(self._slopes[name]) for name in names if self._slopes[name]), default=0.0)
        shares = {name: min(1.0, unit / abs(self._slopes[name] or math.inf)) or 1.0 for name in names}
        analytic = math.fsum(shares[name] * self._slopes[name] for name in names)
        numeric = []
        for step in _STEPS:
            losses = []
            for sign in (1.0, -1.0):
                model = copy.deepcopy(self._model)
                with torch.no_grad():
                    for name in names:
                        model.get_parameter(name).add_(sign * step * shares[name] * self._directions[name])
                losses.append(float(self._loss(model).detach()))
            slope = (losses[0] - losses[1]) / (2 * step)
            rounding = 1e-13 * abs(losses[0]) / step
            tolerance = _GRADIENT_TOLERANCE * max(abs(analytic), abs(slope)) + rounding + self._floor
            if not math.isfinite(slope) or abs(analytic - slope) <= tolerance:
                return None
            numeric.append(slope)
        has_converged = abs(numeric[-1] - numeric[-2]) <= _SPREAD * abs(analytic - numeric[-1])
        return (analytic, numeric[-1]) if has_converged else None

    def _loss(self, model: nn.Module) -> Tensor:
        return self._subject.output(model, self._subject.fresh_task(), self._subject.batch(self._indices)).joined()
