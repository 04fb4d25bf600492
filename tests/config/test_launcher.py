from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distaccum.config.launcher import Launch, launch
from distaccum.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _nobody_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _launch(monkeypatch: pytest.MonkeyPatch, settings: str) -> Launch:
    for setting in settings.split():
        monkeypatch.setenv(*setting.split("=", 1))
    return launch()


def test_a_rank_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _launch(monkeypatch, "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 SLURM_STEP_NUM_TASKS=2")
    assert found == Launch(is_launched=True, rank=5, world_size=8, local_rank=1, local_world_size=4)


@pytest.mark.parametrize("settings", ["", "SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=2", "SLURM_NTASKS=2 SLURM_PROCID=0"])
def test_a_process_alone_and_a_step_or_batch_script_of_one_task_are_no_ranks(
    monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    assert _launch(monkeypatch, settings) == Launch()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("RANK= WORLD_SIZE=2", "RANK='' in the environment is not a rank of WORLD_SIZE=2: "),
        ("RANK=x WORLD_SIZE=2", "RANK='x' in the environment is not a rank of WORLD_SIZE=2: "),
        ("RANK=-1 WORLD_SIZE=2", "RANK='-1' in the environment is not a rank of WORLD_SIZE=2: "),
        ("RANK=5 WORLD_SIZE=2", "RANK='5' in the environment is not a rank of WORLD_SIZE=2: "),
        ("RANK=0 WORLD_SIZE=", "WORLD_SIZE='' in the environment is not a whole number from 1 on: "),
        ("RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE='0' in the environment is not a whole number fr"),
        ("SLURM_STEP_NUM_TASKS=4", "srun has started 4 processes (SLURM_STEP_NUM_TASKS) without ranks: each would "),
        ("OMPI_COMM_WORLD_SIZE=2", "mpirun has started 2 processes (OMPI_COMM_WORLD_SIZE) without ranks: each would "),
    ],
)
def test_what_can_not_be_is_refused(monkeypatch: pytest.MonkeyPatch, settings: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        _launch(monkeypatch, settings)
    assert str(refused.value).startswith(said)


def test_the_command_line_ends_with_that_message_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": ""}
    done = subprocess.run(
        [sys.executable, "-m", "distaccum.train"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: WORLD_SIZE='' in the environment is not ")
    assert done.stderr.count("\n") == 1
