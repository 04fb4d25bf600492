"""Proving on a user's own model, data and loss that accumulation equals the large batch."""

from distaccum.tools.check.report import CheckReport, CutRow, Finding, ParameterRow, Severity
from distaccum.tools.check.run import check, examine

__all__ = ["CheckReport", "CutRow", "Finding", "ParameterRow", "Severity", "check", "examine"]
