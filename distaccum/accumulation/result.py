"""The output of a micro-step, and the result of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from distaccum.errors import UserError

MAIN = "main"
"""Name of the main loss among the terms."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One micro-batch's part of a further loss, which has a denominator of its own.

    A term adds `coefficient · (Σ loss_sum / Σ weight)` to the window's loss; both sums run over all micro-steps and
    ranks. It is 0 where nothing contributes to it.

    Attributes:
        loss_sum: sum of the term's per-element losses, a scalar with a gradient. Never a mean.
        weight: number of elements summed (sequences, samples that have a label, …): a number, or a scalar tensor on
            the device.
        coefficient: what the term's mean is multiplied by; the same in all micro-steps of a window.
    """

    loss_sum: Tensor
    weight: Tensor | float
    coefficient: float = 1.0


@dataclass(slots=True)
class TaskOutput:
    """One micro-batch's part of the window.

    Attributes:
        loss_sum: sum of the per-element losses, a scalar with a gradient. Never a mean: a mean of means is wrong as
            soon as micro-batches or ranks have unequal numbers of elements.
        weight: number of elements summed (samples, valid tokens, pixels): a number, or a scalar tensor on the device.
        sums: sums that metrics are made of, by name; detached tensors of any shape, on the device, or numbers. The same
            names and shapes in each micro-batch.
        terms: further losses by name, each divided by its own total weight. Their denominators are counted before the
            first backward: see `Accumulator(weights=…)` and `Task.weights`.
    """

    loss_sum: Tensor
    weight: Tensor | float
    sums: dict[str, Tensor] = field(default_factory=dict)
    terms: Mapping[str, LossTerm] = field(default_factory=dict)

    def joined(self) -> Tensor:
        """Returns a scalar that depends on all that the update's gradient depends on: not the loss, but of its cost."""
        joined = self.loss_sum
        for term in self.terms.values():
            joined = joined + term.coefficient * term.loss_sum
        return joined


def checked_output(output: Any, what: str = "the task") -> TaskOutput:
    """Returns a task's output with its numbers as Python's and its sums as tensors. Checks types alone.

    Raises:
        UserError: it is no `TaskOutput`, or holds what is neither a tensor nor a number.
    """
    if not isinstance(output, TaskOutput) or not isinstance(output.loss_sum, Tensor):
        raise UserError(
            f"{what} returned a {type(output).__name__}, not a distaccum.TaskOutput with a tensor as loss_sum. Return "
            "TaskOutput(loss_sum=…, weight=…)."
        )
    if not isinstance(output.weight, Tensor):
        output.weight = as_number(output.weight, f"{what}'s weight")
    sums: dict[str, Any] = output.sums
    output.sums = {
        name: value
        if isinstance(value, Tensor)
        else torch.tensor(as_number(value, f"{what}'s sum {name}"), dtype=torch.float64)
        for name, value in sums.items()
    }
    check_terms(output.terms, what)
    return output


def check_terms(terms: Any, what: str) -> None:
    """Refuses terms of another form. Values of tensors are checked when the window ends and reads them.

    Raises:
        UserError: names the term, and what is wrong with it.
    """
    if not isinstance(terms, Mapping) or not all(isinstance(term, LossTerm) for term in terms.values()):
        got = f"a {type(terms).__name__}"
        if isinstance(terms, Mapping):
            got = ", ".join(f"{name}: {type(term).__name__}" for name, term in terms.items())
        raise UserError(f"{what}'s terms must be distaccum.LossTerm by name; got {got}.")
    for name, term in terms.items():
        if name == MAIN:
            raise UserError(f"{what} has a term {MAIN!r}, which is the name of the main loss. Give it another one.")
        if not isinstance(term.loss_sum, Tensor) or not isinstance(term.weight, Tensor | Real):
            raise UserError(
                f"{what}'s term {name!r} needs a tensor as loss_sum and a number or a scalar tensor as weight; got a "
                f"{type(term.loss_sum).__name__} and a {type(term.weight).__name__}."
            )
        if not isinstance(term.coefficient, Real) or not math.isfinite(term.coefficient):
            raise UserError(f"{what}'s term {name!r} needs a finite number as coefficient; got {term.coefficient!r}.")


def as_number(value: Any, what: str) -> float:
    """Returns a number of Python's or NumPy's, or of a tensor that holds a single one, as a float.

    Raises:
        UserError: it is anything else.
    """
    try:
        number = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # several
        number = value
    if not isinstance(number, Real):
        shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
        raise UserError(f"{what} is a {type(value).__name__}{shape}, where a number is wanted.")
    return float(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """Result of one update. Sums and means run over all micro-steps and ranks; the same on every rank unless noted."""

    loss: float
    """Mean loss of the window: Σ loss_sum / Σ weight; with terms, Σ coefficient · mean over all of them."""
    weight: float
    """Σ weight of the main loss."""
    sums: dict[str, Tensor]
    """Σ of what was passed as `sums`: float64, on the CPU."""
    flags: frozenset[str]
    """Names of the accumulator's `flags` that any rank raised."""
    reports: dict[str, tuple[float, ...]]
    """Each rank's values of the accumulator's `reports`, in the order of the ranks."""
    grad_norm: float
    """Norm of the window's mean gradient before clipping, over all parameters of the optimizer together."""
    group_norms: dict[str, float] = field(default_factory=dict)
    """The same of each parameter group, by its `name` or else its number; empty if there is one group."""
    skipped: bool
    """True when the optimizer did not step."""
    micro_steps: int
    """This rank's micro-steps."""
    sync_calls: int
    """Collectives that carried gradients, on this rank."""
    sync_bytes: int
    """Bytes handed to them, on this rank."""
    seconds: float
    """Wall time from the start of the window to the end of the step, on this rank."""
    data_seconds: float
    """Part of it spent waiting for micro-batches."""
    micro_seconds: tuple[float, ...]
    """Time of each of this rank's micro-steps, forward and backward; the last one's until the last gradient bucket was
    launched, so without waiting for other ranks (if the micro-steps hold no collectives of their own). Empty unless the
    accumulator was made with `time_micro_steps`."""
    sync_seconds: float
    """Part of it between the launch of the last gradient bucket and the end of the backward: what of the communication
    (and of waiting for slower ranks) was not hidden behind computing."""
    evaluations: int = 1
    """How often the window was taken: more than once where the optimizer evaluates the loss itself (L-BFGS, SAM). Loss,
    gradient norm, sums and micro-steps are then those of the first evaluation, seconds and traffic those of all."""
    terms: dict[str, float] = field(default_factory=dict)
    """Mean of each loss by name, without its coefficient, `main` first; 0 of one that nothing contributed to. Empty if
    the window has no terms."""
    noise_scale: float | None = None
    """In samples, smoothed; infinite while the gradient doesn't stand out from noise. None where it wasn't measured."""
    noise_scale_error: float | None = None
    """Its standard error; infinite as long as there is one measurement."""
    coherence: float | None = None
    """Of this window's micro-gradients: mean pairwise inner product over mean square. None where it wasn't measured."""
