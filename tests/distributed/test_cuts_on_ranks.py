"""Whole runs whose windows are cut otherwise, and otherwise again in the middle of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import updates
from launching import torchrun

TEXT = [
    "data=text",
    "data.max_length=64",
    "data.evaluation=null",
    "model=gpt",
    "model.width=16",
    "task=language_modeling",
    "batch.global_batch_size=32",
    "batch.micro_batch_size=4",
    "wandb.mode=disabled",
    "precision=fp64",
    "train.max_updates=18",
    "checkpoint.enabled=false",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def _run(ranks: int, run_dir: str, *overrides: str) -> None:
    done = torchrun(ranks, "-m", "distaccum.train", *TEXT, f"run_dir={run_dir}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cutting_by_length_changes_the_micro_steps_and_nothing_else() -> None:
    _run(1, "uniform", "strategy=single")
    # Costs are measured at updates 4 and 16, so the cut changes in the middle, beyond what workers have loaded ahead.
    _run(2, "by_length", "batch=by_length", "data.num_workers=1")
    _run(2, "sharded", "batch=by_length", "strategy=fsdp")
    wanted = updates(Path("uniform"))
    assert {line["micro_steps"] for line in wanted} == {8}
    for name in ("by_length", "sharded"):
        found = updates(Path(name))
        assert len({line["micro_steps"] for line in found}) > 1
        assert "costs of a micro-batch from update 16 on: CostModel(" in Path(name, "logs/rank0.log").read_text()
        for key in ("loss", "grad_norm", "weight", "samples"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in wanted], rel=1e-12), (
                name,
                key,
            )
