"""A comparison, whole: its rows, and under what circumstances they came about."""

from __future__ import annotations

from dataclasses import dataclass, field

from distaccum.tools.bench.environment import Circumstances
from distaccum.tools.compare.results import Row


@dataclass(kw_only=True, slots=True)
class Reference:
    """The float64 run whose update the others are compared with."""

    accumulation_steps: int = 1
    """1: one shot."""
    parameters: int = 0
    """Numbers in the model's parameters."""
    problem: str | None = None
    """Why there is none, or None."""


@dataclass(kw_only=True, slots=True)
class Report(Circumstances):
    """What `compare.json` holds."""

    reference: Reference
    rows: list[Row]
    on_cuda: bool = False
    advice: list[str] = field(default_factory=list)
    """What to use here and why, a paragraph each."""
    seconds: float = 0.0
    """How long the comparison took."""

    @property
    def measured(self) -> list[Row]:
        """Rows that have been timed."""
        return [row for row in self.rows if row.is_measured]
