"""What `run.json` says of runs that finish, stop, fail, are killed, and go on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import forking
import pytest
from command_line import TINY, Ended

from distaccum.observers.base import RunStart
from distaccum.observers.run_file import Outcome, RunFile, RunRecord


def record() -> RunRecord:
    found = RunRecord.read(Path("run"))
    assert found is not None
    return found


def test_a_run_that_finishes_and_is_made_longer(train: Callable[..., Ended]) -> None:
    assert train(*TINY, "run_dir=run", "train.max_updates=4").status == 0
    first = record()
    assert first.plan.startswith("window ")
    assert first.subject == "MLP on Synthetic"
    assert (first.outcome, first.updates, first.total_updates) == (Outcome.finished, 4, 4)
    assert (first.resumed_after, first.skipped_updates, first.reason) == ([], 0, None)
    assert train(*TINY, "run_dir=run", "train.max_updates=6").status == 0
    longer = record()
    assert (longer.outcome, longer.updates, longer.resumed_after) == (Outcome.finished, 6, [4])
    assert set(json.loads(Path("run/run.json").read_text())) == {
        "plan", "subject", "total_updates", "resumed_after", "updates", "skipped_updates", "outcome", "reason",
    }  # fmt: skip


def test_a_killed_run_leaves_a_record_that_the_next_start_goes_on_with(
    train: Callable[..., Ended], tmp_path: Path
) -> None:
    more = [*TINY, "run_dir=run", "train.max_updates=100000", "checkpoint.every_updates=2"]
    with subprocess.Popen([forking.python(), "-m", "distaccum.train", *more], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(Path("run/checkpoints").glob("update-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert record().outcome is Outcome.running
    shortened = [*more[:-2], "checkpoint.every_updates=2", "train.max_updates=1"]
    assert train(*shortened).status == 0
    (resumed,) = record().resumed_after
    assert resumed >= 2


def test_skipped_updates_and_a_failure_are_recorded(train: Callable[..., Ended]) -> None:
    diverging = [*TINY, "run_dir=run", "optim.lr=1e30", "train.clip_norm=null", "train.max_updates=6"]
    message = train(*diverging).message
    failed = record()
    assert failed.outcome is Outcome.diverged
    assert failed.reason is not None
    assert failed.reason in message
    assert train(*diverging, "train.on_nonfinite=skip", "checkpoint.enabled=false", "run_dir=other").status == 0
    skipping = RunRecord.read(Path("other"))
    assert skipping is not None
    assert skipping.outcome is Outcome.finished
    assert skipping.skipped_updates > 0


def test_a_damaged_record_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.json").write_text('{"plan": "win')
    start = RunStart(
        run_dir=tmp_path, plan="window 8", total_updates=9, updates_per_epoch=3, config={}, resumed_update=5
    )
    RunFile(tmp_path).on_start(start)
    assert RunRecord.read(tmp_path) == RunRecord(plan="window 8", total_updates=9, resumed_after=[5], updates=5)
    RunFile(tmp_path / "gone").on_start(start)
    assert "run.json can't be written: No such file or directory" in caplog.text
