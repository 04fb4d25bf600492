from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import disks
import pytest
import records

from distaccum.errors import UserError
from distaccum.observers import MetricsFile

ROOT = Path(__file__).parent.parent.parent


def _read(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    ]


@contextmanager
def _started(
    run_dir: Path, resumed_update: int = 0, *, continues: bool = False, start_from: Path | None = None
) -> Iterator[MetricsFile]:
    observer = MetricsFile(run_dir, continues=continues, start_from=start_from)
    observer.on_start(records.start(run_dir, resumed_update=resumed_update))
    try:
        yield observer
    finally:
        observer.close()


def _run(run_dir: Path, first: int, last: int, **how: Any) -> bytes:
    """Runs so many updates, with an evaluation after every second one; returns the file."""
    with _started(run_dir, first - 1, **how) as observer:
        for number in range(first, last + 1):
            observer.on_update(records.update(number))
            if number % 2 == 0:
                observer.on_evaluation(records.evaluation(number))
        observer.on_end(records.end(run_dir))
    return (run_dir / "metrics.jsonl").read_bytes()


def test_an_update_is_one_line_of_these_keys(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(7))
    (line,) = _read(tmp_path)
    assert line == {
        "update": 7,
        "epoch": 1,
        "samples": 448,
        "window_samples": 64,
        "loss": 0.43121,
        "grad_norm": 1 / 3,
        "lr": 0.1,
        "micro_steps": 4,
        "weight": 64.0,
        "update_seconds": 0.02,
        "samples_per_second": 3200.0,
        "sync_calls": 2,
        "sync_bytes": 1024,
        "metrics": {"accuracy": 0.8712},
        "data_seconds": 0.001,
        "sync_seconds": 0.002,
    }


def test_an_update_that_looked_up_the_memory_says_it(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(8, peak_memory_bytes=123_456))
    assert _read(tmp_path)[0]["peak_memory_bytes"] == 123_456


def test_an_update_whose_noise_was_measured_says_it(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(1, noise_scale=math.inf, noise_scale_error=math.inf, coherence=-0.1))
        observer.on_update(records.update(2, noise_scale=812.5, noise_scale_error=35.0, coherence=0.25))
    names = ("noise_scale", "noise_scale_error", "coherence")
    assert [[line[name] for name in names] for line in _read(tmp_path)] == [[None, None, -0.1], [812.5, 35.0, 0.25]]


def test_a_skipped_update_says_so(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(1, skipped=True))
    assert _read(tmp_path)[0]["skipped"] is True


def test_evaluations_stand_between_the_updates(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(6))
        observer.on_evaluation(records.evaluation(6, references={"unigram_entropy": 3.2}))
        observer.on_update(records.update(7))
        observer.on_evaluation(records.evaluation(7, metrics={"loss": 0.5}, sample="a → b"))
        observer.on_end(records.end(tmp_path))
    lines = _read(tmp_path)
    assert lines[1] == {"update": 6, "epoch": 0, "eval": {"loss": 0.1234, "accuracy": 0.981}}
    assert lines[3] == {"update": 7, "epoch": 1, "eval": {"loss": 0.5}, "sample": "a → b"}
    assert [line["update"] for line in lines] == [6, 6, 7, 7]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.0**53 + 2])
def test_floats_come_back_bit_for_bit(tmp_path: Path, value: float) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(1, loss=value, metrics={"m": value}))
    (line,) = _read(tmp_path)
    assert line["loss"].hex() == line["metrics"]["m"].hex() == value.hex()


def test_what_json_lacks_is_null(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(1, loss=math.nan, grad_norm=math.inf, metrics={"m": -math.inf}))
        observer.on_evaluation(records.evaluation(1, metrics={"loss": math.nan}))
    first, second = _read(tmp_path)
    assert (first["loss"], first["grad_norm"], first["metrics"]) == (None, None, {"m": None})
    assert second["eval"] == {"loss": None}


def test_a_killed_run_keeps_what_it_wrote(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; import records; from distaccum.observers import MetricsFile\n"
        "run_dir = Path(sys.argv[1]); observer = MetricsFile(run_dir); observer.on_start(records.start(run_dir))\n"
        "observer.on_update(records.update(1)); observer.on_update(records.update(2))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT)]}\n"
    killed = subprocess.run([sys.executable, "-c", path + code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [line["update"] for line in _read(tmp_path)] == [1, 2]


def test_another_runs_numbers_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl exists already.*run_dir"), _started(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_a_missing_folder_is_told_with_path_and_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/metrics\.jsonl: No such file or directory"), _started(tmp_path / "gone"):
        pass


def test_closing_twice_or_before_the_start_does_nothing(tmp_path: Path) -> None:
    MetricsFile(tmp_path).close()
    with _started(tmp_path) as observer:
        observer.close()
    assert _read(tmp_path) == []


# Going on after an update.


@pytest.fixture
def unbroken(tmp_path: Path) -> bytes:
    """The file of a run of 8 updates that nothing happened to."""
    (tmp_path / "unbroken").mkdir()
    return _run(tmp_path / "unbroken", 1, 8)


def _after(lines: bytes, update: int) -> int:
    """Where what belongs to updates up to this one ends."""
    return lines.index(b'{"update": %d,' % (update + 1))


def _without(lines: bytes, *numbers: int) -> bytes:
    return b"".join(line for n, line in enumerate(lines.splitlines(keepends=True), 1) if n not in numbers)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines,
        lambda lines: lines[: _after(lines, 4)],
        lambda lines: lines[: _after(lines, 4) - 1],
        lambda lines: lines[:-1],
        lambda lines: lines[:-40],
        lambda lines: lines[: _after(lines, 5)] + b'{"update": 6, "what\xe2\x82',
        lambda lines: lines[: _after(lines, 5)] + bytes(4096),
        lambda lines: lines[: _after(lines, 4)] + b'{"upda' + bytes(100) + b"\n",
        lambda lines: lines[: _after(lines, 6)] + lines[_after(lines, 2) :],
    ],
    ids=["more", "exact", "no last break", "no break", "torn", "torn UTF-8", "zeros", "zeros and break", "twice"],
)
def test_a_run_that_goes_on_leaves_the_file_of_one_that_never_stopped(
    tmp_path: Path, unbroken: bytes, change: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(change(unbroken))
    assert _run(tmp_path, 5, 8) == unbroken
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]


def test_a_run_may_be_killed_anywhere_in_a_line(tmp_path: Path, unbroken: bytes) -> None:
    for size in range(_after(unbroken, 4), len(unbroken) + 1, 7):
        (tmp_path / "metrics.jsonl").write_bytes(unbroken[:size])
        with _started(tmp_path, 4):
            pass
        assert (tmp_path / "metrics.jsonl").read_bytes() == unbroken[: _after(unbroken, 4)]


def test_lines_in_the_wrong_order_are_put_right(tmp_path: Path, unbroken: bytes) -> None:
    lines = unbroken.splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(reversed(lines)))
    assert _run(tmp_path, 5, 8) == unbroken


def test_an_evaluation_that_is_made_again_is_there_once(tmp_path: Path, unbroken: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(unbroken)
    with _started(tmp_path, 4) as observer:
        observer.on_evaluation(records.evaluation(4))
    assert (tmp_path / "metrics.jsonl").read_bytes() == unbroken[: _after(unbroken, 4)]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(tmp_path: Path, unbroken: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(unbroken[:1000])
    with pytest.raises(UserError, match="exists already"), _started(tmp_path):
        pass
    assert _run(tmp_path, 1, 8, continues=True) == unbroken


def test_a_run_that_may_continue_need_not(tmp_path: Path, unbroken: bytes) -> None:
    assert _run(tmp_path, 1, 8, continues=True) == unbroken


def test_missing_lines_are_told(tmp_path: Path, unbroken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    # Lines 1, 2, 4, 5, 7, 8, … are updates; 3 and 6 are the evaluations of 2 and 4.
    damaged = _without(unbroken, 2, 7, 8)
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    assert _run(tmp_path, 8, 8) == damaged
    (warning,) = caplog.messages
    assert warning == f"{tmp_path}/metrics.jsonl lacks lines of updates that were done before, 3 of 7: 2, 5-6"


def test_a_lost_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _run(tmp_path, 5, 6)
    assert [line["update"] for line in _read(tmp_path)] == [5, 6, 6]
    assert "lacks lines of updates that were done before, 4 of 4: 1-4" in caplog.text


@pytest.mark.parametrize(
    "stray", [b"oops", b"\xff\xfe", b'"text"', b"[1]", b"{}", b'{"update": true}', b'{"update": "1"}', b"[" * 100_000]
)
def test_lines_that_cannot_be_read_are_dropped_and_told(
    tmp_path: Path, unbroken: bytes, stray: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cut = _after(unbroken, 1)
    (tmp_path / "metrics.jsonl").write_bytes(unbroken[:cut] + stray + b"\n" + unbroken[cut:])
    assert _run(tmp_path, 5, 8) == unbroken
    (warning,) = caplog.messages
    assert warning.endswith("these lines were no JSON objects of a run, and are dropped: 2")


def test_lines_that_came_twice_are_told(tmp_path: Path, unbroken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(unbroken + unbroken)
    assert _run(tmp_path, 5, 8) == unbroken
    assert caplog.messages == [f"{tmp_path / 'metrics.jsonl'}: 6 lines came twice; the later ones are kept"]


def test_of_lines_about_one_update_the_last_one_counts(tmp_path: Path) -> None:
    """An update that was done again belongs to the run that the checkpoint is of."""
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "loss": 2.0}\n{"update": 1, "loss": 1.0}\n')
    with _started(tmp_path, 1):
        pass
    assert _read(tmp_path) == [{"update": 1, "loss": 1.0}]


def test_another_runs_lines_come_first_in_a_new_folder(tmp_path: Path, unbroken: bytes) -> None:
    run_dir = tmp_path / "new"
    run_dir.mkdir()
    assert _run(run_dir, 5, 8, start_from=tmp_path / "unbroken") == unbroken
    assert (tmp_path / "unbroken" / "metrics.jsonl").read_bytes() == unbroken
    # Killed and started again with the same command: what is in its own folder counts.
    (tmp_path / "unbroken" / "metrics.jsonl").unlink()
    assert _run(run_dir, 7, 8, start_from=tmp_path / "unbroken", continues=True) == unbroken


def test_a_new_folder_that_is_not_new_is_refused(tmp_path: Path, unbroken: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="exists already"), _started(tmp_path, 4, start_from=tmp_path / "unbroken"):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_a_checkpoint_of_the_runs_own_folder_is_no_other_run(tmp_path: Path, unbroken: bytes) -> None:
    assert _run(tmp_path / "unbroken", 5, 8, start_from=tmp_path / "unbroken" / ".") == unbroken


def test_lines_are_kept_without_room_for_a_copy(tiny_disk: Path, unbroken: bytes) -> None:
    (tiny_disk / "metrics.jsonl").write_bytes(unbroken)
    filled = disks.fill(tiny_disk)
    with _started(tiny_disk, 4) as observer:
        assert (tiny_disk / "metrics.jsonl").read_bytes() == unbroken[: _after(unbroken, 4)]
        filled.unlink()
        observer.on_update(records.update(5))
    assert [line["update"] for line in _read(tiny_disk)] == [1, 2, 2, 3, 4, 4, 5]


def test_a_kill_while_lines_are_rewritten_loses_none(tmp_path: Path, unbroken: bytes) -> None:
    """Killed when it begins to write aside, and when that is about to take the place of the file."""
    # Their order is wrong, so that cutting the end off is not enough.
    before = _without(unbroken, 1) + unbroken[: _after(unbroken, 1)]
    code = (
        "import os, signal, sys; from pathlib import Path; from distaccum.observers import metrics_reading\n"
        "call, run_dir = sys.argv[1], Path(sys.argv[2])\n"
        "def hook(event, arguments):\n"
        "    if event == call and '.writing' in str(arguments[0]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(hook); path = run_dir / 'metrics.jsonl'\n"
        "metrics_reading.keep_lines(path, path, 4)"
    )
    for call in ("open", "os.rename"):
        (tmp_path / "metrics.jsonl").write_bytes(before)
        killed = subprocess.run([sys.executable, "-c", code, call, str(tmp_path)], check=False, cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert _run(tmp_path, 5, 8) == unbroken


# A full disk.


def _updates(observer: MetricsFile, first: int, last: int) -> None:
    for number in range(first, last + 1):
        observer.on_update(records.update(number))


def test_a_full_disk_stops_nothing_and_loses_nothing(tiny_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with _started(tiny_disk) as observer:
        _updates(observer, 1, 3)
        filled = disks.fill(tiny_disk)
        _updates(observer, 4, 60)
        # What there was room for of the first line that did not fit has been taken back.
        written = [line["update"] for line in _read(tiny_disk)]
        assert written == list(range(1, len(written) + 1))
        assert 3 <= len(written) < 60
        assert (tiny_disk / "metrics.jsonl").read_bytes().endswith(b"}\n")
        assert caplog.messages == [
            f"{tiny_disk}/metrics.jsonl can't be written: No space left on device. The run goes on; lines wait in "
            "memory until they can be written."
        ]
        filled.unlink()
        _updates(observer, 61, 62)
        waited = 61 - len(written)
        assert caplog.messages[1:] == [
            f"{tiny_disk}/metrics.jsonl can be written again, and has the {waited} lines that waited."
        ]
        observer.on_end(records.end(tiny_disk))
    assert [line["update"] for line in _read(tiny_disk)] == list(range(1, 63))


def test_lines_that_wait_are_written_at_the_end(tiny_disk: Path) -> None:
    with _started(tiny_disk) as observer:
        filled = disks.fill(tiny_disk)
        _updates(observer, 1, 60)
        observer.on_end(records.end(tiny_disk))
        filled.unlink()
    assert [line["update"] for line in _read(tiny_disk)] == list(range(1, 61))


def test_lines_that_are_lost_at_the_end_are_an_error(tmp_path: Path) -> None:
    observer = MetricsFile(tmp_path)
    observer.on_start(records.start(tmp_path))
    _updates(observer, 1, 2)
    with disks.no_larger_files(than=(tmp_path / "metrics.jsonl").stat().st_size + 100):
        _updates(observer, 3, 5)
        observer.on_end(records.end(tmp_path))
        with pytest.raises(
            UserError, match=r"metrics\.jsonl is not complete, its last 3 lines are lost: File too large"
        ):
            observer.close()
        observer.close()
    assert [line["update"] for line in _read(tmp_path)] == [1, 2]


@pytest.mark.parametrize("ends_with", ["error", "signal"])
def test_lost_lines_hide_no_other_end(tmp_path: Path, ends_with: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a run that failed, its own error is told; one that is to be started again keeps its exit status."""
    observer = MetricsFile(tmp_path)
    observer.on_start(records.start(tmp_path))
    with disks.no_larger_files(than=100):
        _updates(observer, 1, 2)
        if ends_with == "signal":
            observer.on_end(records.end(tmp_path, interrupted="SIGTERM"))
        observer.close()
    assert caplog.records[-1].levelno == logging.ERROR
    assert "its last 2 lines are lost: File too large" in caplog.messages[-1]
    assert _read(tmp_path) == []


def test_a_run_after_a_full_disk_goes_on_and_tells_the_gap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    observer = MetricsFile(tmp_path)
    observer.on_start(records.start(tmp_path))
    _updates(observer, 1, 2)
    with disks.no_larger_files(than=(tmp_path / "metrics.jsonl").stat().st_size):
        _updates(observer, 3, 4)
        observer.close()
    caplog.clear()
    with _started(tmp_path, 4) as observer:
        _updates(observer, 5, 5)
    assert [line["update"] for line in _read(tmp_path)] == [1, 2, 5]
    assert caplog.messages[0].endswith(": 3-4")


def test_a_folder_that_goes_away_for_a_while_loses_nothing(tmp_path: Path) -> None:
    """As a server does that is away: the open file never works again, the path does."""
    run_dir, away = tmp_path / "run", tmp_path / "away"
    run_dir.mkdir()
    with _started(run_dir) as observer:
        _updates(observer, 1, 2)
        with disks.no_larger_files(than=10):
            _updates(observer, 3, 3)
        run_dir.rename(away)
        _updates(observer, 4, 5)
        away.rename(run_dir)
        _updates(observer, 6, 6)
    assert [line["update"] for line in _read(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_turns_read_only_stops_nothing(tiny_disk: Path) -> None:
    with _started(tiny_disk) as observer:
        _updates(observer, 1, 2)
        with disks.no_larger_files(than=10):
            _updates(observer, 3, 3)
        disks.remount(tiny_disk, "ro")
        _updates(observer, 4, 5)
        disks.remount(tiny_disk, "rw")
        observer.on_end(records.end(tiny_disk))
    assert [line["update"] for line in _read(tiny_disk)] == [1, 2, 3, 4, 5]


def test_ctrl_c_within_a_line_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def interrupted(descriptor: int, line: bytes) -> NoReturn:
        write(descriptor, line[:10])
        raise KeyboardInterrupt

    with _started(tmp_path) as observer:
        _updates(observer, 1, 1)
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _updates(observer, 2, 2)
    assert [line["update"] for line in _read(tmp_path)] == [1, 2]
