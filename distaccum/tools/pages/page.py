"""The frame of a page, and what is on it besides charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from distaccum.tools.pages.svg import escaped

MADE_BY = '<meta name="generator" content="distaccum">'
"""By which a page is known for one of these."""
_STYLE = Path(__file__).with_name("page.css")
_HOVER = Path(__file__).with_name("hover.js")


def whole_page(title: str, sections: Iterable[str], style: str = "", *, has_hover: bool = False) -> str:
    """A page in one file.

    Args:
        sections: HTML, top to bottom.
        style: CSS besides that of all pages.
        has_hover: a script shows the values under the pointer.
    """
    script = f"<script>\n{_HOVER.read_text(encoding='utf-8')}</script>\n" if has_hover else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{MADE_BY}\n<title>{escaped(title)}</title>\n"
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + f"\n</main>\n{script}</body>\n</html>\n"
    )


def standalone(chart: str, style: str = "") -> str:
    """A chart as a file of its own, in the colours of pages, light or dark."""
    head, _, body = chart.partition(">")
    width, height = head.partition('viewBox="0 0 ')[2].partition('"')[0].split()
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f"<style>svg {{ font-family: system-ui, 'DejaVu Sans', sans-serif; padding: 8px; background: var(--paper); }}\n"
        f"{_STYLE.read_text(encoding='utf-8')}{style}</style>{body}\n"
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


def subject_of(config: dict[str, Any]) -> str:
    """What was trained on what, as far as a run's configuration tells: `CNN on Digits`."""

    def last_name(section: Any) -> str:
        return str(section.get("_target_", "")).rpartition(".")[2] if isinstance(section, dict) else ""

    data = config.get("data")
    names = [last_name(config.get("model")), last_name(data.get("train") if isinstance(data, dict) else None)]
    return " on ".join(name for name in names if name)


def header(title: str, *lines: str) -> str:
    """The head of a page, with facts in short."""
    facts = "".join(f'<p class="facts">{escaped(line)}</p>' for line in lines if line)
    return f"<header><h1>{escaped(title)}</h1>{facts}</header>"


def advice(heading: str, paragraphs: Iterable[str]) -> str:
    """What to do, the most important first; a command after `Train with: ` stands by itself."""
    content = []
    for number, paragraph in enumerate(paragraphs):
        said, has_command, command = paragraph.partition("Train with: ")
        if said.strip():
            css = ' class="lead"' if number == 0 else ""
            content.append(f"<p{css}>{escaped(said.strip())}</p>")
        if has_command:
            content.append(f"<pre><code>{escaped(command)}</code></pre>")
    return section(heading, *content, style="verdict")


def note(text: str) -> str:
    """Small print under charts; empty if there is nothing to say."""
    return f'<p class="note">{escaped(text)}</p>' if text else ""


def figure(chart: str, caption: str = "") -> str:
    return f"<figure>{chart}{f'<figcaption>{escaped(caption)}</figcaption>' if caption else ''}</figure>"


def charts(figures: Iterable[str]) -> str:
    """Charts side by side, as many as there is room for; those that are empty are left out."""
    shown = "".join(figures)
    return f'<div class="charts">{shown}</div>' if shown else ""


def configuration(config: dict[str, Any], name: str = "The configuration") -> str:
    """A configuration, to be unfolded."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return f"<details><summary>{escaped(name)}</summary><pre><code>{escaped(text)}</code></pre></details>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], styles: Sequence[str] = ()) -> str:
    """A table that scrolls sideways where it is too wide; the first cell of each row names it.

    Args:
        rows: the last cell of one that has fewer than `heads`, a reason why it has no more, takes all the rest.
        styles: a CSS class for each row, or none.
    """
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in heads)
    body = ""
    for number, (first, *rest) in enumerate(rows):
        style = styles[number] if styles else ""
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in rest)
        if len(rest) < len(heads) - 1:
            style, cells = "failed", f'<td colspan="{len(heads) - 1}" class="reason">{escaped(rest[-1])}</td>'
        css = f' class="{style}"' if style else ""
        body += f'<tr{css}><th scope="row">{escaped(first)}</th>{cells}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
