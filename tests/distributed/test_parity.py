"""Whole runs: the same losses, gradient norms, evaluations and parameters for every placement and cut.

A small GPT on paragraphs of unequal length, float64, AdamW, clipping, eight updates with a ragged last window.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import distance
from launching import HERE, forked

SETTINGS = [
    "experiment=text",
    "precision=fp64",
    "data.train._target_=examples.FewTexts",
    "+data.train.num_samples=401",
    "data.evaluation._target_=examples.FewTexts",
    "+data.evaluation.num_samples=45",
    "data.max_length=48",
    "model.num_layers=1",
    "model.width=16",
    "model.num_heads=2",
    "batch.global_batch_size=95",
    "train.epochs=2",
    "train.max_updates=8",
    "train.clip_norm=0.5",
    "schedule.warmup_updates=2",
    "wandb.mode=disabled",
    "device=cpu",
]

Run = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def recorded(world_size: int, *overrides: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        command = [str(HERE / "record_run.py"), str(folder / "out.pt"), *SETTINGS, f"run_dir={folder / 'run'}"]
        command += overrides
        done = forked(world_size, *command, launched=world_size > 1)
        assert done.returncode == 0, done.stdout + done.stderr
        return _read(folder)

    return recorded


def _read(folder: Path) -> Run:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "eval" not in line]
    return {
        "parameters": torch.load(folder / "out.pt"),
        "evaluations": [[line["eval"]["loss"], line["eval"]["accuracy"]] for line in lines if "eval" in line],
        **{key: [line[key] for line in updates] for key in ("loss", "grad_norm", "weight", "samples", "sync_calls")},
        "sync_bytes": [line["sync_bytes"] for line in updates],
        "accuracy": [line["metrics"].get("accuracy") for line in updates],
        "micro_steps": [line["micro_steps"] for line in updates],
    }


@pytest.fixture(scope="module")
def one_shot(run: Any) -> Run:
    """One process, the whole window in one micro-batch."""
    found: Run = run(1, "batch.micro_batch_size=95")
    assert set(found["micro_steps"]) == {1}
    assert len(found["loss"]) == 8
    sizes = {b - a for a, b in zip(found["samples"], found["samples"][1:], strict=False)}
    assert len(sizes) == 2, "one window of the epoch must be ragged"
    assert max(found["grad_norm"]) > 0.5, "clipping must act"
    return found


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, ()),
        (3, ()),
        (4, ()),
        (2, ("strategy=ddp", "strategy.shard_optimizer=true")),
        (2, ("strategy=fsdp",)),
        (4, ("strategy=fsdp", "strategy.reshard_in_window=false")),
        (3, ("strategy=fsdp", "strategy.accumulate=sharded")),
        (4, ("strategy=fsdp", "strategy.accumulate=node", "strategy.shard_size=2", "batch.balance=speed")),
    ],
)
def test_every_placement_makes_the_same_run(
    run: Any, one_shot: Run, world_size: int, overrides: tuple[str, ...]
) -> None:
    found = run(world_size, "batch.micro_batch_size=9", *overrides)
    assert max(found["micro_steps"]) > 1
    for key in ("loss", "grad_norm", "evaluations", "parameters", "accuracy"):
        assert distance(found[key], one_shot[key]) < 1e-12, key
    assert found["weight"] == one_shot["weight"]
    assert found["samples"] == one_shot["samples"]


def test_dividing_by_the_number_of_micro_steps_misses(run: Any) -> None:
    """The negative control: the same comparison notices what tutorials do, and passes without it."""
    small = (
        "data.evaluation=null",
        "data.train.num_samples=8000",
        "data.max_length=256",
        "batch.global_batch_size=16",
        "optim.lr=0.02",
    )
    wanted = run(1, *small, "batch.micro_batch_size=16")
    exact = run(2, *small, "batch.micro_batch_size=2")
    wrong = run(2, *small, "batch.micro_batch_size=2", "task=custom", "task._target_=examples.DividedByK")
    # Bytes of English are much alike, so the loss of a few updates shows least of it.
    for key, missed_by in (("loss", 1e-3), ("grad_norm", 1e-2), ("parameters", 1e-2)):
        assert distance(exact[key], wanted[key]) < 1e-12, key
        assert distance(wrong[key], wanted[key]) > missed_by, (key, distance(wrong[key], wanted[key]))


def test_one_sync_per_update(run: Any, one_shot: Run) -> None:
    assert set(one_shot["sync_calls"]) == {0}
    for world_size in (2, 4):
        found = run(world_size, "batch.micro_batch_size=9")
        assert set(found["sync_calls"]) == {1}
        assert set(found["sync_bytes"]) == {one_shot["parameters"].nbytes}
