"""Pages that need nothing else: charts as inline SVG, and the frame, style and tables that the tools' pages share."""

from __future__ import annotations

from distaccum.pages.lines import Curve, line_chart, spread_labels
from distaccum.pages.page import definitions, key, section, whole_page
from distaccum.pages.rows import Dot, Panel, Segment, row_chart
from distaccum.pages.svg import escaped, nice_ticks

__all__ = [
    "Curve",
    "Dot",
    "Panel",
    "Segment",
    "definitions",
    "escaped",
    "key",
    "line_chart",
    "nice_ticks",
    "row_chart",
    "section",
    "spread_labels",
    "whole_page",
]
