"""Costs of micro-batches as a function of the lengths of their samples, and their fit to measured times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """The cost of a micro-batch: Σ L (1 + quadratic · L) + overhead over its samples, each of the length L it takes.

    That is the length that all are padded to, or each one's own where they are packed. In units of one token of a
    short sequence. The quadratic term is attention's, the overhead that of a forward and backward however small.
    """

    quadratic: float = 0.0
    overhead: float = 0.0

    def cost(self, count: NDArray[np.float64], length: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the cost of micro-batches of so many samples, padded to a length."""
        return count * self.of_sample(length) + self.overhead

    def of_sample(self, length: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns what one more sample that takes a length adds to a micro-batch."""
        return length * (1.0 + self.quadratic * length)


class CostFit:
    """Fits a cost model to measured micro-steps, by least squares with no term below zero.

    Args:
        overhead: if it is known, in tokens. Packed micro-batches have nearly the same number of tokens, which leaves
            nothing to tell it from them.
    """

    def __init__(self, overhead: float | None = None) -> None:
        self._overhead = overhead
        self._rows: list[tuple[float, float, float]] = []

    def add(self, count: int, length: int, seconds: float) -> None:
        """Adds a micro-step: its samples, the length that they were padded to, and its seconds."""
        self._rows.append((float(count * length), float(count * length**2), seconds))

    def add_packed(self, lengths: NDArray[np.int64], seconds: float) -> None:
        """Adds a micro-step of packed samples: their lengths, and its seconds."""
        exact = lengths.astype(np.float64)
        self._rows.append((float(exact.sum()), float((exact**2).sum()), seconds))

    def fit(self) -> CostModel | None:
        """Returns the fitted model; None as long as too little has been measured to separate its terms."""
        if len(self._rows) < 8 or len({squares / tokens for tokens, squares, _ in self._rows}) < 4:
            return None
        tokens, squares, seconds = np.array(self._rows).T
        known = self._overhead
        terms = {"linear": tokens + (known or 0.0), "quadratic": squares, "overhead": np.ones_like(tokens)}
        # Largest set of terms whose coefficients come out positive; relative errors count, as times range widely.
        for names in (
            ("linear", "quadratic", "overhead"),
            ("linear", "overhead"),
            ("linear", "quadratic"),
            ("linear",),
        ):
            if known is not None and "overhead" in names:
                continue
            matrix = np.stack([terms[name] for name in names], axis=1) / seconds[:, None]
            found = dict(zip(names, np.linalg.lstsq(matrix, np.ones_like(seconds), rcond=None)[0], strict=True))
            if all(value > 0 for value in found.values()):
                linear = found["linear"]
                return CostModel(
                    quadratic=float(found.get("quadratic", 0.0) / linear),
                    overhead=float(found.get("overhead", 0.0) / linear) if known is None else known,
                )
        return None
