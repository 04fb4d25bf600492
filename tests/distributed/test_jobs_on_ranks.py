"""The shipped jobs on two ranks: each trains to a figure. What the check says of them: checking/test_jobs.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import evaluations
from launching import torchrun


def _trained(tmp_path: Path, *overrides: str) -> list[dict[str, Any]]:
    run_dir = tmp_path / "run"
    done = torchrun(2, "-m", "distaccum.train", "wandb.mode=disabled", "device=cpu", f"run_dir={run_dir}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line["eval"] for line in evaluations(run_dir)]


def test_segmentation_learns_coins(tmp_path: Path) -> None:
    """Held-out mean IoU; one threshold for the whole image (Otsu's) comes to 0.75 there."""
    (*_, last) = _trained(tmp_path, "experiment=segmentation", "train.epochs=4")
    assert last["mean_iou"] > 0.9, last


def test_contrastive_learning_learns_digits(tmp_path: Path) -> None:
    """Without a label: how often the other view is found (0.17 at first), and the digit of the nearest other sample."""
    found = _trained(tmp_path, "experiment=contrastive", "batch.micro_batch_size=64")
    assert found[-1]["retrieval"] > 0.3, found
    assert found[-1]["neighbour_accuracy"] > 0.75, found


def test_the_check_of_the_coupled_one_passes() -> None:
    small = ["check.samples=6", "check.windows=1", "model.channels=[8]"]
    done = torchrun(2, "-m", "distaccum.check", "experiment=contrastive", "device=cpu", "--json", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    rows = [row for row in found["rows"] if row["ranks"] == 2 and row["precision"] == "float64"]
    assert len(rows) >= 2
    assert all(row["equal"] and row["worst_error"] < 1e-12 and row["sync_calls"] == 1 for row in rows)
