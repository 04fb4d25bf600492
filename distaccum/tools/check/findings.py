"""What the check has to say about a model, its data and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    error = "error"
    """The update depends on the cut, or is not a number at all."""
    warning = "warning"
    """The update is the same for every cut, but something else will go wrong, or is not what it looks like."""
    info = "info"
    """Good to know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found by experiment.

    Attributes:
        kind: a stable name for programs (`mixes_samples`, `mean_loss`, …).
        because: a clause that ends the sentence "not equal, because …".
        what: what was seen, with numbers.
        where: the module, parameter, sample or task it is about.
        remedy: what to do.
    """

    kind: str
    severity: Severity
    because: str
    what: str
    where: str
    remedy: str
