"""Whole runs whose windows are cut otherwise, and otherwise again in the middle of the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from command_line import updates
from launching import forked

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
    done = forked(ranks, "-m", "distaccum.train", *TEXT, f"run_dir={run_dir}", *overrides)
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
        assert "costs of a micro-batch from update 16 on: CostModel(" in _log(name)
        for key in ("loss", "grad_norm", "weight", "samples"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in wanted], rel=1e-12), (
                name,
                key,
            )


SLOW_TASK = ["task=custom", "task._target_=slow_rank.SlowOnRank1", "data.num_workers=1"]
SLOW_BLOCKS = ["model._target_=slow_rank.SlowBlocksOnRank1", "strategy=fsdp"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The updates of one process."""
    folder = tmp_path_factory.mktemp("alone")
    _run(1, str(folder), "strategy=single", "train.max_updates=24")
    return updates(folder)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("cut", "slow"),
    [
        pytest.param("uniform", SLOW_TASK, id="uniform"),
        pytest.param("by_length", SLOW_TASK, id="by_length"),
        # All ranks take equally many micro-steps here.
        pytest.param("uniform", [*SLOW_TASK, "strategy=ddp", "strategy.static_graph=true"], id="static_graph"),
        pytest.param("uniform", SLOW_BLOCKS, id="fsdp"),
        pytest.param("by_length", SLOW_BLOCKS, id="fsdp-by_length"),
    ],
)
def test_a_slow_rank_gets_less_and_the_update_is_the_same(
    alone: list[dict[str, Any]], cut: str, slow: list[str]
) -> None:
    _run(2, "balanced", f"batch={cut}", "batch.balance=speed", *slow, "train.max_updates=24")
    found = updates(Path("balanced"))
    for key in ("loss", "grad_norm", "weight", "samples"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in alone], rel=1e-12), key
    said = re.findall(r"update \d+: shares of the ranks by their speed: ([\d.]+)%, ([\d.]+)%", _log("balanced"))
    assert said, "the shares were changed while the run went on"
    first, second = map(float, said[-1])
    # The ideal is 3, but for what a micro-step costs besides its tokens.
    assert 1.7 < first / second < 4


def _log(run_dir: str) -> str:
    return Path(run_dir, "logs/rank0.log").read_text()
