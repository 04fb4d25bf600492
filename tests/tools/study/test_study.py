from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
import yaml
from command_line import Ended, updates
from studies import learning
from studies import study as by_hand

from distaccum.config import as_plain
from distaccum.config.compose import compose
from distaccum.config.tools import StudyConfig
from distaccum.errors import UserError
from distaccum.study import main
from distaccum.tasks import Contrastive
from distaccum.tools.study.advice import command
from distaccum.tools.study.points import configuration, measures_noise, points_of

ROOT = Path(__file__).parent.parent.parent.parent
TINY = [
    "data=synthetic",
    "data.input_shape=[6]",
    "data.num_samples=256",
    "model=mlp",
    "model.hidden_sizes=[16]",
    "optim=sgd",
    "optim.lr=0.1",
    "batch.global_batch_size=32",
    "study.batch_sizes=[8,32]",
    "study.lr_rules=[linear]",
    "study.max_samples=1024",
    "study.evaluations=16",
    "run_dir=mine",
]
Study = Callable[..., Ended]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Study:
    """Runs `python -m distaccum.study` with the given arguments, in this process and in a new and empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["distaccum.study", *arguments])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Ended(status, *capfd.readouterr())

    return run


def composed(*overrides: str) -> StudyConfig:
    config = compose([*TINY, *overrides], "study")
    assert isinstance(config, StudyConfig)
    return config


def test_points_and_their_learning_rates() -> None:
    config = composed("study.batch_sizes=[128,8,32]", "study.lr_rules=[linear,sqrt,none]")
    points = points_of(config, 256)
    assert [(point.name, round(point.lr, 6)) for point in points] == [
        ("b00008-linear", 0.025),
        ("b00008-sqrt", 0.05),
        ("b00008-none", 0.1),
        ("b00032-base", 0.1),
        ("b00128-linear", 0.4),
        ("b00128-sqrt", 0.2),
        ("b00128-none", 0.1),
    ]
    derived = points_of(composed("study.batch_sizes=null", "batch.global_batch_size=64"), 250)
    assert [point.batch_size for point in derived] == [4, 16, 64], "256 is more than there are samples"


def test_what_counts_updates_takes_the_same_samples_at_each_batch_size() -> None:
    config = composed(
        "schedule=step", "schedule.warmup_updates=4", "schedule.every_updates=10", "study.max_samples=4096"
    )
    for size in (8, 32):
        point = next(point for point in points_of(config, 256) if point.batch_size == size)
        made: Any = configuration(point, config, 256, "there")
        assert made.batch.global_batch_size == size
        assert made.batch.drop_last
        assert made.train.max_updates * size == 4096
        assert made.train.eval_every * size == 256
        assert made.schedule.warmup_updates * size == 128
        assert made.schedule.every_updates * size == 320
        assert (made.optim.lr, made.run_dir) == (point.lr, "there")


def test_the_length_of_a_run_is_all_that_a_ratio_or_an_own_schedule_needs() -> None:
    for schedule in (
        ["schedule=wsd", "schedule.warmup_ratio=0.1"],
        ["schedule=custom", "schedule._target_=mine.schedule", "+schedule.warmup_updates=[4]"],
    ):
        config = composed(*schedule, "study.max_samples=4096")
        for point in points_of(config, 256):
            made = configuration(point, config, 256, "there")
            assert made.schedule == config.schedule
            assert made.train.max_updates == 4096 // point.batch_size


def test_learning_rates_of_groups_are_not_left_behind() -> None:
    groups = "optim.groups=[{match: [*.bias], weight_decay: 0},{match: [*.weight], lr: 0.01}]"
    with pytest.raises(UserError, match=r"optim\.groups\[1\] has an lr of its own \(0\.01\), which would stay"):
        points_of(composed(groups, "study.lr_rules=[sqrt]"), 256)
    assert points_of(composed(groups, "study.lr_rules=[none]"), 256)
    assert points_of(composed(groups.replace(",{match: [*.weight], lr: 0.01}", "")), 256)


def test_the_averages_of_the_weights_remember_the_same_samples_at_each_batch_size() -> None:
    config = composed(
        "study.max_samples=4096",
        *("train.ema.decay=0.9", "train.ema.first_update=8"),
        *("train.swa.first_update=64", "train.swa.every_updates=4"),
    )
    for size in (8, 32):
        point = next(point for point in points_of(config, 256) if point.batch_size == size)
        made = configuration(point, config, 256, "there").train
        assert made.ema.decay == pytest.approx(0.9 ** (size / 32))
        assert made.ema.first_update * size == 256
        assert made.swa.first_update is not None
        assert (made.swa.first_update * size, made.swa.every_updates * size) == (2048, 128)


def test_a_short_run_measures_the_noise_scale_often_enough_to_tell_it() -> None:
    config = composed("study.max_samples=4096")
    assert config.insight.every_updates == 64
    for size, every in ((8, 32), (32, 8)):
        point = next(point for point in points_of(config, 256) if point.batch_size == size)
        assert configuration(point, config, 256, "there", noise_scale=True).insight.every_updates == every


def test_the_noise_scale_is_measured_where_it_can_be_had() -> None:
    assert measures_noise(composed(), task=None)
    assert not measures_noise(composed("study.noise_scale=false"), task=None)
    assert not measures_noise(composed("optim=lbfgs"), task=None)
    by_length = compose(["experiment=text", "batch=by_length", "study.batch_sizes=[8,16]"], "study")
    assert isinstance(by_length, StudyConfig)
    assert not measures_noise(by_length, task=None)
    assert not measures_noise(composed(), task=Contrastive())
    for asked in (True, False):
        made = configuration(points_of(composed(), 256)[0], composed(), 256, "there", noise_scale=asked)
        assert made.insight.noise_scale is asked


def test_what_is_recommended_is_what_was_run() -> None:
    """Micro-batches no larger than the window, and a warm-up of as many samples."""
    overrides = ["batch.global_batch_size=32", "batch.micro_batch_size=16", "schedule=cosine"]
    overrides += ["schedule.warmup_updates=4", "study.ranks=2", "study.batch_sizes=[8,32]"]
    overrides += ["train.ema.decay=0.9", "train.swa.first_update=3", "train.swa.every_updates=2"]
    config = composed(*overrides)
    small, large = points_of(config, 256)[0], points_of(config, 256)[-1]
    made = by_hand(*((point, learning(point.batch_size, min_updates=50, critical=20)) for point in (small, large)))
    made.config = as_plain(config)
    for point, result in zip((small, large), made.results, strict=True):
        words = shlex.split(command(made, result, overrides))
        assert words[:4] == ["torchrun", "--nproc_per_node=2", "-m", "distaccum.train"]
        recommended, run = compose(words[4:]), configuration(point, config, 256, "there")
        assert recommended.batch.global_batch_size == run.batch.global_batch_size == point.batch_size
        assert recommended.batch.micro_batch_size == run.batch.micro_batch_size
        assert recommended.schedule == run.schedule
        assert recommended.train.swa == run.train.swa
        assert recommended.train.ema.decay == pytest.approx(run.train.ema.decay, rel=1e-5)
        assert recommended.train.ema.first_update == run.train.ema.first_update


def test_a_study_from_start_to_page_and_again(study: Study) -> None:
    ended = study(*TINY, "study.target=2.0")
    assert (ended.status, ended.err) == (0, "")
    assert "2 runs (batch sizes 8, 32), each of at most 1,024 samples; target of eval/loss: 2" in ended.out
    assert "the page with the charts: mine/study.html" in ended.out
    found = json.loads(Path("mine/study.json").read_text())
    assert [result["outcome"] for result in found["results"]] == ["reached", "reached"]
    for result, size in zip(found["results"], (8, 32), strict=True):
        assert result["reached"]["samples"] == pytest.approx(size * result["reached"]["updates"])
        folder = Path("mine/points") / result["name"]
        assert updates(folder)[-1]["samples"] == result["samples"]
        assert not (folder / "unfinished.json").exists()
        assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr"] == result["lr"]
    assert found["advice"][-1].startswith("Train with: python -m distaccum.train data=synthetic")
    assert "what batch size?" in Path("mine/study.html").read_text()
    assert Path("mine/study.svg").read_text().startswith("<svg")

    lines = {path: path.read_bytes() for path in Path("mine/points").glob("*/metrics.jsonl")}
    again = study(*TINY, "study.target=2.0")
    assert (again.status, again.err) == (0, "")
    assert "2 of them are finished already" in again.out
    assert {path: path.read_bytes() for path in Path("mine/points").glob("*/metrics.jsonl")} == lines

    # Another setting makes another study; another target does not.
    assert "optim.lr: 0.1 → 0.2" in study(*TINY, "study.target=2.0", "optim.lr=0.2").message
    easier = study(*TINY, "study.target=2.1")
    assert easier.status == 0
    assert json.loads(Path("mine/study.json").read_text())["target"] == 2.1


def _has_come_to(loss: float, metrics: Path) -> bool:
    """Whether a run that may be writing its file has had an evaluation with that loss."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return any("eval" in line and line["eval"]["loss"] <= loss for line in found)


def test_a_study_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """Ctrl-C in the first run: it saves, and the same command goes on from there."""
    overrides = [*TINY, "study.max_samples=200000", "study.batch_sizes=[8,16]", "study.evaluations=2500"]
    command = [forking.python(), "-m", "distaccum.study", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "mine" / "points" / "b00008-linear" / "metrics.jsonl"

    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as which the tests may run, has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 90
        while not _has_come_to(1.8, metrics):  # and so the mean over three evaluations to the target below, 2.0
            assert time.monotonic() < deadline, "it does not learn"
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
    assert (process.returncode, err) == (130, "")
    assert "stopped: 0 of 2 runs are finished, the one under way has saved" in out
    assert "run_dir=mine" in out
    done = updates(metrics.parent)[-1]["update"]
    assert 0 < done < 25_000
    assert list((metrics.parent / "checkpoints").glob("update-*"))
    assert "Not finished: 2 of 2 runs" in (tmp_path / "mine" / "study.html").read_text()

    # The first target that the run under way has passed: it is not run any further.
    finished = subprocess.run(
        [*command, "study.target=2.0"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "1 of them are finished already" in finished.stdout
    assert updates(metrics.parent)[-1]["update"] == done
    assert {path.name for path in (tmp_path / "mine" / "points").iterdir()} == {"b00008-linear", "b00016-linear"}


def test_points_by_separate_jobs_and_the_last_one_concludes(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    first = study(*TINY, "study.target=2.0", "study.point=0")
    assert (first.status, first.err) == (0, "")
    assert not Path("mine/study.html").exists()
    second = study(*TINY, "study.target=2.0", "study.point=1")
    assert (second.status, second.err) == (0, "")
    assert Path("mine/study.html").exists()
    assert len(json.loads(Path("mine/study.json").read_text())["results"]) == 2


def test_what_diverges_and_what_fails_is_a_row(study: Study) -> None:
    ended = study(*TINY, "study.batch_sizes=[32]", "optim.lr=1e30", "train.clip_norm=null", "study.metric=train/loss")
    assert ended.status == 0
    found = json.loads(Path("mine/study.json").read_text())
    assert [result["outcome"] for result in found["results"]] == ["diverged"]
    assert "the loss is" in found["results"][0]["reason"]
    assert "No run reached any value of it" in ended.out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["study.batch_sizes=[8,512]"], "512 is more than the 256 samples"),
        (["study.batch_sizes=[]"], "study.batch_sizes is empty"),
        (["study.metric=loss"], "study.metric=loss is unknown: it must be train/loss"),
        (["study.metric=eval/f1"], "the evaluations have no such metric. They have eval/accuracy, eval/loss"),
        (["data.evaluation=null", "study.metric=eval/loss"], "needs evaluations, and data.evaluation is null"),
        (["batch.global_batch_size=null"], "study needs the size of a window"),
        (["batch.accumulation_steps=2"], "the micro-batch would grow with them"),
        (["study.point=2"], "study.point=2 is impossible: this study has 2 points, 0 to 1"),
        (["study.point=0", "run_dir=null"], "name its folder with run_dir="),
        (["study.rule=linear"], "there is no key study.rule"),
        (["batch.micro_batch_size=auto"], "study needs a given size of micro-batches"),
        (["train.early_stopping.metric=loss"], "train.early_stopping.metric=loss would end its runs before"),
        (["optim.lr=-1", "study.lr_rules=[none]"], "no run of the study could be made. Of 8"),
        (["study.lr_rules=[cubic]"], "cubic"),
    ],
)
def test_bad_input_ends_with_one_message(study: Study, overrides: list[str], said: str) -> None:
    assert said in study(*TINY, "study.max_samples=64", "study.evaluations=2", *overrides).message


def test_an_array_of_another_size_is_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "5")
    said = "a study of 2 points needs sbatch --array=0-1, and the array has 5 jobs"
    assert said in study(*TINY, "study.point=0").message


def test_a_run_is_no_study(study: Study) -> None:
    Path("mine").mkdir()
    Path("mine/metrics.jsonl").touch()
    assert "holds a run, and a study needs a folder of its own" in study(*TINY).message


def test_null_metric_follows_from_the_data() -> None:
    assert composed().study.metric == "eval/loss"
    assert composed("data.evaluation=null").study.metric == "train/loss"
    with pytest.raises(UserError, match=r"study\.smoothing=0"):
        composed("study.smoothing=0")
