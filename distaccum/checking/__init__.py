"""Proving on a user's own model, data and loss that accumulation equals the large batch."""

from distaccum.checking.findings import Finding, Severity
from distaccum.checking.report import CutRow, ParameterRow, Report
from distaccum.checking.running import check, examine

__all__ = ["CutRow", "Finding", "ParameterRow", "Report", "Severity", "check", "examine"]
