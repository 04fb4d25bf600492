"""Compares updates, and finds out from the gradients of micro-batches why one differs from the update in one shot."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from distaccum.testing.recording import Update

_SMALLEST_SHARE = 1e-4
"""A tensor that is a smaller share of all of them is compared with this share: its digits are the others' rounding."""
_SHOWN = 3
"""Tensors that a message names."""
ALIKE = 1e-3
"""Coefficients of micro-batches are alike within this, and a gradient is then a combination of theirs: autocast rounds
what a loss has cast to float32."""


class Cause(NamedTuple):
    """Names why an update differs, most likely.

    Attributes:
        kind: a stable name for programs.
        because: a clause.
        remedy: how to mend it; empty if nothing is known.
        what: the observation, a sentence with numbers; may be empty.
    """

    kind: str
    because: str
    remedy: str = ""
    what: str = ""

    def lines(self) -> list[str]:
        """Returns the sentences of a message."""
        remedy = [f"Remedy: {self.remedy}."] if self.remedy else []
        return [*filter(None, [self.what]), f"Likeliest cause: {self.because}.", *remedy]


def errors_of(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Returns the relative difference of each tensor, largest first."""
    size = sum(float(tensor.square().sum()) for tensor in wanted.values()) ** 0.5
    zero = torch.zeros(())
    errors = {
        name: float((found.get(name, zero) - wanted.get(name, zero)).norm())
        / max(float(wanted.get(name, zero).norm()), _SMALLEST_SHARE * size, 1e-300)
        for name in wanted.keys() | found.keys()
    }
    # NaN is the largest.
    return dict(sorted(errors.items(), key=lambda item: -math.inf if math.isnan(item[1]) else -item[1]))


def above(errors: dict[str, float], tolerance: float) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error <= tolerance}  # NaN is wrong


def error_of_all(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Returns the relative difference of all tensors together."""
    zero = torch.zeros(())
    names = wanted.keys() | found.keys()
    difference = sum(float((found.get(name, zero) - wanted.get(name, zero)).square().sum()) for name in names)
    return float((difference / max(sum(float(tensor.square().sum()) for tensor in wanted.values()), 1e-300)) ** 0.5)


def named(errors: dict[str, float]) -> str:
    shown = [f"{name} by {error:.2g} of its size" for name, error in list(errors.items())[:_SHOWN]]
    more = len(errors) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def flat(gradients: dict[str, Tensor], like: Update) -> Tensor:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in like.gradients.items()}
    return torch.cat([gradients.get(name, zero).flatten() for name, zero in zeros.items()])


def combination(parts: Tensor, gradient: Tensor) -> tuple[list[float], float]:
    """Returns what each part counts in a gradient, by least squares, and the part of it that is no combination.

    Args:
        parts: `[elements, micro-batches]`, the gradient of each micro-batch by itself.
    """
    solution = torch.linalg.lstsq(parts, gradient[:, None], driver="gelsd").solution[:, 0]
    error = (parts @ solution - gradient).norm() / gradient.norm().clamp_min(1e-300)
    return solution.tolist(), float(error)


def numbers(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values) + "]"


_NO_STATISTICS = "GroupNorm or LayerNorm, or frozen statistics (the layer in eval mode)"


def coupled(whole: Update) -> Cause:
    if whole.statistics:
        layers = ", ".join(whole.statistics[:3])
        because = f"BatchNorm takes statistics of the micro-batch ({layers})"
        return Cause("batch_norm", because, _NO_STATISTICS)
    return Cause(
        "coupled_samples",
        "the loss or a layer couples the samples of a micro-batch: the gradient of the window is no combination of "
        "those of its micro-batches",
        "a loss that is a sum over samples; padding that is masked; no statistics over the micro-batch",
    )


def cause_after(whole: Update) -> Cause:
    if whole.statistics:
        layers = ", ".join(whole.statistics[:3])
        because = f"BatchNorm's running statistics ({layers}) are updated once per micro-batch"
        return Cause("batch_norm", because, _NO_STATISTICS)
    because = "something besides the gradient depends on the number of micro-steps, as a schedule may"
    return Cause("besides_the_gradient", because)


def explained(found: list[float], right: list[float], ranks: int, *, is_combination: bool) -> Cause:
    """Says what makes micro-batches count as they do."""
    ratios = [value / wanted if wanted else float("nan") for value, wanted in zip(found, right, strict=True)]
    largest = max(map(abs, found))
    missing = [number for number, value in enumerate(found) if abs(value) <= ALIKE * largest]
    steps = len(found) // ranks
    by_rank = [ratios[rank * steps : (rank + 1) * steps] for rank in range(ranks)]
    if steps > 1 and missing == [number for number in range(len(found)) if number % steps != steps - 1]:
        kind, because = "only_last", "only the last micro-batch counts: gradients are cleared in each micro-step"
        remedy = "zero_grad() once, before the first micro-step or after the optimizer's step"
    elif missing:
        kind, because = "left_out", f"micro-batches {missing} (counted from 0, rank by rank) are left out"
        remedy = "a window's last micro-batches belong to its update, however few samples they have"
    elif _alike(ratios):
        kind = "wrong_factor"
        because = f"the gradient is {ratios[0]:.4g} times as large ({len(found)} micro-batches on {ranks} rank(s))"
        remedy = (
            "divide the sum over the window by its total weight once; mind that DDP and FSDP take the mean over ranks"
        )
    elif _alike(found):
        kind = "mean_of_means"
        because = "mean of means: the mean of each micro-batch counts alike, whatever is in it"
        remedy = "sum the losses, and divide by what the whole window counts (tokens, samples) over all ranks"
    elif all(map(_alike, by_rank)):
        kind = "mean_of_ranks"
        because = "each rank divides by what it counts itself, and the ranks' means count alike"
        remedy = "add up the number of tokens or samples over the ranks, and divide by that times 1 / ranks"
    elif not is_combination or _earlier_count_less(ratios):
        kind = "changed_between"
        because = "gradients are changed between micro-steps: clipped or scaled in each of them"
        remedy = "clip once, after the last backward"
    else:
        kind, because = "wrong_weight", "micro-batches are weighted by something else than what they hold"
        remedy = "divide sums by what the whole window counts"
    return Cause(kind, because, remedy)


def _alike(values: list[float]) -> bool:
    return all(abs(value - values[0]) <= ALIKE * abs(values[0]) for value in values)


def _earlier_count_less(ratios: list[float]) -> bool:
    """Whether it looks as if gradients had been clipped in each micro-step, so that the first were scaled each time."""
    return all(first <= second * (1 + ALIKE) for first, second in itertools.pairwise(ratios))
