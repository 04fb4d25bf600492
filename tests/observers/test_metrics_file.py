from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import records

from distaccum.errors import UserError
from distaccum.observers import MetricsFile


def _read(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    ]


@contextmanager
def _started(run_dir: Path) -> Iterator[MetricsFile]:
    observer = MetricsFile(run_dir)
    observer.on_start(records.start(run_dir))
    try:
        yield observer
    finally:
        observer.close()


def test_an_update_is_one_line_of_these_keys(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(7))
    (line,) = _read(tmp_path)
    assert line == {
        "update": 7,
        "epoch": 1,
        "samples": 448,
        "loss": 0.43121,
        "grad_norm": 1 / 3,
        "lr": 0.1,
        "micro_steps": 4,
        "weight": 64.0,
        "update_seconds": 0.02,
        "samples_per_second": 3214.4,
        "sync_calls": 2,
        "sync_bytes": 1024,
        "metrics": {"accuracy": 0.8712},
        "data_seconds": 0.001,
        "sync_seconds": 0.002,
    }


def test_a_skipped_update_says_so(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(1, skipped=True))
    assert _read(tmp_path)[0]["skipped"] is True


def test_evaluations_stand_between_the_updates(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(6))
        observer.on_evaluation(records.evaluation(6, references={"unigram_entropy": 3.2}))
        observer.on_update(records.update(7))
        observer.on_end(records.end(tmp_path))
    lines = _read(tmp_path)
    assert lines[1] == {"update": 6, "epoch": 0, "eval": {"loss": 0.1234, "accuracy": 0.981}}
    assert [line["update"] for line in lines] == [6, 6, 7]


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
    here = Path(__file__).parent
    path = f"import sys; sys.path[:0] = {[str(here), str(here.parent.parent)]}\n"
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


@contextmanager
def _full_after(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond `num_bytes`: as near to a full disk as a test comes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_once_with_path_and_reason(tmp_path: Path) -> None:
    with _started(tmp_path) as observer:
        observer.on_update(records.update(1))
        with (
            _full_after((tmp_path / "metrics.jsonl").stat().st_size),
            pytest.raises(UserError, match=r"metrics\.jsonl: File too large"),
        ):
            observer.on_update(records.update(2))
    # Leaving the block above closed the observer, without a second error.
    assert [line["update"] for line in _read(tmp_path)] == [1]


def test_closing_twice_or_before_the_start_does_nothing(tmp_path: Path) -> None:
    MetricsFile(tmp_path).close()
    with _started(tmp_path) as observer:
        observer.close()
    assert _read(tmp_path) == []
