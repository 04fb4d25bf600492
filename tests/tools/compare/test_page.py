from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rows_by_hand import report, row

from distaccum.tools.compare.advice import advise
from distaccum.tools.compare.page import coinciding, page_of
from distaccum.tools.compare.results import CompareReport, CompareRow, Reference
from distaccum.tools.compare.terminal import TWO_AXES
from distaccum.tools.pages.lines import spread_labels
from distaccum.tools.pages.svg import nice_ticks

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_VOID = {"meta", "link", "br", "hr", "img", "input"}


class WellFormed(HTMLParser):
    """Notes what is opened and closed, and what is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        assert tag != "script"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def rows() -> list[CompareRow]:
    return [
        row("one_shot", (9.0, 10.0), accumulation_steps=1, memory_mib=900, error_float64=0.0),
        row("single", (19.0, 21.0)),
        row("dp", (18.0, 22.0), world_size=2),
        row("ddp_sync_every_step", (18.0, 19.0), world_size=2, calls=8, sent=8000),
        row("ddp", (11.0, 12.0), world_size=2, calls=2, sent=2000),
        row("ddp_bf16", (11.0, 12.0), world_size=2, calls=2, sent=1000, error_float64=1e-3, error=1e-3),
        row("ddp", (7.0, 9.0), world_size=4, calls=2, sent=2000),
        row(
            "fsdp_node",
            (11.0, 12.0),
            world_size=4,
            calls=13,
            sent=5120,
            by_axis={"shard": (12, 4096), "replicate": (1, 1024)},
        ),
        row("fsdp", world_size=2, reason='out of memory: tried to get <3 GB> & "failed"'),
    ]


def whole(*of: CompareRow, reference: Reference | None = None) -> CompareReport:
    made = report(*of, **({"reference": reference} if reference else {}))
    made.advice = advise(made)
    return made


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda: whole(*rows()), id="everything"),
        pytest.param(lambda: whole(rows()[-1]), id="nothing measured"),
        pytest.param(lambda: whole(row("single", (20.0,))), id="one row"),
        pytest.param(
            lambda: whole(
                row("single", (20.0,), error_float64=None, error=None), reference=Reference(problem="out of memory")
            ),
            id="no reference",
        ),
    ],
)
def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(made: object) -> None:
    assert callable(made)
    told: CompareReport = made()
    page = page_of(told)
    parser = WellFormed()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.fetched == []
    assert not re.search(r"https?://|@import|url\(", page)
    text = "".join(parser.texts)
    assert all(made_row.title in text for made_row in told.rows)
    assert all((made_row.reason or "") in text for made_row in told.rows)
    assert told.machine in text
    assert "nan" not in page.lower().replace("nanc", "")


def test_traffic_is_shown_by_axis() -> None:
    page = page_of(whole(*rows()))
    assert "FSDP, node of 2 · 4 ranks × 4: 13 collectives, 12 with 4.0 KiB in a node and 1 with 1.0 KiB" in page
    assert "12 + 1" in page
    assert "4.0 KiB + 1.0 KiB" in page
    assert TWO_AXES in page
    assert TWO_AXES not in page_of(whole(*rows()[:3]))


def test_curves_that_are_one_line_share_a_name() -> None:
    groups = coinciding([made for made in rows() if made.loss_curve])
    assert [len(group) for group in groups] == [7, 1]
    assert groups[1][0].placement == "ddp_bf16"


def test_labels_are_moved_apart_and_stay_inside() -> None:
    placed = spread_labels([95.0, 96.0, 97.0, 10.0], 0.0, 100.0)
    assert placed[3] == 10.0
    assert max(placed) <= 100.0
    assert all(abs(one - other) >= 14.49 for i, one in enumerate(placed) for other in placed[:i])


@pytest.mark.parametrize("largest", [1e-9, 0.7, 1.0, 37.0, 99.9, 1e7])
def test_ticks_are_few_and_within_reach(largest: float) -> None:
    for binary in (False, True):
        ticks = nice_ticks(largest, 5, binary)
        assert ticks[0] == 0.0
        assert 2 <= len(ticks) <= 6
        assert largest / 2.6 <= ticks[-1] <= largest * (1 + 1e-6)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_it(tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    page, picture = tmp_path / "compare.html", tmp_path / "page.png"
    page.write_text(page_of(whole(*rows())), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},2600", f"--screenshot={picture}"]
    subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=True)
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    # The colours of the bars and of the dots, as the style sheet has them for a light page.
    assert {(0x4A, 0x7F, 0xB0), (0xC6, 0x5D, 0x4B), (0xD9, 0xA4, 0x41), (0x6B, 0x9A, 0x8B)} <= colours
