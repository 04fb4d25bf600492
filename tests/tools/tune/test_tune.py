"""Whole tunings, with real ranks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import forking
import pytest
from command_line import updates
from launching import ROOT, torchrun

SMALL = ["data=synthetic", "data.input_shape=[4]", "data.num_samples=512", "model=mlp", "model.hidden_sizes=[32]"]
SMALL += ["batch.global_batch_size=128", "batch.micro_batch_size=2", "wandb.mode=disabled"]
QUICK = ["tune.rounds=2", "tune.confirm_rounds=3", "tune.round_seconds=0.1"]


def tune(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [forking.python(), "-m", "distaccum.tune", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.alone
def test_a_tuning_of_two_ranks(tmp_path: Path) -> None:
    # Micro-steps of 2 samples: there is something to gain, whatever else the machine does.
    written = "tune.write=mine/experiment/tuned.yaml"
    extent = ["tune.world_size=2", "tune.minutes=0.1", "tune.compressions=[bf16]", "tune.link_mbits=[1,100]"]
    done = tune(tmp_path, *SMALL, *QUICK, *extent, written, "run_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "tune.json").read_text())
    assert report["rows"][0]["title"] == "as configured"
    tried = [row for row in report["rows"] if row["ratio"] is not None]
    assert tried
    assert any(row["is_taken"] for row in tried)
    assert all(row["memory"] > 2**26 for row in tried)
    assert report["confirmation"]["is_faster"]
    assert report["confirmation"]["ratio"] < 1
    (micro_batch,) = (word for word in report["suggestion"] if word.startswith("batch.micro_batch_size="))
    assert int(micro_batch.partition("=")[2]) > 2
    assert report["train_command"] in done.stdout
    # The prediction: alone, no link matters; over a slow one, the gradients of a window take their time.
    forecast = report["forecast"]
    one, two = (next(p for p in forecast["predictions"] if p["world_size"] == n and p["is_own_window"]) for n in (1, 2))
    assert one["seconds"]["here"] == one["seconds"]["100 Mbit/s"]
    slower = two["seconds"]["1 Mbit/s"] - two["seconds"]["100 Mbit/s"]
    assert slower > 0.5 * forecast["sync_bytes"] * (1 / 0.125e6 - 1 / 12.5e6)
    assert forecast["sync_bytes"] == 4 * (4 * 32 + 32 + 32 * 10 + 10)
    # What is suggested is a training like any other.
    words = [*SMALL[:-2], "batch.global_batch_size=128", "wandb.mode=disabled", "train.max_updates=2"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = torchrun(
        *(2, "-m", "distaccum.train", "--config-dir", str(tmp_path / "mine"), *words),
        *("experiment=tuned", f"run_dir={tmp_path / 'trained'}"),
        **environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(updates(tmp_path / "trained")) == 2
    again = tune(tmp_path, *SMALL, *QUICK, written)
    assert again.returncode == 2
    assert "mine/experiment/tuned.yaml exists already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "starts its own ranks"),
        (["strategy=ddp", "device=cpu"], {}, "strategy=ddp needs ranks, and tune.world_size is 1 here"),
        (["task._target_=nowhere.Task", "device=cpu"], {}, "so it can't be tuned: task._target_=nowhere.Task"),
    ],
)
def test_what_cannot_be_tuned_is_one_message(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    done = tune(tmp_path, *SMALL, *arguments, **environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
