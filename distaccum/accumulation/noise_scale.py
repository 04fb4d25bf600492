"""Estimates how noisy gradients are, and so how large a batch pays, from the parts that a window's gradient is made of.

The simple noise scale of McCandlish et al. 2018 is B = tr Σ / |G|²: Σ is the covariance of the gradients of single
samples, G their mean. A batch much smaller than B is mostly noise; one much larger hardly helps a step on.

A window of N samples comes in parts of n_i samples (its micro-batches, on all ranks) with gradient sums s_i, and
S = Σ s_i. The expectations of the two squares that can be seen are

    E Σ‖s_i‖² = |G|² Σ n_i² + N tr Σ        E ‖S‖² = |G|² N² + N tr Σ

which, solved for |G|² and tr Σ, gives estimates without bias, whatever the sizes of the parts. (Appendix A.1 of the
paper is the same for one large and one small batch.) No torch in here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from distaccum.errors import require, require_at_least

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The sums over one window's gradients that the estimates are made of.

    Attributes:
        whole: ‖S‖².
        pieces: Σ ‖s_i‖².
        parts: number of parts that hold samples.
        samples: N.
        squared_sizes: Σ n_i².
    """

    whole: float
    pieces: float
    parts: float
    samples: float
    squared_sizes: float

    @property
    def pairs(self) -> float:
        """Number of ordered pairs of samples from two parts: what |G|² is estimated from."""
        return self.samples**2 - self.squared_sizes

    @property
    def gradient_square(self) -> float:
        """Unbiased estimate of |G|²: the mean inner product of two samples' gradients. May be negative."""
        return (self.whole - self.pieces) / self.pairs

    @property
    def variance(self) -> float:
        """Unbiased estimate of tr Σ."""
        return (self.pieces - self.squared_sizes * self.gradient_square) / self.samples

    @property
    def coherence(self) -> float:
        """Mean inner product of two parts' gradients over the mean square of one, weighted by their sizes.

        1 for parts that all say the same, about 0 for noise.
        """
        return self.gradient_square * self.squared_sizes / self.pieces if self.pieces else math.nan


class NoiseScale:
    """The noise scale of a run, smoothed over the windows in which it is measured.

    The estimates of tr Σ and of |G|² are each averaged, with weights that decay exponentially from measurement to
    measurement and are in proportion to the window's pairs of samples; their ratio is taken after that, as a mean of
    ratios would be biased.

    Args:
        every_updates: measure in update `every_updates`, twice that, and so on. Costs are in measured ones alone.
        smoothing: what the weight of a measurement is multiplied by at each later one; the memory is about
            1 / (1 - smoothing) measurements long.

    Attributes:
        measurements: number of those so far.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(self, *, every_updates: int = 64, smoothing: float = 0.9) -> None:
        require_at_least(1, insight__every_updates=every_updates)
        require(0 <= smoothing < 1, f"insight.smoothing={smoothing} is impossible: it must be at least 0 and below 1.")
        self.every_updates = every_updates
        self.smoothing = smoothing
        self.measurements = 0
        # Weighted sums: of 1, of the weights themselves, of |G|², tr Σ, and their products.
        self._sums = dict.fromkeys(("1", "w", "g", "t", "gg", "gt", "tt"), 0.0)
        self._has_warned = False

    def is_due(self, number: int) -> bool:
        """Whether a window, counted from 0, is to be measured."""
        return (number + 1) % self.every_updates == 0

    def update(self, seen: Measurement) -> dict[str, float]:
        """Adds a measurement; returns the fields of `UpdateResult` that it sets: none if nothing can be learned."""
        if not self.add(seen):
            return {}
        return {"noise_scale": self.scale, "noise_scale_error": self.error, "coherence": seen.coherence}

    def add(self, seen: Measurement) -> bool:
        """Adds a measurement; returns False if nothing can be learned from it."""
        if seen.parts < 2:
            self._warn(
                "the noise scale can't be measured in a window that is one micro-batch on one rank: give smaller "
                f"micro-batches, or WindowLoader(…, split_every={self.every_updates}), which cuts those in two"
            )
            return False
        if not (math.isfinite(seen.whole) and math.isfinite(seen.pieces)):
            if math.isfinite(seen.whole):
                self._warn(
                    "the noise scale can't be measured: a parameter got its gradient in several parts within one "
                    "backward (reentrant activation checkpointing?)"
                )
            return False
        weight, square, variance = seen.pairs, seen.gradient_square, seen.variance
        terms = {"1": 1.0, "g": square, "t": variance, "gg": square**2, "gt": square * variance, "tt": variance**2}
        for name, term in terms.items():
            self._sums[name] = self.smoothing * self._sums[name] + weight * term
        self._sums["w"] = self.smoothing**2 * self._sums["w"] + weight**2
        self.measurements += 1
        return True

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            logger.warning("%s", message)
        self._has_warned = True

    def _mean(self, name: str) -> float:
        return self._sums[name] / self._sums["1"] if self._sums["1"] else math.nan

    @property
    def gradient_square(self) -> float:
        """|G|² of gradients of single samples' losses, smoothed; NaN before the first measurement."""
        return self._mean("g")

    @property
    def variance(self) -> float:
        """tr Σ of the same gradients, smoothed."""
        return self._mean("t")

    @property
    def scale(self) -> float:
        """tr Σ / |G|², in samples. Infinite while |G|² is not seen to be above 0; NaN before the first measurement."""
        if not self.measurements:
            return math.nan
        return max(0.0, self.variance) / self.gradient_square if self.gradient_square > 0 else math.inf

    @property
    def error(self) -> float:
        """Standard error of `scale`, from how far measurements scatter; infinite while there is only one.

        By the delta method: tr Σ - B |G|² has mean zero over the measurements, and its standard error over |G|² is
        that of B. What the true scale has changed meanwhile counts as scatter.
        """
        share = self._sums["w"] / self._sums["1"] ** 2 if self._sums["1"] else 1.0  # 1 / number, for equal weights
        scale = self.scale
        if not math.isfinite(scale) or 1 - share < 1e-9:
            return math.inf
        residual = self._mean("tt") - 2 * scale * self._mean("gt") + scale**2 * self._mean("gg")
        return math.sqrt(max(0.0, residual) * share / (1 - share)) / self.gradient_square

    def state_dict(self) -> dict[str, float]:
        """Returns what the next value depends on, besides what is measured then."""
        return {"measurements": self.measurements, **{f"sum of {name}": value for name, value in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what `state_dict` returned."""
        self.measurements = int(state["measurements"])
        self._sums = {name: float(state[f"sum of {name}"]) for name in self._sums}
