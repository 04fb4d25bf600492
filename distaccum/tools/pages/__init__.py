"""Pages that need nothing else: charts as inline SVG, and the frame, style and tables that the tools' pages share."""

from __future__ import annotations

from distaccum.tools.pages.lines import Axis, Band, Curve, Mark, line_chart, spread_labels
from distaccum.tools.pages.page import MADE_BY, definitions, key, section, standalone, subject_of, table, whole_page
from distaccum.tools.pages.rows import Dot, Panel, Segment, row_chart
from distaccum.tools.pages.svg import axis_ticks, escaped, nice_ticks, short
from distaccum.tools.pages.thinning import moving_median, thinned

__all__ = [
    "MADE_BY",
    "Axis",
    "Band",
    "Curve",
    "Dot",
    "Mark",
    "Panel",
    "Segment",
    "axis_ticks",
    "definitions",
    "escaped",
    "key",
    "line_chart",
    "moving_median",
    "nice_ticks",
    "row_chart",
    "section",
    "short",
    "spread_labels",
    "standalone",
    "subject_of",
    "table",
    "thinned",
    "whole_page",
]
