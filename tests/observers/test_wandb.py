from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import records

from distaccum.choices import WandbMode
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
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    logged = _Logged()
    for payload in _payloads(path.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            logged.rows.append({k: v for k, v in _items(record.history.item).items() if not k.startswith("_")})
        elif kind == "run":
            logged.project, logged.name = record.run.project, record.run.display_name
            logged.tags = tuple(record.run.tags)
            logged.config |= _items(record.run.config.update)
        elif kind == "summary":
            logged.summary |= _items(record.summary.update)
        elif kind == "metric" and record.metric.step_metric:
            logged.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            logged.exit_code = record.exit.exit_code
    return logged


def _children() -> set[str]:
    done = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {line for line in done.stdout.splitlines() if not line.endswith(" ps")}


def _offline(run_dir: Path, name: str | None = None) -> Wandb:
    return Wandb(run_dir, WandbMode.offline, "a-project", name, ["one", "two"])


def test_an_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate()), _children(), dict(os.environ), sys.exit, sys.excepthook
    run_dir = tmp_path / "the-run"
    run_dir.mkdir()
    observer = _offline(run_dir)
    observer.on_start(records.start(run_dir))
    observer.on_update(records.update(1))
    observer.on_update(records.update(2, loss=math.nan, skipped=True))
    observer.on_evaluation(records.evaluation(2, references={"unigram_entropy": 3.2}))
    observer.on_end(records.end(run_dir))
    observer.close()
    observer.close()
    after = set(threading.enumerate()), _children(), dict(os.environ), sys.exit, sys.excepthook

    assert after == before
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
        "train/loss": 0.43121,
        "train/accuracy": 0.8712,
        "train/grad_norm": 1 / 3,
        "train/lr": 0.1,
        "train/micro_steps": 4,
        "train/weight": 64.0,
        "train/update_seconds": 0.02,
        "train/samples_per_second": 3214.4,
        "train/data_seconds": 0.001,
        "train/sync_seconds": 0.002,
        "train/sync_calls": 2,
        "train/sync_bytes": 1024,
        "train/skipped": 0,
    }
    assert second["train/skipped"] == 1
    assert math.isnan(float(second["train/loss"]))
    assert evaluation == {
        "update": 2,
        "eval/loss": 0.1234,
        "eval/accuracy": 0.981,
        "eval/reference/unigram_entropy": 3.2,
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
        observer.on_start(records.start(tmp_path))
    observer.close()
    assert (sys.exit, sys.excepthook) == hooks
    assert "WANDB_SERVICE" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_an_impossible_project_is_told(tmp_path: Path) -> None:
    observer = Wandb(tmp_path, WandbMode.offline, "no/slashes")
    with pytest.raises(UserError, match=r"wandb\.mode=offline: .*no/slashes.*wandb\.mode=disabled"):
        observer.on_start(records.start(tmp_path))
    observer.close()


def test_a_missing_wandb_says_how_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    observer = _offline(tmp_path)
    with pytest.raises(UserError, match=r"wandb\.mode=offline needs the package wandb.*wandb\.mode=disabled"):
        observer.on_start(records.start(tmp_path))
    observer.close()


def test_observers_can_be_imported_without_wandb_and_torch() -> None:
    code = "import sys, distaccum.observers; sys.exit(any(name in sys.modules for name in ('wandb', 'torch')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
