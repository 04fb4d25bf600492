"""The frame of a page, and what is on it besides charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from distaccum.pages.svg import escaped

_STYLE = Path(__file__).with_name("page.css")


def whole_page(title: str, sections: Iterable[str], style: str = "") -> str:
    """A page in one file.

    Args:
        sections: HTML, top to bottom.
        style: CSS besides that of all pages.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n"
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *content: str, style: str = "") -> str:
    """A part of a page under its heading."""
    css = f' class="{style}"' if style else ""
    return f"<section{css}><h2>{escaped(heading)}</h2>{''.join(content)}</section>"


def key(entries: Sequence[tuple[str, str]]) -> str:
    """What colours mean: pairs of a CSS class and its name."""
    items = "".join(f'<li><span class="swatch {style}"></span>{escaped(name)}</li>' for style, name in entries)
    return f'<ul class="key">{items}</ul>'


def definitions(facts: Iterable[tuple[str, str]]) -> str:
    """Facts in two columns, the name of each and what it is."""
    return f"<dl>{''.join(f'<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>' for name, value in facts)}</dl>"
