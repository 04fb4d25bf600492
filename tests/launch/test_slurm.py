"""The batch scripts under a real SLURM: two emulated nodes on this machine, see `slurm_lab`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forking
import pytest
import yaml
from command_line import TINY, evaluations, files_below, updates
from launching import ROOT
from slurm_lab import SlurmLab

SLURM = ROOT / "launch" / "slurm"
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "0"}
DIGITS = ["train.epochs=15", "model.dropout=0.1", "wandb.mode=disabled"]
"""A run of 90 updates that takes long enough to be interrupted, and whose losses depend on the random state too."""


def submit(
    lab: SlurmLab, script: str, *overrides: str, cwd: Path, options: tuple[str, ...] = (), cold: bool = False
) -> str:
    """Submits a script of `launch/slurm`.

    Args:
        cold: with ranks that SLURM itself sends its signals to. Otherwise `python` and `torchrun` are those that start
            warm, whose processes are no descendants of the job's.
    """
    environment = dict(ENVIRONMENT)
    if not cold:
        environment["PATH"] = os.pathsep.join([str(Path(forking.python()).parent), lab.environment["PATH"]])
    return lab.submit(SLURM / script, *overrides, options=options, cwd=cwd, **environment)


def losses(run_dir: Path) -> dict[int, Any]:
    lines = updates(run_dir)
    assert [line["update"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["update"]: (line["loss"], line["grad_norm"], line["samples"]) for line in lines}


def test_two_nodes_of_two_ranks_learn_the_digits(lab: SlurmLab, tmp_path: Path) -> None:
    job = submit(lab, "multi_node.sbatch", "train.epochs=12", "wandb.mode=disabled", cwd=tmp_path)
    ended = lab.wait(job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.log
    run_dir = tmp_path / "runs" / f"slurm-{job}"
    assert {name for name in files_below(run_dir) if name.startswith("logs/")} == {
        f"logs/rank{r}.log" for r in range(4)
    }
    assert "256 = 4 ranks × 4 micro-steps × 16" in ended.log
    assert len(updates(run_dir)) == 72
    assert evaluations(run_dir)[-1]["eval"]["accuracy"] > 0.95


@pytest.mark.parametrize("script", ["single_node.sbatch", "multi_node.sbatch", "requeue.sbatch"])
def test_a_job_that_fails_says_why_in_its_last_line(lab: SlurmLab, tmp_path: Path, script: str) -> None:
    options = ("--ntasks-per-node=1",)
    ended = lab.wait(submit(lab, script, *TINY, "optim.lr=-1", cwd=tmp_path, options=options))
    assert ended.state == "FAILED", ended.log
    assert ended.exit_code != 0
    assert ended.last_line.startswith("error: "), ended.log
    assert "learning rate: -1" in ended.last_line
    # It is what the run said itself, further up.
    assert ended.log.count(ended.last_line + "\n") == 2, ended.log


def test_a_sweep_has_a_folder_for_each_point(lab: SlurmLab, tmp_path: Path) -> None:
    sweep = ["optim.lr=1e-3,2e-3", "model.hidden_sizes=[8],[16,4]", "wandb.tags=[a,b]"]
    points = [
        (rate, sizes) for rate in (1e-3, 2e-3) for sizes in ([8], [16, 4])
    ]  # the order of Hydra's own sweeper: the last key changes fastest
    rest = [setting for setting in TINY if not setting.startswith("model.hidden_sizes")]
    array = submit(lab, "sweep.sbatch", *sweep, *rest, cwd=tmp_path, options=("--array=0-3",))
    for index, (rate, sizes) in enumerate(points):
        ended = lab.wait(f"{array}_{index}")
        assert ended.state == "COMPLETED", ended.log
        run_dir = tmp_path / "runs" / f"slurm-{array}_{index}"
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert (config["optim"]["lr"], config["model"]["hidden_sizes"]) == (rate, sizes)
        assert config["wandb"]["tags"] == ["a", "b"]
        assert len(updates(run_dir)) == 3
    assert len(list((tmp_path / "runs").iterdir())) == len(points)


@pytest.mark.parametrize("array", ["0-1", "0-3", "1-3"])
def test_a_sweep_with_an_array_of_another_size_is_refused(lab: SlurmLab, tmp_path: Path, array: str) -> None:
    sweep = ["optim.lr=1e-3,2e-3,4e-3", "run_dir=results"]
    job = submit(lab, "sweep.sbatch", *sweep, cwd=tmp_path, options=(f"--array={array}",))
    ended = lab.wait(f"{job}_1")
    assert (ended.state, ended.exit_code) == ("FAILED", 2), ended.log
    first, last = array.split("-")
    assert ended.log == (
        "error: a sweep of 3 points needs sbatch --array=0-2, and the array has "
        f"{int(last) - int(first) + 1} jobs, from {first} to {last}.\n"
    )
    assert not files_below(tmp_path) & {"results", "runs"}


@pytest.mark.alone
def test_a_run_that_is_interrupted_twice_goes_on_as_if_it_never_was(lab: SlurmLab, tmp_path: Path) -> None:
    """Once as before a time limit, once by a job that takes its nodes."""
    options = ("--nodes=2", "--ntasks-per-node=1")
    job = submit(lab, "requeue.sbatch", *DIGITS, cwd=tmp_path, options=options, cold=True)
    run_dir = tmp_path / "runs" / f"slurm-{job}"

    def number_of_updates() -> int:
        return len(updates(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0

    lab.wait_until(lambda: number_of_updates() >= 10, job)
    lab.signal_script(job, "USR1")
    lab.wait_for_requeue(job, restarts=1)
    first = number_of_updates()
    lab.wait_until(lambda: number_of_updates() >= first + 10, job)
    urgent = lab.preempt(tmp_path)
    lab.wait_for_requeue(job, restarts=2)
    assert lab.wait(urgent).state == "COMPLETED"
    assert first + 10 <= number_of_updates() < 90
    ended = lab.wait(job)
    assert ended.state == "COMPLETED", ended.log
    assert not (run_dir / "unfinished.json").exists()
    assert ended.log.count("not finished: ") == 2, ended.log

    undisturbed = submit(lab, "single_node.sbatch", *DIGITS, cwd=tmp_path, options=("--ntasks-per-node=2",))
    assert lab.wait(undisturbed).state == "COMPLETED"
    expected = losses(tmp_path / "runs" / f"slurm-{undisturbed}")
    assert len(expected) == 90
    assert losses(run_dir) == expected
    assert evaluations(run_dir) == evaluations(tmp_path / "runs" / f"slurm-{undisturbed}")


def test_a_cancelled_job_does_not_come_back(lab: SlurmLab, tmp_path: Path) -> None:
    job = submit(lab, "requeue.sbatch", *DIGITS, cwd=tmp_path, options=("--ntasks-per-node=1",), cold=True)
    run_dir = tmp_path / "runs" / f"slurm-{job}"
    lab.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(updates(run_dir)) >= 2, job)
    lab.cancel(job)
    ended = lab.wait(job)
    assert ended.state == "CANCELLED", ended.log
    assert (run_dir / "unfinished.json").exists()
    assert "goes back into the queue" not in ended.log


def test_a_study_as_an_array_concludes_with_its_last_job(lab: SlurmLab, tmp_path: Path) -> None:
    settings = [
        "data=synthetic",
        "data.input_shape=[6]",
        "data.num_samples=256",
        "model=mlp",
        "optim=sgd",
        "optim.lr=0.1",
    ]
    settings += ["batch.global_batch_size=32", "study.batch_sizes=[8,32]", "study.lr_rules=[linear]"]
    settings += ["study.max_samples=512", "study.evaluations=8", "run_dir=mine"]
    array = submit(lab, "study.sbatch", *settings, cwd=tmp_path, options=("--array=0-1%1",))
    for index in range(2):
        ended = lab.wait(f"{array}_{index}")
        assert ended.state == "COMPLETED", ended.log
    found = json.loads((tmp_path / "mine" / "study.json").read_text())
    assert [result["outcome"] for result in found["results"]] == ["reached", "reached"]
    assert "what batch size?" in (tmp_path / "mine" / "study.html").read_text()

    wrong = submit(lab, "study.sbatch", *settings, cwd=tmp_path, options=("--array=0-2",))
    ended = lab.wait(f"{wrong}_0")
    assert ended.state == "FAILED"
    assert "a study of 2 points needs sbatch --array=0-1, and the array has 3 jobs" in ended.log
