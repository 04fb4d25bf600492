"""Proving on a user's own model, data and loss that accumulation equals the large batch."""

from distaccum.tools.check.report import CutRow, Finding, ParameterRow, Report, Severity
from distaccum.tools.check.run import check, examine

__all__ = ["CutRow", "Finding", "ParameterRow", "Report", "Severity", "check", "examine"]
