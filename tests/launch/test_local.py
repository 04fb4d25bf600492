from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import forking
import pytest
import torch
from command_line import TINY, updates
from launching import ROOT

SCRIPT = str(ROOT / "launch" / "local.sh")


def _start(cwd: Path, *overrides: str, cold: bool = False, **environment: str) -> subprocess.Popen[str]:
    # The Python that runs the tests is the one that `python` and `torchrun` mean, or what starts warm in its place.
    given = {name: value for name, value in os.environ.items() if name not in ("NUM_RANKS", "MAX_RESTARTS")}
    path = os.pathsep.join([str(Path(sys.executable if cold else forking.python()).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [SCRIPT, *overrides],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**given, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
    )


def test_a_run_with_overrides_has_a_rank_per_gpu_and_one_without(tmp_path: Path) -> None:
    run = _start(tmp_path, *TINY, "run_dir=out", "task.label_smoothing=0.25", cold=True)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, out + err
    assert len(list((tmp_path / "out" / "logs").iterdir())) == max(torch.cuda.device_count(), 1)
    assert len(updates(tmp_path / "out")) == 3
    assert "label_smoothing: 0.25" in (tmp_path / "out" / "config.yaml").read_text()


def test_a_refused_run_fails_with_its_message_said_once(tmp_path: Path) -> None:
    run = _start(tmp_path, *TINY, "train.epoch=3", NUM_RANKS="2")
    out, err = run.communicate(timeout=60)
    assert run.returncode != 0
    (message,) = re.findall("^error: (.+)", out + err, re.MULTILINE)
    assert message.startswith("there is no key train.epoch.")


@pytest.mark.alone
def test_ranks_are_started_again_when_one_is_killed(tmp_path: Path) -> None:
    settings = ["train.max_updates=60", "checkpoint.every_updates=10"]
    run = _start(tmp_path, *TINY, "data.num_samples=4096", *settings, "run_dir=out", NUM_RANKS="2", MAX_RESTARTS="1")
    lines = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_text().count("\n") >= 15):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(_a_rank(tmp_path), signal.SIGKILL)
    out, err = run.communicate(timeout=90)
    assert run.returncode == 0, out + err
    assert out.count("16 = 2 ranks") == 2, out + err
    assert [line["update"] for line in updates(tmp_path / "out")] == list(range(1, 61))


def _a_rank(cwd: Path) -> int:
    """The process number of a rank in a folder: see `forked_torchrun`."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if (process / "comm").read_text().startswith("rank") and (process / "cwd").samefile(cwd):
                return int(process.name)
    raise AssertionError("no rank is there")
