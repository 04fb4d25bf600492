from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import disks
import pytest
import records

from distaccum.config.enums import WandbMode
from distaccum.errors import UserError
from distaccum.observers import Wandb

ROOT = Path(__file__).parent.parent.parent


@dataclass
class _Logged:
    """What an offline run left for `wandb sync`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    project: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    exit_code: int | None = None
    run_id: str = ""
    resume: bool = False
    preempting: bool = False


def _payloads(data: bytes) -> list[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, records cut where a block ends."""
    payloads, parts = [], []
    block, header = 32768, struct.Struct("<IHB")
    position = 7
    while position + header.size <= len(data):
        left = block - position % block
        if left < header.size:
            position += left
            continue
        _, length, kind = header.unpack_from(data, position)
        position += header.size
        parts.append(data[position : position + length])
        position += length
        if kind in (1, 4):
            payloads.append(b"".join(parts))
            parts = []
    return payloads


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _read(run_dir: Path) -> _Logged:
    (logged,) = _read_all(run_dir)
    return logged


def _read_all(run_dir: Path) -> list[_Logged]:
    """One for each time that the run was started, in order of their start."""
    paths = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return [_read_file(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


def _read_file(path: Path) -> _Logged:
    from wandb.proto.wandb_internal_pb2 import Record

    logged = _Logged()
    for payload in _payloads(path.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            logged.rows.append({k: v for k, v in _items(record.history.item).items() if not k.startswith("_")})
        elif kind == "run":
            logged.run_id, logged.resume = record.run.run_id, record.run.resume
            logged.project, logged.name = record.run.project, record.run.display_name
            logged.tags = tuple(record.run.tags)
            logged.config |= _items(record.run.config.update)
        elif kind == "summary":
            logged.summary |= _items(record.summary.update)
        elif kind == "metric" and record.metric.step_metric:
            logged.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "preempting":
            logged.preempting = True
        elif kind == "exit":
            logged.exit_code = record.exit.exit_code
    return logged


def _children() -> set[str]:
    done = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {line for line in done.stdout.splitlines() if not line.endswith(" ps")}


def _offline(run_dir: Path, name: str | None = None) -> Wandb:
    return Wandb(run_dir, WandbMode.offline, "a-project", name, ["one", "two"])


def test_an_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = _children(), dict(os.environ), sys.exit, sys.excepthook
    threads = set(threading.enumerate())
    run_dir = tmp_path / "the-run"
    run_dir.mkdir()
    observer = _offline(run_dir)
    observer.on_start(records.start(run_dir))
    observer.on_update(records.update(1))
    observer.on_update(records.update(2, loss=math.nan, skipped=True, peak_memory_bytes=123_456, terms={"aux": 0.25}))
    observer.on_evaluation(records.evaluation(2, references={"unigram_entropy": 3.2}, sample="a → b"))
    observer.on_end(records.end(run_dir))
    observer.close()
    observer.close()
    assert (_children(), dict(os.environ), sys.exit, sys.excepthook) == before
    assert set(threading.enumerate()) <= threads, "another test's may have ended meanwhile"
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in run_dir.iterdir()] == ["wandb"]
    logged = _read(run_dir)
    assert (logged.project, logged.name, logged.tags) == ("a-project", "the-run", ("one", "two"))
    assert {key: logged.config[key] for key in records.CONFIG} == records.CONFIG
    assert logged.step_metrics == {"train/*": "update", "eval/*": "update"}
    assert logged.exit_code == 0
    first, second, evaluation = logged.rows
    assert first == {
        "update": 1,
        "train/epoch": 0,
        "train/samples": 64,
        "train/window_samples": 64,
        "train/loss": 0.43121,
        "train/accuracy": 0.8712,
        "train/grad_norm": 1 / 3,
        "train/lr": 0.1,
        "train/micro_steps": 4,
        "train/weight": 64.0,
        "train/update_seconds": 0.02,
        "train/samples_per_second": 3200.0,
        "train/data_seconds": 0.001,
        "train/compute_seconds": pytest.approx(0.017),
        "train/sync_seconds": 0.002,
        "train/sync_calls": 2,
        "train/sync_bytes": 1024,
        "train/skipped": 0,
    }
    assert (second["train/skipped"], second["train/peak_memory_bytes"]) == (1, 123_456)
    assert math.isnan(float(second["train/loss"]))
    assert second["train/loss/aux"] == 0.25
    assert evaluation == {
        "update": 2,
        "eval/loss": 0.1234,
        "eval/accuracy": 0.981,
        "eval/reference/unigram_entropy": 3.2,
        "eval/sample": "a → b",
        "eval/seconds": 0.5,
    }
    assert logged.summary["samples_per_second"] == 3214.4
    assert logged.summary["peak_memory_bytes"] == 432_328_704
    assert logged.summary["stopped_early"] is None


def test_a_run_that_fails_is_marked_as_failed(tmp_path: Path) -> None:
    observer = _offline(tmp_path, name="mine")
    observer.on_start(records.start(tmp_path))
    observer.on_update(records.update(1))
    observer.close()
    logged = _read(tmp_path)
    assert (logged.exit_code, logged.name, len(logged.rows)) == (1, "mine", 1)


def _start_and_log(run_dir: Path, resumed_update: int, last_update: int, interrupted: str | None = None) -> None:
    observer = _offline(run_dir)
    observer.on_start(records.start(run_dir, resumed_update=resumed_update))
    for number in range(resumed_update + 1, last_update + 1):
        observer.on_update(records.update(number))
    observer.on_end(records.end(run_dir, interrupted=interrupted))
    observer.close()


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    _start_and_log(tmp_path, 0, 3, interrupted="SIGTERM")
    _start_and_log(tmp_path, 2, 5)
    first, second = _read_all(tmp_path)
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    assert first.run_id == second.run_id == run_id
    assert (first.resume, second.resume) == (True, True)
    assert [[row["update"] for row in logged.rows] for logged in (first, second)] == [[1, 2, 3], [3, 4, 5]]
    # wandb calls a run preempted that said so and ended with another status than 0.
    assert (first.preempting, first.exit_code) == (True, 1)
    assert (second.preempting, second.exit_code) == (False, 0)


def test_another_folder_is_another_run(tmp_path: Path) -> None:
    ids = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _start_and_log(tmp_path / name, 0, 1)
        ids.append(_read(tmp_path / name).run_id)
    assert len(set(ids)) == 2


@pytest.mark.parametrize("content", [b"", bytes(8), b"no id/at all", b"\xff"])
def test_a_damaged_id_is_told_and_replaced(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "wandb" / "run_id"
    path.parent.mkdir()
    path.write_bytes(content)
    _start_and_log(tmp_path, 2, 3)
    assert _read(tmp_path).run_id == path.read_text().strip() != ""
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("distaccum")]
    assert warnings == [f"{path} holds no id of a wandb run: this one gets a new id"]


def test_a_full_disk_stops_no_run_that_has_started(tiny_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    observer = _offline(tiny_disk)
    observer.on_start(records.start(tiny_disk))
    assert observer._has_begun.wait(60)
    disks.fill(tiny_disk)
    for number in range(1, 500):
        observer.on_update(records.update(number))
    observer.on_end(records.end(tiny_disk))
    observer.close()
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_is_full_at_the_start_is_told(tiny_disk: Path) -> None:
    disks.fill(tiny_disk)
    observer = _offline(tiny_disk)
    with pytest.raises(UserError, match=r"wandb\.mode=offline: .*No space left on device"):
        _start_and_end(observer, tiny_disk)
    observer.close()


def test_somebodys_own_session_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    before = sys.exit, sys.excepthook
    wandb.setup(wandb.Settings(mode="offline", silent=True))
    hooks = sys.exit, sys.excepthook
    try:
        service = os.environ["WANDB_SERVICE"]
        observer = _offline(tmp_path)
        observer.on_start(records.start(tmp_path))
        observer.close()
        assert os.environ["WANDB_SERVICE"] == service
        assert (sys.exit, sys.excepthook) == hooks
    finally:
        wandb.teardown()
        sys.exit, sys.excepthook = before
    assert _read(tmp_path).exit_code == 1


def test_online_without_a_key_says_how_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))
    hooks = sys.exit, sys.excepthook
    observer = Wandb(tmp_path, WandbMode.online, "a-project")
    with pytest.raises(UserError, match=r"wandb\.mode=online: .*wandb login.*wandb\.mode=offline"):
        _start_and_end(observer, tmp_path)
    observer.close()
    assert (sys.exit, sys.excepthook) == hooks
    assert "WANDB_SERVICE" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_an_impossible_project_is_told(tmp_path: Path) -> None:
    observer = Wandb(tmp_path, WandbMode.offline, "no/slashes")
    with pytest.raises(UserError, match=r"wandb\.mode=offline: .*no/slashes.*wandb\.mode=disabled"):
        _start_and_end(observer, tmp_path)
    observer.close()


def test_a_missing_wandb_says_how_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    observer = _offline(tmp_path)
    with pytest.raises(UserError, match=r"wandb\.mode=offline needs the package wandb.*wandb\.mode=disabled"):
        observer.on_start(records.start(tmp_path))
    observer.close()


def test_what_can_not_begin_ends_the_run_at_its_next_update(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    observer = Wandb(tmp_path, WandbMode.offline, "no/slashes")
    observer.on_start(records.start(tmp_path))
    assert observer._has_begun.wait(60)
    with pytest.raises(UserError, match=r"wandb\.mode=offline: .*no/slashes.*wandb\.mode=disabled"):
        observer.on_update(records.update(1))
    observer.close()
    assert not [record for record in caplog.records if record.name.startswith("distaccum")], "said once"


def test_nothing_waits_for_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    begin = Wandb._begin
    monkeypatch.setattr(Wandb, "_begin", lambda self, start: (gate.wait(60), begin(self, start)))
    observer = _offline(tmp_path)
    observer.on_start(records.start(tmp_path))
    observer.on_update(records.update(1))
    observer.on_evaluation(records.evaluation(1))
    assert not observer._has_begun.is_set()
    gate.set()
    observer.on_end(records.end(tmp_path))
    observer.close()
    assert [row["update"] for row in _read(tmp_path).rows] == [1, 1]


def test_observers_can_be_imported_without_wandb_and_torch() -> None:
    code = "import sys, distaccum.observers; sys.exit(any(name in sys.modules for name in ('wandb', 'torch')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_background_process_that_is_killed_or_stopped_is_left_behind_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, blow: signal.Signals
) -> None:
    monkeypatch.setattr("distaccum.observers.wandb._SECONDS_TO_END", 2.0)
    before = _children()
    observer = _offline(tmp_path)
    observer.on_start(records.start(tmp_path))
    assert observer._has_begun.wait(60)
    assert observer._session is not None
    helper = observer._session._process
    os.kill(helper.pid, blow)
    started = time.monotonic()
    for number in range(1, 30):
        observer.on_update(records.update(number))
    observer.on_end(records.end(tmp_path))
    assert time.monotonic() - started < 2, "the training is not held up"
    observer.close()
    assert [record.levelname for record in caplog.records if record.name.startswith("distaccum")] == ["WARNING"]
    assert "wandb has failed (" in caplog.text
    assert "training goes on" in caplog.text
    assert helper.poll() == -signal.SIGKILL
    assert _children() == before


def test_settings_that_wandb_refuses_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^wandb cannot start with wandb.mode=offline: run_tags: .*Tag at index 0 is"):
        _start_and_close(Wandb(tmp_path, WandbMode.offline, "a-project", None, [""]), tmp_path)
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(UserError, match=r"^wandb cannot start with wandb.mode=offline: mode: Input should be 'online'"):
        _start_and_close(_offline(tmp_path), tmp_path)


def _start_and_end(observer: Wandb, run_dir: Path) -> None:
    """What goes wrong in the thread that begins is raised by the end at the latest."""
    observer.on_start(records.start(run_dir))
    observer.on_end(records.end(run_dir))


def _start_and_close(observer: Wandb, run_dir: Path) -> None:
    try:
        _start_and_end(observer, run_dir)
    finally:
        observer.close()
