from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import records
from rich.console import Console

from distaccum.observers import Progress
from distaccum.observers import progress as progress_module

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(progress_module, "time", made)
    return made


def _pipe() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True, highlight=False, width=80)


def _terminal(width: int = 80) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        force_interactive=True,
        soft_wrap=True,
        highlight=False,
        width=width,
        color_system="standard",
        legacy_windows=False,
        _environ={},
    )


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)


def _bars(console: Console) -> list[str]:
    """Every bar line drawn, in order."""
    drawn = re.split(r"[\r\n]", _without_codes(_written(console)))
    return [line.rstrip() for line in drawn if re.search(r"\d/\d", line)]


def _lines(console: Console) -> list[str]:
    return _written(console).splitlines()


def _start(console: Console, run_dir: Path, seconds: float = 2.0, **changes: object) -> Progress:
    observer = Progress(seconds, console)
    observer.on_start(records.start(run_dir, **changes))
    return observer


# In a pipe: plain lines.


def test_the_start_tells_plan_and_folder(tmp_path: Path) -> None:
    console = _pipe()
    _start(console, tmp_path, plan="window 64 = " + "a long plan " * 20)
    plan, updates, files = _lines(console)
    assert plan.rstrip() == "plan           window 64 = " + ("a long plan " * 20).rstrip()
    assert updates == "updates        180 (6 per epoch)"
    assert files == f"files          {tmp_path}"


def test_a_plain_line(tmp_path: Path, clock: _Clock) -> None:
    console = _pipe()
    observer = _start(console, tmp_path)
    observer.on_update(records.update(2))
    clock.now += 10.0
    observer.on_update(records.update(12))
    assert _lines(console)[-1] == ("update  12/180  epoch 1  loss 0.4312  accuracy 0.871  3,200 samples/s  ETA 0:02:48")


def test_lines_come_at_most_every_so_many_seconds_but_first_and_last_do(tmp_path: Path, clock: _Clock) -> None:
    console = _pipe()
    observer = _start(console, tmp_path, seconds=2.0, total_updates=10)
    for number in range(1, 11):
        observer.on_update(records.update(number))
        clock.now += 0.8
    observer.close()
    shown = [int(found) for found in re.findall(r"^update +(\d+)/10 ", _written(console), re.MULTILINE)]
    assert shown == [1, 4, 7, 10]


def test_the_last_update_of_a_run_that_ends_before_its_time_is_shown(tmp_path: Path, clock: _Clock) -> None:
    console = _pipe()
    observer = _start(console, tmp_path)
    for number in (1, 2, 3):
        observer.on_update(records.update(number))
    assert "update   3/180" not in _written(console)
    observer.close()
    observer.close()
    assert _written(console).count("update   3/180") == 1


def test_all_metrics_and_skipped_updates_are_shown(tmp_path: Path) -> None:
    console = _pipe()
    observer = _start(console, tmp_path, seconds=0.0)
    observer.on_update(records.update(1, metrics={"pixel_accuracy": 0.5, "[dice]": 0.25}, skipped=True))
    observer.on_update(records.update(2, loss=float("nan"), metrics={}))
    first, second = _lines(console)[-2:]
    assert "pixel accuracy 0.500  [dice] 0.250  1 skipped  " in first
    assert "loss nan  1 skipped  " in second


def test_an_evaluation_line(tmp_path: Path) -> None:
    console = _pipe()
    observer = _start(console, tmp_path)
    observer.on_evaluation(records.evaluation(18))
    observer.on_evaluation(records.evaluation(24, metrics={"loss": 2.1}, references={"unigram_entropy": 3.21}))
    assert _lines(console)[-2:] == [
        "evaluation after update 18 (epoch 2): loss 0.1234, accuracy 0.9810",
        "evaluation after update 24 (epoch 3): loss 2.1000 (unigram entropy 3.2100)",
    ]


def test_the_closing_summary(tmp_path: Path) -> None:
    console = _pipe()
    observer = _start(console, tmp_path)
    before = len(_lines(console))
    ended = records.end(
        tmp_path,
        updates=120,
        samples=7680,
        stopped_early="loss has not improved",
        skipped_updates=2,
        evaluation=records.evaluation(120, references={"unigram_entropy": 3.21}),
    )
    observer.on_end(ended)
    assert _lines(console)[before:] == [
        "",
        "finished       120 of 180 updates, 7,680 samples",
        "stopped early  loss has not improved",
        "skipped        2 of the updates, whose loss or gradient was not finite",
        "evaluation     loss 0.1234 (unigram entropy 3.2100), accuracy 0.9810",
        "time           14.2 s, of which training 12.3 s",
        "speed          3,214 samples/s",
        "training time  data 3.1%, compute 90.2%, sync 6.7%",
        "peak memory    412.3 MiB (resident set)",
        f"files          {tmp_path}",
    ]


def test_the_summary_leaves_out_what_there_was_not() -> None:
    console = _pipe()
    observer = Progress(console=console)
    observer.on_start(records.start(None))
    observer.on_end(records.end(None, evaluation=None))
    labels = [line.split("  ")[0] for line in _lines(console)]
    assert labels == ["plan", "updates", "", "finished", "time", "speed", "training time", "peak memory"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"interrupted": "SIGTERM"},
            "by SIGTERM after update 1,200 of 1,800; saved; start again with the same command to go on",
        ),
        (
            {"interrupted": "SIGINT"},
            "by Ctrl-C after update 1,200 of 1,800; saved; start again with the same command to go on",
        ),
        ({"interrupted": "SIGUSR1", "is_saved": False}, "by SIGUSR1 after update 1,200 of 1,800; not saved"),
    ],
)
def test_a_run_that_was_asked_to_stop_says_how_to_go_on(changes: dict[str, object], text: str) -> None:
    console = _pipe()
    observer = Progress(console=console)
    observer.on_start(records.start(None, total_updates=1800))
    observer.on_end(records.end(None, updates=1200, **changes))
    assert f"stopped        {text}" in _lines(console)
    assert "finished" not in _written(console)


def test_a_run_that_goes_on_says_so_and_counts_what_was_before(tmp_path: Path, clock: _Clock) -> None:
    console = _pipe()
    observer = _start(console, tmp_path, resumed_update=120, skipped_updates=3)
    assert _lines(console)[1:3] == ["updates        180 (6 per epoch)", "resumed        after update 120"]
    observer.on_update(records.update(121, skipped=True))
    clock.now += 10.0
    observer.on_update(records.update(131))
    # 10 updates took 10 seconds, and 49 are left: those before the resume are not in it.
    assert _lines(console)[-1].startswith("update 131/180  epoch 21 ")
    assert _lines(console)[-1].endswith("  4 skipped  3,200 samples/s  ETA 0:00:49")


def test_a_pipe_gets_no_control_codes(tmp_path: Path) -> None:
    console = _pipe()
    observer = _start(console, tmp_path)
    observer.on_update(records.update(1))
    observer.on_evaluation(records.evaluation(1))
    observer.on_end(records.end(tmp_path))
    assert "\x1b" not in _written(console)


# On a terminal: a bar.


def test_the_bar_fits_80_columns(tmp_path: Path, clock: _Clock) -> None:
    console = _terminal(80)
    observer = _start(console, tmp_path)
    observer.on_update(records.update(2))
    clock.now += 10.0
    observer.on_update(records.update(12))
    observer.close()
    last = _bars(console)[-1]
    assert last.endswith(" 12/180  epoch 1  loss 0.4312  accuracy 0.871  3,200/s  ETA 0:02:48")
    assert last.startswith("╸━━")
    assert len(last) <= 78


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was(tmp_path: Path) -> None:
    console = _terminal(80)
    observer = _start(console, tmp_path, resumed_update=90)
    first = _bars(console)[0]
    assert first.endswith("  90/180")
    # Half of the bar's 40 columns is done; the other half is dim, of the same sign.
    assert "\x1b[36m" + "━" * 20 + "\x1b[0m" in _written(console)
    observer.close()


def test_a_wide_terminal_shows_everything(tmp_path: Path) -> None:
    console = _terminal(160)
    observer = _start(console, tmp_path)
    observer.on_update(records.update(90, metrics={"accuracy": 0.5, "dice": 0.25}, skipped=True))
    observer.close()
    assert "accuracy 0.500  dice 0.250  1 skipped  3,200 samples/s  ETA" in _bars(console)[-1]
    assert _bars(console)[-1].startswith("━" * 20)


@pytest.mark.parametrize("width", [1, 2, 5, 9, 12, 20, 33, 40, 57, 66, 79, 80, 100, 120])
def test_no_width_wraps_or_breaks_the_bar(tmp_path: Path, width: int) -> None:
    console = _terminal(width)
    observer = _start(console, tmp_path)
    before = len(_written(console))
    observer.on_update(records.update(7, metrics={"accuracy": 0.5, "a_rather_long_name": 123.4}, skipped=True))
    observer.on_update(records.update(180, loss=float("inf")))
    bars = re.split(r"[\r\n]", _without_codes(_written(console)[before:]))
    assert any(bars)
    # Two columns stay free for the ^C that a terminal shows.
    assert max(map(len, bars)) <= max(1, width - 2)
    observer.on_evaluation(records.evaluation(180))
    observer.on_end(records.end(tmp_path))


def test_fields_do_not_come_and_go_with_a_digit(tmp_path: Path, clock: _Clock) -> None:
    console = _terminal(79)
    observer = _start(console, tmp_path)
    for number, speed in enumerate([99.0, 12345.0, 99.0], start=1):
        clock.now += 1.0
        observer.on_update(records.update(number, seconds=64 / speed))
    observer.close()
    with_epoch = ["epoch" in bar for bar in _bars(console) if "loss" in bar]
    assert with_epoch == sorted(with_epoch, reverse=True)
    assert set(with_epoch) == {True, False}


def test_the_bar_shows_the_last_update_even_between_two_drawings(tmp_path: Path, clock: _Clock) -> None:
    console = _terminal()
    observer = _start(console, tmp_path)
    for number in (1, 2, 3):
        observer.on_update(records.update(number))
    assert "  3/180" not in _written(console)
    observer.close()
    assert "  3/180" in _bars(console)[-1]


def test_an_error_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    console = _terminal()
    threads, streams = threading.enumerate(), (sys.stdout, sys.stderr)
    observer = _start(console, tmp_path)
    # The cursor is visible during the run already: a killed run closes nothing.
    assert _written(console).rindex(SHOW) > _written(console).rindex(HIDE)
    assert threading.enumerate() == threads
    observer.on_update(records.update(1))
    observer.close()
    observer.close()
    assert (sys.stdout, sys.stderr) == streams
    assert _written(console).rindex(SHOW) > _written(console).rindex(HIDE)
    assert _without_codes(_written(console)).endswith("\n")
    console.print("after")
    assert _written(console).endswith("after\n")


def test_prints_and_evaluations_go_above_the_bar(tmp_path: Path) -> None:
    console = _terminal(120)
    observer = _start(console, tmp_path)
    observer.on_update(records.update(1))
    print("hello")
    observer.on_evaluation(records.evaluation(1))
    observer.close()
    written = _without_codes(_written(console))
    assert written.index("hello\n") < written.index("evaluation after update 1") < written.rindex("  1/180")


def test_long_text_goes_on_beneath_itself_and_paths_stay_whole(tmp_path: Path) -> None:
    console = _terminal(52)
    folder = Path("/a/folder") / ("long" * 20)
    observer = _start(console, folder, plan="window 64 = 2 ranks of 4 micro-steps of 8 samples each")
    observer.close()
    lines = _without_codes(_written(console)).splitlines()
    assert lines[:2] == [
        "plan           window 64 = 2 ranks of 4 micro-steps",
        "               of 8 samples each",
    ]
    assert f"files          {folder}" in lines


def test_a_real_terminal(tmp_path: Path) -> None:
    """The default console on a pseudo-terminal, ended by an error."""
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = {[str(here), str(here.parent.parent)]}\n"
        "from pathlib import Path; import records; from distaccum.observers import Progress\n"
        "observer = Progress(); run_dir = Path(sys.argv[1])\n"
        "try:\n    observer.on_start(records.start(run_dir)); observer.on_update(records.update(90)); 1 / 0\n"
        "finally:\n    observer.close()\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 1
    text = b"".join(chunks).decode()
    assert " 90/180  epoch 14  loss 0.4312" in _without_codes(text)
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert text.index("Traceback") > text.rindex(HIDE)
