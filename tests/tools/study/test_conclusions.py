from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from studies import learning, point, study

from distaccum.config.enums import Goal
from distaccum.tools.study.curves import Learning, Spot, crossing, read_learning
from distaccum.tools.study.page import page_of, picture_of
from distaccum.tools.study.results import REACHED, result_of
from distaccum.tools.study.terminal import cells, heads


def spots(*values: float) -> list[Spot]:
    return [Spot(updates=n, samples=10 * n, seconds=n / 10, value=v) for n, v in enumerate(values, 1)]


def test_where_a_curve_crosses_the_target() -> None:
    at = crossing(spots(3.0, math.nan, 1.0, 0.5), 2.0, Goal.min)
    assert at == Spot(updates=2.0, samples=20.0, seconds=pytest.approx(0.2), value=2.0)
    assert crossing(spots(3.0, 2.5), 2.0, Goal.min) is None
    assert crossing(spots(1.0), 2.0, Goal.min) == spots(1.0)[0]
    rising = crossing(spots(0.5, 0.7, 0.9), 0.8, Goal.max)
    assert rising is not None
    assert rising.updates == pytest.approx(2.5)


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"update": 99, "lo')
    return folder


def test_what_a_run_has_learned(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for n in range(1, 41):
        lines.append({"update": n, "samples": 8 * n, "loss": 2.0 / n, "update_seconds": 0.01 if n > 1 else 9.0})
        lines[-1] |= {"noise_scale": float(n), "peak_memory_bytes": 100 + n} if n % 10 == 0 else {}
        if n % 10 == 0:
            lines.append({"update": n, "eval": {"loss": 1.0 / n, "accuracy": n / 40}})
    folder = write(tmp_path / "run", lines)
    found = read_learning(folder, "eval/loss", 2, 0)
    assert (found.updates, found.samples) == (40, 320)
    assert found.seconds == pytest.approx(39 * 0.01 + 0.2), "the first update counts as twenty usual ones at most"
    assert [spot.value for spot in found.curve] == pytest.approx(
        [0.1, 0.075, (1 / 20 + 1 / 30) / 2, (1 / 30 + 1 / 40) / 2]
    )
    assert [spot.updates for spot in found.curve] == [10, 15, 25, 35]
    assert (found.noise_scale, found.peak_memory) == (35.0, 140)
    train = read_learning(folder, "train/loss", 2, 24)
    assert train.curve[-1].value == pytest.approx((2 / 38 + 2 / 39 + 2 / 40) / 3)
    assert (train.curve[-1].updates, train.curve[-1].samples) == (39, 312)
    assert read_learning(folder, "eval/accuracy", 1, 0).curve[-1].value == 1.0
    assert read_learning(tmp_path / "nowhere", "eval/loss", 2, 0) == Learning()


def of_sizes(critical: float, *sizes: int, noise: float | None = None) -> Any:
    return study(*((point(size), learning(size, min_updates=50, critical=critical, noise=noise)) for size in sizes))


def test_the_batch_near_the_critical_one_is_recommended() -> None:
    found = of_sizes(70, 16, 64, 256, 1024, noise=100.0)
    assert found.fit is not None
    assert found.fit.critical_batch_size == pytest.approx(70, rel=0.05)
    assert found.recommended == "b00064-linear"
    lead = found.advice[0]
    assert lead.startswith("Use a batch of about 64. It takes 105 updates and 6,700 samples")
    assert "2.1 times the fewest updates that any batch could do with (50)" in lead
    assert re.search(r"The critical batch size is about \d\d, likely between \d\d and \d\d", lead)
    assert any("in these runs is about 100 samples, 1.4 times" in text for text in found.advice), found.advice
    assert any(text.startswith("Here, with one process, 16 was faster: 4.3 s against 6.7 s") for text in found.advice)
    assert found.advice[-1].endswith("distaccum.train experiment=mine batch.global_batch_size=64 optim.lr=0.002")


@pytest.mark.parametrize(
    ("critical", "said", "name"),
    [(1e5, "Use 256, or more", "b00256-linear"), (0.5, "Use 16, or less", "b00016-linear")],
)
def test_beyond_what_was_tried_it_says_so(critical: float, said: str, name: str) -> None:
    found = of_sizes(critical, 16, 64, 256)
    assert found.advice[0].startswith(said)
    assert found.recommended == name
    assert "∞" not in found.advice[0]


def test_the_better_rule_counts_and_what_did_not_get_there_is_named() -> None:
    entries = [
        (point(16, "linear"), learning(16, min_updates=50, critical=100, slower=2)),
        (point(16, "sqrt"), learning(16, min_updates=50, critical=100)),
        (point(64, "linear", "sqrt"), learning(64, min_updates=50, critical=100)),
        (point(256, "linear"), learning(256, min_updates=50, critical=100)),
        (point(256, "sqrt"), learning(256, min_updates=50, critical=100, to=0.3)),
    ]
    found = study(*entries)
    assert [result.name for result in found.chosen] == ["b00016-sqrt", "b00064-base", "b00256-linear"]
    told = " ".join(found.advice)
    assert "sqrt at 16 (50% fewer updates); linear at 256 (the only one to get there)" in told
    assert "1 did not get there: 256, sqrt" in told
    assert [cells(result)[3] for result in found.results].count("reached") == 4


def test_the_target_is_the_hardest_that_all_sizes_reached() -> None:
    entries = [
        (point(16, "linear"), learning(16, min_updates=50, critical=100)),
        (point(64, "linear"), learning(64, min_updates=50, critical=100, to=0.2)),
        (point(64, "sqrt"), learning(64, min_updates=50, critical=100, to=0.5)),
    ]
    found = study(*entries, target=None)
    assert found.target == pytest.approx(10**-0.65)
    assert {result.batch_size for result in found.chosen} == {16, 64}
    assert "The target is the hardest one" in " ".join(found.advice)


def test_nothing_reached_and_nothing_run_are_told() -> None:
    none = study((point(16), learning(16, min_updates=50, critical=100)), target=0.01)
    assert none.advice == ["No run reached 0.0100 (the evaluation's loss), so there is nothing to conclude."]
    assert picture_of(none) == ""
    assert "nothing to conclude" in page_of(none)
    alone = study((point(16), learning(16, min_updates=50, critical=100)), (point(64), Learning()))
    assert alone.advice[0].startswith("Not finished: 1 of 2 runs are still to be made (64, linear")
    assert alone.advice[1].startswith("16 is the only batch size that got there")
    assert not alone.is_complete


def test_the_page_says_it_all_and_needs_nothing() -> None:
    made = of_sizes(70, 16, 64, 256, 1024, noise=100.0)
    diverged = result_of(point(4096, "none"), Learning(), is_over=True, reason="update 3: <loss> is NaN", diverged=True)
    made.results.append(diverged)
    page = page_of(made)
    assert "CNN on Digits: what batch size?" in page
    assert made.advice[0].split("loss to")[1] in page
    assert "update 3: &lt;loss&gt; is NaN" in page
    assert page.count("<svg") == 8, "four of the target, the noise scale, three of learning"
    assert "src=" not in page
    assert "href=" not in page
    for size in (16, 64, 256, 1024):
        assert f">{size}</text>" in page
    assert len(heads(made)) == len(cells(diverged))
    picture = ET.fromstring(picture_of(made))
    assert picture.tag.endswith("svg")
    assert "@media (prefers-color-scheme: dark)" in picture_of(made)
    assert all(result.outcome == REACHED for result in made.chosen)
    json.dumps(dataclasses.asdict(made))
