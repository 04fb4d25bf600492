"""Each benchmark runs, quickly, and what it says of exactness holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from launching import ROOT


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--quick", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "150"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exactness() -> None:
    assert "distaccum" in _run("exactness.py")
    rows = json.loads(Path(ROOT, "benchmarks/results/exactness.json").read_text())["rows"]
    for row in rows:
        assert (row["relative error of the update"] < 1e-12) == (row["method"] == "distaccum")


def test_sync() -> None:
    assert "ratio" in _run("sync.py")


def test_checkpoint() -> None:
    shown = _run("checkpoint.py")
    assert all(way in shown for way in ("copy in memory", "asynchronous", "synchronous", "torch.save"))


def test_unequal_ranks() -> None:
    assert "of the ideal" in _run("unequal_ranks.py")
