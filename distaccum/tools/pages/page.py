"""Pages in one file each, from the tools' Jinja templates; their charts are inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

MADE_BY = '<meta name="generator" content="distaccum">'
"""By which a page is recognized as one of these."""

TIME_PARTS = {"data": "waiting for data", "compute": "computing", "sync": "waiting in the sync"}
"""What an update's time goes into: CSS class → its name."""

_TOOLS = Path(__file__).parent.parent
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_TOOLS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.globals["made_by"] = Markup(MADE_BY)
_ENVIRONMENT.filters["yaml"] = lambda config: yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with what is below it."""

    chart: Markup
    key: Sequence[tuple[str, str]] = ()
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Charts under a heading."""

    heading: str
    key: Sequence[tuple[str, str]] = ()
    """What colours mean: pairs of a CSS class and its name."""
    wide: Markup | str = ""
    """A chart over the whole width."""
    figures: Sequence[Figure] = ()
    """Charts side by side, as many as there is room for."""
    note: str = ""
    """Small print below."""


def render(template: str, tool: str, title: str, *, has_hover: bool = False, **content: Any) -> str:
    """Returns a page in one file.

    Args:
        template: its name below `tools/`.
        tool: the page has the styles of `TOOL/page.css`.
        has_hover: a script shows the values under the pointer.
        content: what the template uses; strings in it are escaped. `facts`: lines below the heading.
    """
    page = _ENVIRONMENT.get_template(template)
    return page.render(tool=tool, title=title, has_hover=has_hover, **content)


def standalone(chart: Markup, tool: str) -> str:
    """Returns a chart as a file of its own, in the colours of a tool's pages, light or dark."""
    head, _, body = str(chart).partition(">")
    width, height = head.partition('viewBox="0 0 ')[2].partition('"')[0].split()
    styles = "".join((_TOOLS / name / "page.css").read_text(encoding="utf-8") for name in ("pages", tool))
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f"<style>svg {{ font-family: system-ui, 'DejaVu Sans', sans-serif; padding: 8px; background: var(--paper); }}\n"
        f"{styles}</style>{body}\n"
    )


def subject_of(config: dict[str, Any]) -> str:
    """Returns what was trained on what, as far as a run's configuration says: `CNN on Digits`."""

    def last_name(section: Any) -> str:
        names = str(section.get("_target_", "")).split(".") if isinstance(section, dict) else [""]
        is_method = len(names) > 1 and names[-2][:1].isupper()  # AutoModel.from_config
        return names[-2 if is_method else -1]

    data = config.get("data")
    names = [last_name(config.get("model")), last_name(data.get("train") if isinstance(data, dict) else None)]
    return " on ".join(name for name in names if name)
