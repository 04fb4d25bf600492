"""Proving on a user's own model, data and loss that accumulation equals the large batch."""

from distaccum.tools.check.findings import Finding, Severity
from distaccum.tools.check.report import CutRow, ParameterRow, Report
from distaccum.tools.check.run import check, examine

__all__ = ["CutRow", "Finding", "ParameterRow", "Report", "Severity", "check", "examine"]
