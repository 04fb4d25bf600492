"""Several losses in one window, each divided by its own total weight over all micro-steps and ranks.

    loss = Σ over terms of coefficient · (Σ loss_sum / Σ weight)

The denominators W are counted when the window opens, in one small all-reduce before its first forward. So a micro-step
can back-propagate all terms at once, into the one gradient that there is:

    loss_sum + Σ over further terms of coefficient · (W of the main loss / W of the term) · loss_sum of the term

The division by the main loss's weight at the window's end then makes each term its own mean. A term whose denominator
only the forward knows would need a second buffer of gradients, so it is refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distaccum.accumulation.micro_batches import with_last
from distaccum.accumulation.result import MAIN, LossTerm, as_number, check_terms
from distaccum.accumulation.scalars import added_up, added_weights
from distaccum.errors import UserError, listed
from distaccum.loaders import Window
from distaccum.runtime.nested import gather_objects
from distaccum.strategies import Strategy

Weights = Callable[[Any], Mapping[str, Tensor | float]]
"""Returns the number of elements of each loss in a micro-batch, by name; `main` is the main loss."""

_ROUNDING = 1e-6
"""Weights may be sums of float32 numbers, which another cut rounds in another way."""

_UNCOUNTED = (
    "the term {!r} has no denominator. Each loss is divided by its own total weight over the window, which has to be "
    "counted before the first backward: a weight that only the forward knows would need a second buffer of gradients. "
    "Have the task's weights(batch), or Accumulator(weights=…) in a loop of your own, return the number of elements "
    "of each loss in a micro-batch, by name: {{'main': …, {!r}: …}}."
)


class TermError(UserError):
    """A term is divided by something else than the number of its elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """The total weight of each loss over a window, the same on all ranks.

    Attributes:
        names: of the losses, `main` first.
        totals: float64 `[names]`, on the device; NaN if a rank's counts can't be used.
        factors: what each loss_sum is multiplied by before the division by the main weight: 1 for the main loss.
        problem: why this rank's counts can't be used; empty if they can.
        seconds: time spent on loading micro-batches, on this rank.
    """

    names: Sequence[str]
    totals: Tensor
    factors: Tensor
    problem: str
    seconds: float


class TermCounter:
    """Counts, as a window opens, what its losses are divided by.

    Args:
        weights: counts a micro-batch; None if the main loss is the only one, and nothing is counted.
    """

    def __init__(self, strategy: Strategy, weights: Weights | None) -> None:
        self._weights = weights
        self._strategy = strategy
        self._names: list[str] | None = None
        """Of the losses, as all ranks have them; None before the first window."""

    def count(
        self, micro_batches: Iterable[Any], tell: Callable[[str, int, bool], None]
    ) -> tuple[Iterable[Any], Denominators | None]:
        """Returns the micro-batches, which now wait in memory, and their denominators. All ranks call it.

        The micro-batches of a `WindowLoader` wait on the host, before their copy to a GPU. The host doesn't wait for
        a GPU in here.

        Args:
            tell: called with what begins, as `distaccum.accumulation.recovery.Tell` says.

        Raises:
            UserError: the losses have other names on some ranks.
        """
        if self._weights is None:
            return micro_batches, None
        tell("loading", 1, False)
        started = time.perf_counter()
        sizes: Sequence[int] | None = None
        if isinstance(micro_batches, Window):
            batches, sizes = micro_batches.on_host(), micro_batches.sizes
        else:
            micro_batches = batches = [batch for batch, _ in with_last(micro_batches)]
        seconds = time.perf_counter() - started
        counts, problem = self._own(batches, sizes)
        tell("counting", 1, True)
        if self._names is None:
            self._agree(list(counts))
            assert self._names is not None
        if not problem and counts and list(counts) != self._names:
            problem = f"weights() has counted {listed(list(counts))}, and {listed(self._names)} in the window before"
        totals = self._over_ranks([[math.nan] if problem else counts.get(name, [0.0]) for name in self._names])
        main = torch.where(totals[0] > 0, totals[0], 1.0)
        factors = torch.where(totals > 0, main / totals, 0.0)
        found = Denominators(names=self._names, totals=totals, factors=factors, problem=problem, seconds=seconds)
        return micro_batches, found

    def _own(self, batches: Sequence[Any], sizes: Sequence[int] | None) -> tuple[dict[str, list[Tensor | float]], str]:
        """Returns the weights of each micro-batch, by the loss's name; and what is wrong with them."""
        assert self._weights is not None
        counts: dict[str, list[Tensor | float]] = {}
        device = self._strategy.device.type
        for number, batch in enumerate(batches):
            found = self._weights(batch)
            if not isinstance(found, Mapping) or MAIN not in found:
                got = f"those of {listed(list(found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
                return counts, (
                    f"weights() must return the weight of each loss by name, that of the main loss as {MAIN!r}; it "
                    f"returned {got}"
                )
            if number and found.keys() != counts.keys():
                return counts, (
                    f"weights() has counted {listed(list(found))} in a micro-batch, and {listed(list(counts))} in the "
                    "one before: return the same names each time, 0 where there is nothing"
                )
            is_placeholder = sizes is not None and sizes[number] == 0
            for name in sorted(found, key=lambda name: (name != MAIN, name)):
                value = 0.0 if is_placeholder else found[name]
                # Numbers on the host are read there, as copying them to a GPU would make the host wait.
                if not (isinstance(value, Tensor) and value.ndim == 0 and value.device.type == device):
                    value = as_number(value, f"the weight of {name!r} that weights() returned")
                counts.setdefault(name, []).append(value)
        return counts, ""

    def _agree(self, names: list[str]) -> None:
        everyone: list[list[str]] = [n for n in gather_objects(names, self._strategy.process_group) if n]
        self._names = everyone[0] if everyone else [MAIN]
        if other := [names for names in everyone if names != self._names]:
            raise UserError(
                f"the ranks' losses differ: weights() has counted {listed(self._names)} on one and "
                f"{listed(other[0])} on another. Return the same names on each rank, 0 where there is nothing."
            )

    def _over_ranks(self, counts: Sequence[Sequence[Tensor | float]]) -> Tensor:
        totals = torch.cat([added_weights(values, self._strategy.device) for values in counts])
        if self._strategy.process_group is not None:
            work = dist.all_reduce(totals, group=self._strategy.process_group, async_op=True)
            assert work is not None
            work.wait()  # on a GPU, its stream waits and not the host
        return totals


class WindowTerms:
    """The losses of one open window: what its micro-steps have given of each."""

    def __init__(self, counted: Denominators, strategy: Strategy) -> None:
        self._counted = counted
        self._strategy = strategy
        self._further = counted.names[1:]
        self._factors = dict(zip(counted.names, counted.factors.unbind(), strict=True))
        self._given: dict[str, list[LossTerm]] = {}
        self._means: dict[str, float] = {}
        self._is_nothing = False

    def joined(self, loss_sum: Tensor, terms: Mapping[str, LossTerm]) -> Tensor:
        """Returns the loss of a micro-step to back-propagate.

        Raises:
            UserError: a term was not counted.
        """
        joined = _widened(loss_sum)
        for name, term in terms.items():
            if name not in self._further:
                raise UserError(self._counted.problem or _UNCOUNTED.format(name, name))
            part = _widened(term.loss_sum)
            factor = (self._factors[name] * term.coefficient).to(part.device, part.dtype)
            joined = joined + (part * factor).to(joined.device)
        return joined

    def add(self, terms: Mapping[str, LossTerm]) -> None:
        """Notes the terms of a micro-step.

        Raises:
            UserError: a coefficient is not that of the micro-steps before.
        """
        for name, term in terms.items():
            given = self._given.setdefault(name, [])
            if given and given[0].coefficient != term.coefficient:
                raise UserError(
                    f"the term {name!r} has the coefficient {term.coefficient:g} in a micro-step, and "
                    f"{given[0].coefficient:g} in the one before. It must be the same in a whole window, or the "
                    "update depends on how that is cut."
                )
            weight = term.weight.detach() if isinstance(term.weight, Tensor) else term.weight
            given.append(LossTerm(term.loss_sum.detach(), weight, term.coefficient))

    def forget(self) -> None:
        """Forgets the micro-steps so far, which are taken again."""
        self._given.clear()

    @property
    def count(self) -> int:
        """Number of elements of the vector of `own`."""
        return len(self._counted.names) + 3 * len(self._further)

    def own(self) -> Tensor:
        """Returns this rank's part of what `read` reads: float64 `[count]`, on the device.

        What was counted is the same on all ranks, so one of them sends it.
        """
        device, group = self._strategy.device, self._strategy.process_group
        is_first = group is None or dist.get_rank(group) == 0
        parts = [self._counted.totals if is_first else torch.zeros_like(self._counted.totals)]
        for name in self._further:
            given = self._given.get(name)
            if not given:
                parts.append(torch.zeros(3, dtype=torch.float64, device=device))
                continue
            loss_sum = added_up([term.loss_sum for term in given], device)
            parts += [loss_sum, added_weights([term.weight for term in given], device), loss_sum * given[0].coefficient]
        return torch.cat(parts)

    def read(self, numbers: Sequence[float], loss_sum: float, weight: float, update: int) -> dict[str, Any]:
        """Returns loss and terms of `UpdateResult` from the ranks' sum of the vectors of `own`. All ranks call it.

        Args:
            loss_sum, weight: of the main loss, over all ranks.
            update: its number.

        Raises:
            UserError: a term's weights don't add up to what was counted, or its loss is not 0 although its weight is.
        """
        names = self._counted.names
        counted, rest = numbers[: len(names)], numbers[len(names) :]
        if not all(map(math.isfinite, counted)):
            self._raise_problem(update)
        self._is_nothing = not any(counted)
        given = [(loss_sum, weight, loss_sum), *(tuple(rest[n : n + 3]) for n in range(0, len(rest), 3))]
        loss, self._means = 0.0, {}
        for name, total, (term_sum, term_weight, scaled_sum) in zip(names, counted, given, strict=True):
            if not math.isfinite(term_weight):
                self._means[name] = math.nan
            elif abs(term_weight - total) > _ROUNDING * max(abs(total), abs(term_weight)):
                raise TermError(
                    f"update {update}: weights() has counted {total:.12g} elements of the loss {name!r} in the window, "
                    f"and its micro-steps gave the weight {term_weight:.12g}. Both must be the number of elements that "
                    "its loss_sum adds up. The parameters have not moved."
                )
            elif total:
                self._means[name] = term_sum / total
                loss += scaled_sum / total
                continue
            elif term_sum == 0:
                self._means[name] = 0.0
            elif math.isfinite(term_sum):
                raise TermError(
                    f"update {update}: the loss {name!r} has the weight 0 in the window, and its loss_sum is "
                    f"{term_sum:.6g}. Where there is nothing to take the mean of, loss_sum must be 0, as a sum over no "
                    "elements is. The parameters have not moved."
                )
            else:
                self._means[name] = term_sum
            loss += self._means[name]
        return {"loss": loss, "terms": self._means}

    def _raise_problem(self, update: int) -> None:
        problems = gather_objects(self._counted.problem, self._strategy.process_group)
        for rank, problem in enumerate(problems):
            if problem:
                raise UserError(f"update {update}, rank {rank}: {problem}. The parameters have not moved.")
        raise UserError(
            f"update {update}: weights() has counted a weight that is negative, infinite or NaN. Return the number of "
            "elements of each loss in the micro-batch. The parameters have not moved."
        )

    def divisor(self, weight: float) -> float:
        """Returns what the window's gradient is divided by: the main weight, or 1 if only further terms have one."""
        return weight if weight or self._is_nothing else 1.0

    def said_of_nonfinite(self) -> str:
        """Names the losses whose mean is not finite, for a message."""
        names = [name for name, mean in self._means.items() if not math.isfinite(mean)]
        return f" (of its terms, {listed(names)})" if names else ""


def without_denominators(terms: Mapping[str, LossTerm]) -> None:
    """Refuses terms in a window for which nothing was counted.

    Raises:
        UserError: there are some.
    """
    for name in terms:
        raise UserError(_UNCOUNTED.format(name, name))


def checked_terms(terms: Mapping[str, LossTerm] | None) -> Mapping[str, LossTerm]:
    """Returns the terms of a micro-step; none for None.

    Raises:
        UserError: they have another form.
    """
    if not terms:
        return {}
    check_terms(terms, "the micro-step")
    for name, term in terms.items():
        if term.loss_sum.ndim or not term.loss_sum.requires_grad:
            raise UserError(
                f"the term {name!r} needs a scalar tensor with a gradient as loss_sum; got shape "
                f"{tuple(term.loss_sum.shape)}, requires_grad={term.loss_sum.requires_grad}. Leave the term out of "
                "micro-steps that have nothing of it, or give a sum over no elements of the model's outputs."
            )
        is_right = term.weight.ndim == 0 if isinstance(term.weight, Tensor) else 0 <= term.weight < math.inf
        if not is_right:
            raise UserError(
                f"the term {name!r} needs a scalar tensor, or a finite number of at least 0, as weight; got "
                f"{tuple(term.weight.shape) if isinstance(term.weight, Tensor) else term.weight}."
            )
    return terms


def _widened(value: Tensor) -> Tensor:
    """Returns a loss in float32 at least: float16 has no room for the factors."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
