"""A training in which all is random that can be, and what is compared of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import without_measurements
from zygote import Zygote

from distaccum.checkpoints import MODEL_FILE

RUN = [
    "data=custom",
    "data.train._target_=victims.Points",
    "+data.train.num_samples=400",
    "+data.evaluation._target_=victims.Points",
    "+data.evaluation.num_samples=20",
    "data.num_workers=2",
    "model=custom",
    "model._target_=victims.Net",
    "+model.seconds=0.002",
    "batch.global_batch_size=24",
    "batch.micro_batch_size=6",
    "train.epochs=null",
    "train.eval_every=4",
    "checkpoint.every_updates=3",
    "run_dir=run",
    "wandb.mode=disabled",
]
"""Dropout, random samples from workers, 17 windows an epoch of which the last is smaller, everything in mid-epoch."""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's `metrics.jsonl`, which may be being written, without what is measured."""
    path = folder / "run" / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [without_measurements(line) for line in lines]


def results(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """A finished run's weights and numbers."""
    return (folder / "run" / MODEL_FILE).read_bytes(), lines_of(folder)


def undisturbed(processes: Zygote, folder: Path, *settings: str, ranks: int) -> tuple[bytes, list[dict[str, Any]]]:
    """What a run comes to that nobody kills."""
    folder.mkdir()
    start = processes.start(*settings, ranks=ranks, folder=folder)
    assert start.statuses == [0] * ranks, start.output
    return results(folder)


def assert_each_update_once(lines: list[dict[str, Any]], updates: int, eval_every: int = 4) -> None:
    """Lines come in order, and none is missing or there twice."""
    wanted = []
    for update in range(1, updates + 1):
        wanted.append((update, False))
        if update % eval_every == 0 or update == updates:
            wanted.append((update, True))
    assert [(line["update"], "eval" in line) for line in lines] == wanted
