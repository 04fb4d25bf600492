"""Reports what a run was and how it went, from its folder: one page for one run or for several."""

from __future__ import annotations

from distaccum.tools.report.page import write_page

__all__ = ["write_page"]
