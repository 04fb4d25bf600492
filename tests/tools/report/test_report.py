from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import TINY, Ended

from distaccum.errors import UserError
from distaccum.observers.metrics_reading import read_metrics
from distaccum.observers.run_file import Outcome, RunRecord
from distaccum.report import main
from distaccum.tools.pages.page import MADE_BY
from distaccum.tools.report import write_page
from distaccum.tools.report.runs import differences, read_runs
from distaccum.tools.report.story import what_to_look_at

ROOT = Path(__file__).parent.parent.parent.parent
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
_VOID = {"meta", "link", "br", "hr", "img", "input"}
CONFIG = {
    "seed": 0,
    "batch": {"global_batch_size": 64},
    "data": {"train": {"_target_": "distaccum.data.Digits"}},
    "model": {"_target_": "distaccum.models.CNN"},
    "optim": {"_target_": "torch.optim.AdamW", "lr": 0.002},
    "train": {"clip_norm": 1.0, "max_updates": None},
}


class Page(HTMLParser):
    """What is on a page: notes what is opened and closed, and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.opened: list[str] = []
        self.fetched: list[str] = []
        self.charts: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.opened.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag == "svg":
            self.charts.append(str(dict(attrs)["aria-label"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1] not in ("script", "style", "text", "title"):
            self.words += data


def page(*folders: Path, out: Path | None = None) -> Page:
    found = Page(write_page(folders, out).read_text())
    assert not found.fetched
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", found.text)
    return found


def update(number: int, **changes: Any) -> dict[str, Any]:
    line = {
        "update": number,
        "epoch": (number - 1) // 10,
        "samples": number * 64,
        "loss": 2.0 / number,
        "grad_norm": 0.5,
        "lr": 0.1,
        "update_seconds": 0.02,
        "samples_per_second": 3200.0,
        "data_seconds": 0.001,
        "sync_seconds": 0.002,
        "metrics": {"accuracy": 0.5},
    }
    return {**line, **changes}


def evaluation(number: int, **metrics: float | None) -> dict[str, Any]:
    return {"update": number, "epoch": (number - 1) // 10, "eval": metrics}


def run(
    folder: Path, lines: list[dict[str, Any]], *, config: dict[str, Any] | None = CONFIG, end: str = "", **record: Any
) -> Path:
    """A run's folder with these lines."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + end
    (folder / "metrics.jsonl").write_text(text)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    RunRecord(**{"outcome": Outcome.running, **record}).write(folder)
    return folder


def usual(number: int = 60, **changes: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for index in range(1, number + 1):
        lines.append(update(index, **changes))
        if index % 10 == 0:
            lines.append(evaluation(index, loss=2.5 / index, accuracy=1 - 1 / index))
    return lines


def test_a_run_is_named_by_the_classes_of_what_was_built(tmp_path: Path) -> None:
    config = {
        "model": {"_target_": "transformers.AutoModelForCausalLM.from_config"},
        "data": {"train": {"_target_": "datasets.load_from_disk"}},
    }
    known = run(tmp_path / "known", usual(), config=config, subject="LlamaForCausalLM on Dataset")
    assert "LlamaForCausalLM on Dataset, " in page(known).words
    before = run(tmp_path / "before", usual(), config=config)
    assert "AutoModelForCausalLM on load_from_disk, " in page(before).words


def test_a_run_on_one_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", usual(peak_memory_bytes=3 * 2**20), outcome=Outcome.finished, updates=60)
    shown = page(folder)
    assert "CNN on Digits, finished after 60 updates, 3,840 samples, 6 epochs." in shown.words
    assert "The training loss fell from 1.2222 to 0.0339." in shown.words
    assert "after update 60: loss 0.0417, accuracy 0.9833" in shown.words
    assert (
        "3,200 samples/s; 1.2 s in updates; 5% waiting for data, 85% computing, 10% waiting in the sync" in shown.words
    )
    assert "at most 3.0 MiB of memory" in shown.words
    titles = [chart.partition(" over ")[0].partition(":")[0] for chart in shown.charts]
    assert titles == [
        "Loss",
        "Evaluation: accuracy".partition(":")[0],
        "Gradient norm before clipping",
        "Learning rate",
        "Samples per second",
        "Time of an update",
        "Peak memory of rank 0",
    ]
    assert "mine: 2.0000 at update 1, 0.0333 at update 60, lowest 0.0333 at 60, highest 2.0000 at 1" in shown.charts[0]


def test_a_run_that_keeps_nothing_has_finished_too(train: Callable[..., Ended]) -> None:
    keeps_nothing = [*TINY, "train.max_updates=null", "train.epochs=1", "checkpoint.enabled=false", "run_dir=run"]
    assert train(*keeps_nothing).status == 0
    (found,) = read_runs([Path("run")])
    assert found.is_finished
    with Path("run/metrics.jsonl").open("a") as file:
        file.write(json.dumps(update(5)) + "\n")
    (longer,) = read_runs([Path("run")])
    assert not longer.is_finished, "it was made longer since, and that has not come to its end"


@pytest.mark.parametrize("content", [None, "", "[1]", '{"outcome": "won"}', '{"plan": "", "resumed_after": 1e999}'])
def test_a_run_without_a_readable_run_file_is_shown_from_its_metrics(tmp_path: Path, content: str | None) -> None:
    folder = run(tmp_path / "old", usual())
    (folder / "run.json").unlink()
    if content is not None:
        (folder / "run.json").write_text(content)
    shown = page(folder)
    assert "CNN on Digits, 60 updates, 3,840 samples, 6 epochs; it is not known how it ended." in shown.words
    assert "run.json is missing or can't be read" in shown.words
    assert "The training loss fell" in shown.words


def test_a_run_that_failed_says_with_what_error(train: Callable[..., Ended]) -> None:
    diverging = [*TINY, "optim.lr=1e30", "train.clip_norm=null", "run_dir=run"]
    assert train(*diverging).status == 2
    shown = page(Path("run"))
    assert re.search(r"diverged after \d update", shown.words)
    assert re.search(r"It ended with an error: update \d: the loss is (nan|inf)", shown.words)


def test_what_was_measured_of_noise_is_shown(tmp_path: Path) -> None:
    lines = [
        update(n, noise_scale=900.0 + n, noise_scale_error=50.0, coherence=0.1, window_samples=64) for n in range(1, 61)
    ]
    folder = run(tmp_path / "noisy", lines)
    shown = page(folder)
    assert any(chart.startswith("Gradient noise scale: noisy: 901.00 at update 1") for chart in shown.charts)
    assert any(chart.startswith("Coherence") for chart in shown.charts)
    assert "The gradient noise scale was about 953 samples" in shown.words
    assert "a larger one would still pay" in shown.words


def test_measures_that_belong_together_share_a_chart(tmp_path: Path) -> None:
    def of_groups(number: int) -> dict[str, Any]:
        rates = {f"lr/block{index}": 0.1 * index for index in range(12)} | {"lr/same": 0.1}
        norms = {"grad_norm/head.*": 2.0 / number, "grad_norm/default": 3.0}
        layers = {f"blocks.{index}": {"grad_norm": 1.0 + index, "update_ratio": 0.01} for index in range(2)}
        return update(number, **rates, **norms, terms={"main": 2.0, "<b>": 0.5 * number}, layers=layers, evaluations=25)

    evaluated = evaluation(4, **{"loss": 1.0, "loss/main": 1.5, "loss/<b>": 0.25, "accuracy": 0.5})
    evaluated["eval"] |= {"ema/loss": 1.1, "ema/loss/main": 1.6, "ema/loss/<b>": 0.3}
    folder = run(tmp_path / "run", [*map(of_groups, range(1, 5)), evaluated])
    shown = page(folder)
    charts = {chart.partition(" over updates: ")[0]: chart for chart in shown.charts}
    losses = charts["Mean of each loss"]
    assert "main: 2.0000 at update 1" in losses
    assert "<b>: 0.5000 at update 1, 2.0000 at update 4" in losses
    assert "evaluation, <b>: 0.2500 at update 4" in losses
    assert "<b>: 0.3000 at update 4" in charts["Evaluation: mean of each loss, ema"]
    others = {chart.partition(":")[2] for chart in charts if chart.startswith("Evaluation:")}
    assert others == {" mean of each loss, ema", " accuracy", " ema/loss"}
    assert charts["Gradient norm of each group"].count(" at update 4") == 2
    assert "blocks.1: 2.0000 at update 1" in charts["Gradient norm of each block"]
    assert "Update over weights of each block" in charts
    assert "25" in charts["Evaluations of a window"]
    rates = charts["Learning rate of each group"]
    assert [f"block{index}:" in rates for index in range(12)] == [
        index in (0, 1, 3, 4, 6, 7, 9, 11) for index in range(12)
    ]
    assert "8 of 12 rates, evenly spaced." in shown.words
    assert "same" not in rates, "it is block1's"
    assert "Learning rate" not in charts, "the first group's is among those of all"
    # Colours are those of runs where there are several; what there is only one of has no chart of its own.
    assert "Mean of each loss" not in page(folder, run(tmp_path / "b", usual(3)), out=tmp_path / "c.html").text
    alone = run(tmp_path / "alone", [update(n, **{"lr/a": 0.1, "lr/b": 0.1}, terms={"main": 1.0}) for n in (1, 2)])
    assert not [chart for chart in page(alone).charts if "each" in chart]


def test_several_runs_are_compared(tmp_path: Path) -> None:
    long = run(tmp_path / "long", usual())
    short = run(
        tmp_path / "short",
        [update(n, samples=n * 256, samples_per_second=900.0) for n in range(1, 8)],
        config={**CONFIG, "batch": {"global_batch_size": 256}, "optim": {"_target_": "torch.optim.SGD"}},
    )
    shown = page(long, short, out=tmp_path / "both.html")
    assert "Fastest is long with 3,200 samples/s, slowest short with 900." in shown.words
    assert "Not finished: long, short." in shown.words
    assert "batch.global_batch_size64256" in shown.words
    assert "optim.lr0.002—" in shown.words
    assert "seed" not in shown.words.partition("What differs in the configuration")[2].partition("Where this")[0]
    assert any(chart.startswith("Training loss over samples") for chart in shown.charts), "windows are unequal"
    assert len(read_metrics(short / "metrics.jsonl").updates) == 7


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [run(tmp_path / above / "run", usual(3)) for above in ("one", "two")]
    assert [found.name for found in read_runs(folders)] == ["one/run", "two/run"]
    assert differences(read_runs(folders)) == []
    assert "Nothing: all runs were configured alike." in page(*folders, out=tmp_path / "page.html").words


def test_what_went_wrong_is_told_and_not_drawn(tmp_path: Path) -> None:
    lines = usual(40)
    lines[11] = update(11, loss=None, grad_norm=None, skipped=True)
    lines[19] = update(19, loss=None)
    stopped = {"outcome": Outcome.stopped, "reason": "SIGUSR1", "updates": 40, "resumed_after": [20]}
    torn = '{"update": 41, "loss": 0.'
    folder = run(tmp_path / "bad", [*lines[:30], lines[5], *lines[33:]], end=torn, **stopped)
    with (folder / "metrics.jsonl").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.write("no json\n" + text)
    (found,) = read_runs([folder])
    shown = page(folder)
    assert "stopped by SIGUSR1 after 40 updates" in shown.words
    assert "went on once from a checkpoint" in shown.words
    told = what_to_look_at(found)
    assert any(text.startswith("Update 11 was skipped (") for text in told)
    assert "The loss was not finite in update 19." in told
    assert "1 damaged line of metrics.jsonl left out." in told
    assert "2 updates without a line in metrics.jsonl." in told
    assert "nan" not in shown.text.lower().replace("nano", "").partition("<main>")[2].partition("<script>")[0]
    assert 'class="curve skipped"' in shown.text


def test_a_run_of_nothing_but_nan_and_old_lines_has_a_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "old", [{"update": n, "loss": None} for n in (1, 2)], config=None)
    shown = page(folder)
    assert "No update has a finite loss." in shown.words
    assert "There was no evaluation." in shown.words
    assert "config.yaml is missing" in shown.words
    assert shown.charts == []


def test_thousands_of_updates_are_thinned_and_their_spike_stays(tmp_path: Path) -> None:
    lines = [update(n, loss=77.0 if n == 7777 else 1.0 + (n % 7) / 10) for n in range(1, 20_001)]
    folder = run(tmp_path / "long", lines)
    began = time.perf_counter()
    shown = page(folder)
    assert time.perf_counter() - began < 20
    assert len(shown.text) < 150_000
    assert "highest 77.0000 at 7,777" in shown.charts[0].replace("77.000 ", "77.0000 ")
    assert "the lowest and the highest of each" in shown.words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_seconds": 0.01}, "50% of the time went into waiting for data"),
        ({"sync_seconds": 0.01}, "50% of the time went into the sync"),
        ({"grad_norm": 4.0}, "100% of the updates were clipped: train.clip_norm=1"),
    ],
)
def test_what_stands_out_is_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    plain, striking = run(tmp_path / "plain", usual()), run(tmp_path / "striking", usual(**changes))
    ordinary, told = (what_to_look_at(found) for found in read_runs([plain, striking]))
    assert not any(said in text for text in ordinary)
    assert any(text.startswith(said) for text in told)


def test_over_fitting_slowing_and_growing_are_told(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for n in range(1, 401):
        speed = 1000.0 if n < 300 else 500.0
        lines.append(update(n, samples_per_second=speed, peak_memory_bytes=10**8 + n * 10**6))
        if n % 40 == 0:
            lines.append(evaluation(n, loss=1.0 + abs(n - 120) / 100))
    told = " ".join(what_to_look_at(read_runs([run(tmp_path / "run", lines)])[0]))
    assert "Over-fitting: the evaluation's loss was lowest after update 120 (1.0000)" in told
    assert "It became slower: 1,000 samples/s in the first quarter, 500 in the last." in told
    assert "The peak of memory went on growing" in told


def test_secrets_and_markup_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sesame-open-now")
    config = {**CONFIG, "observers": {"mine": {"api_key": "1234567890", "url": "x?key=sesame-open-now"}}}
    folder = run(tmp_path / "<b>run", usual(3), config={**config, "note": "<script>alert(1)</script>"})
    text = page(folder).text
    assert "1234567890" not in text
    assert "sesame-open-now" not in text
    assert "<b>run" not in text
    assert "<script>alert" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: RUN_DIR"),
        (["nowhere"], "nowhere is no folder"),
        (["x" * 300], f"{'x' * 300} is no folder"),
        (["empty"], "empty holds no run: there is no metrics.jsonl"),
        (["blank"], "blank/metrics.jsonl holds no update that can be read"),
        (["good", "good/"], "good and good are the same folder"),
        (["good", "--wrong"], "unrecognized arguments: --wrong"),
        (["good", "--out", "nowhere/page.html"], "nowhere/page.html can't be written: No such file"),
        (["good", "--out", "other.html"], "other.html exists already and is no page of distaccum"),
    ],
)
def test_bad_input_ends_with_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "good", usual(3))
    run(tmp_path / "blank", [], end="\0\0\0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.html").write_text("<p>mine</p>")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    message = Ended(int(stop.value.code or 0), *capfd.readouterr()).message
    assert said in message
    assert (tmp_path / "other.html").read_text() == "<p>mine</p>"
    assert not (tmp_path / "good" / "report.html").exists()


@pytest.mark.timeout(60)
def test_a_folder_from_a_stranger_does_not_hold_it_up(tmp_path: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij"))
    secret = tmp_path / "secret"
    secret.write_text("run_dir: of-somebody-else\nseed: 4711\n")
    cases: list[Callable[[Path], None]] = [
        lambda path: path.write_text(bomb) and None,
        lambda path: path.write_text("a: !!timestamp x\nb: !!bool x\n") and None,
        lambda path: path.write_text("seed: 0x" + "f" * 9000) and None,
        lambda path: path.write_text("a: " + "[" * 5000) and None,
        lambda path: path.write_bytes(b"a: " + b"x" * (1 << 20)) and None,
        lambda path: path.symlink_to(secret),
        os.mkfifo,
    ]
    for number, make in enumerate(cases):
        folder = run(tmp_path / f"run{number}", usual())
        (folder / "config.yaml").unlink()
        make(folder / "config.yaml")
        (folder / "run.json").unlink()
        os.mkfifo(folder / "run.json")
        shown = page(folder)
        assert "config.yaml is missing or can" in shown.text
        assert "4711" not in shown.text
    folder = run(tmp_path / "piped", usual())
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl can't be read: it is no regular file"):
        write_page([folder])


def test_what_is_printed_and_cannot_be_is_told(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", usual(3))
    command = [sys.executable, "-m", "distaccum.report"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, str(folder)], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: standard output can't be written: No space left on device.\n")
    with subprocess.Popen([*command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as helping:
        assert helping.stdout is not None
        assert helping.stderr is not None
        helping.stdout.close()
        assert helping.stderr.read() == b""
    assert helping.returncode == 0


def test_a_link_that_lies_in_wait_is_not_followed(tmp_path: Path) -> None:
    folder, precious = run(tmp_path / "run", usual(3)), tmp_path / "precious"
    precious.write_text(MADE_BY)
    for name in (".report.html.writing", "report.html"):
        (folder / name).symlink_to(precious)
    assert "<html" in write_page([folder]).read_text()
    assert precious.read_text() == MADE_BY


def test_from_the_command_line_without_torch(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "a", usual(3))
    code = "import sys; from distaccum.report import main; main(['runs/a']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/a/report.html\n", "")
    assert (tmp_path / "runs" / "a" / "report.html").exists()


def test_a_real_run_and_again(train: Callable[..., Ended], tmp_path: Path) -> None:
    averaged = ["train.ema.decay=0.5", "train.ema.first_update=4"]  # the first evaluation has none of it
    assert train(*TINY, *averaged, "run_dir=real", "train.max_updates=6").status == 0
    first = page(Path("real"))
    assert re.search(r"after update 6: .*ema/loss \d", first.words)
    assert "MLP on Synthetic, finished after 6 updates, 96 samples, 2 epochs." in first.words
    assert page(Path("real")).charts == first.charts, "the page that is there already is written again"
    assert math.isfinite(read_runs([Path("real")])[0].samples_per_second)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no browser")
def test_in_a_browser_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    """The page measures itself, at a desktop's and a phone's width; the pointer's script runs."""
    folder = run(tmp_path / "run", usual())
    path = write_page([folder])
    probe = (
        "<script>addEventListener('load', () => {"
        "const svg = document.querySelector('svg[data-x]'), box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.x + box.width / 2, clientY: box.y + 50}));"
        "document.title = [document.documentElement.scrollWidth <= innerWidth,"
        "document.querySelector('.tip:not([hidden])')?.textContent].join(' ')})</script>"
    )
    path.write_text(path.read_text().replace("</body>", probe + "</body>"))
    for width in (1200, 500):
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        command += [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        title = re.findall("<title>(.*?)</title>", done.stdout)[0]
        assert re.fullmatch(r"true update \d+training [\d.]+(evaluation [\d.]+)?", title), title
