"""Whole runs of `python -m distaccum.train` in one process; tests/distributed has those of several ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trackers_reading
from command_line import TESTS, TINY, Ended, evaluations, files_below, start, updates
from PIL import Image

Train = Callable[..., Ended]

MINE = ["wandb.mode=disabled", "batch.global_batch_size=16", "train.max_updates=3", "run_dir=run"]
POINTS = [
    *MINE,
    "data=custom",
    "data.train._target_=user_project.Points",
    "+data.train.num_points=64",
    "model=custom",
    "model._target_=user_project.Line",
    "task=custom",
    "task._target_=user_project.SquaredDistance",
]
"""A run of somebody's own data, model and task; 4 updates an epoch."""


FILES = {
    "config.yaml",
    "metrics.jsonl",
    "run.json",
    "logs/rank0.log",
    "run.lock",
    "model.safetensors",
    "checkpoints/update-00000003/manifest.json",
    "checkpoints/update-00000003/rank-00000.safetensors",
}
"""What a run of 3 updates in one process leaves."""


def _write_images(folder: Path, per_class: int = 4) -> None:
    for label in ("cats", "dogs"):
        (folder / label).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / label / f"{number}.png")


IMAGES = [*MINE, "data=image_folder", "data.root=images", "data.image_size=8", "model=mlp", "batch.global_batch_size=4"]


BROKEN = [*POINTS, "data.train._target_=user_project.BrokenAt", "+data.train.index=37", "train.max_updates=4"]
BROKEN_MESSAGE = "sample 37 of the training data could not be loaded: RuntimeError: broken on purpose"


# Runs that go well


def test_a_run_leaves_its_folder_and_nothing_else(train: Train, tmp_path: Path) -> None:
    ended = train(*TINY)
    assert (ended.status, ended.err) == (0, "")
    (run_dir,) = Path("runs").iterdir()
    assert files_below(tmp_path) == {f"{run_dir}/{name}" for name in FILES}
    assert "window 16 = 1 rank × 1 micro-step × 16; no sync needed; 4 windows an epoch" in ended.out
    assert str(run_dir) in ended.out


def test_metrics_have_one_line_for_each_update_and_evaluation(train: Train) -> None:
    assert train(*TINY, "run_dir=run", "train.max_updates=6", "batch.micro_batch_size=4").status == 0
    first, *_ = lines = updates(Path("run"))
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 0, 1, 1]
    assert [line["samples"] for line in lines] == [16, 32, 48, 64, 80, 96]
    assert {
        "update",
        "epoch",
        "samples",
        "loss",
        "grad_norm",
        "lr",
        "micro_steps",
        "weight",
        "update_seconds",
        "samples_per_second",
        "sync_calls",
        "sync_bytes",
    } <= set(first)
    assert (first["micro_steps"], first["weight"], first["sync_calls"], first["sync_bytes"]) == (4, 16, 0, 0)
    assert [line["update"] for line in lines if "peak_memory_bytes" in line] == [1, 2, 4]
    assert first["peak_memory_bytes"] > 2**20
    found = evaluations(Path("run"))
    assert [line["update"] for line in found] == [4, 6], "at the end of each epoch and of the run"
    assert all(set(line["eval"]) == {"loss", "accuracy"} for line in found)
    assert not any("terms" in line for line in lines)


def test_a_task_of_two_losses(train: Train) -> None:
    """With micro-batches of a size that is found, weight averages and evaluations."""
    ended = train(
        *POINTS,
        "task._target_=user_project.TwoLosses",
        "data.evaluation={_target_:user_project.Points,num_points:10}",
        "batch.micro_batch_size=auto",
        "train.ema.decay=0.5",
    )
    assert (ended.status, ended.err) == (0, "")
    for line in updates(Path("run")):
        assert list(line["terms"]) == ["main", "positive"]
        assert line["loss"] == pytest.approx(line["terms"]["main"] + 0.5 * line["terms"]["positive"], rel=1e-6)
    (found,) = [line["eval"] for line in evaluations(Path("run"))]
    assert {"loss", "loss/main", "loss/positive", "ema/loss", "ema/loss/positive"} <= set(found)
    assert found["loss"] == pytest.approx(found["loss/main"] + 0.5 * found["loss/positive"], rel=1e-6)
    assert "positive 0." in ended.out


@pytest.mark.parametrize(
    ("overrides", "last_update", "evaluated"),
    [
        (["train.max_updates=null", "train.epochs=2"], 8, [4, 8]),
        (["train.max_updates=5", "train.epochs=null"], 5, [4, 5]),
        (["train.max_updates=5", "train.epochs=1"], 4, [4]),
        (["train.max_updates=5", "train.eval_every=2"], 5, [2, 4, 5]),
        (["train.max_updates=3", "train.eval_every=100"], 3, [3]),
        (["train.max_updates=5", "data.evaluation=null"], 5, []),
    ],
)
def test_the_run_is_as_long_and_evaluated_as_often_as_asked(
    train: Train, overrides: list[str], last_update: int, evaluated: list[int]
) -> None:
    assert train(*TINY, "run_dir=run", *overrides).status == 0
    assert [line["update"] for line in updates(Path("run"))] == list(range(1, last_update + 1))
    assert [line["update"] for line in evaluations(Path("run"))] == evaluated


NOISE = [*TINY, "insight.noise_scale=true", "insight.every_updates=2", "batch.micro_batch_size=4"]


def test_the_noise_scale_is_measured_and_goes_on_after_a_restart(train: Train) -> None:
    for run_dir, limit in (("whole", 8), ("cut", 3), ("cut", 8)):
        assert train(*NOISE, "schedule=constant", f"run_dir={run_dir}", f"train.max_updates={limit}").status == 0
    names = ("noise_scale", "noise_scale_error", "coherence")
    whole, cut = ([[line.get(name) for name in names] for line in updates(Path(run))] for run in ("whole", "cut"))
    assert cut == whole
    assert [number for number, line in enumerate(whole, 1) if line[2] is not None] == [2, 4, 6, 8]
    assert any(line[0] for line in whole)


def test_a_run_of_one_micro_batch_a_window_is_measured_and_says_how(train: Train) -> None:
    ended = train(*NOISE, "batch.micro_batch_size=16", "run_dir=run", "train.max_updates=4")
    assert ended.status == 0
    lines = updates(Path("run"))
    assert [line["micro_steps"] for line in lines] == [1, 2, 1, 2]
    assert ["coherence" in line for line in lines] == [False, True, False, True]


def test_what_the_noise_scale_cannot_be_had_with_is_refused(train: Train) -> None:
    assert "batch=by_length" in train(*NOISE, "batch=by_length", "run_dir=run").message
    ddp = ("strategy=ddp", "strategy.compression=powersgd")
    assert "powersgd" in train(*NOISE, *ddp, "run_dir=run").message


LBFGS = [*TINY, "optim=lbfgs", "train.clip_norm=null", "batch.global_batch_size=64", "schedule=constant"]
"""Each window is the whole of the data."""


def test_lbfgs_trains_and_goes_on_after_a_restart(train: Train) -> None:
    layers_ = ["insight.layers=true", "insight.every_updates=2", "batch.micro_batch_size=16"]
    for run_dir, limit in (("whole", 4), ("cut", 2), ("cut", 4)):
        assert train(*LBFGS, *layers_, f"run_dir={run_dir}", f"train.max_updates={limit}").status == 0
    numbers = ("loss", "evaluations", "layers", "micro_steps", "sync_calls")
    whole, cut = ([[line.get(name) for name in numbers] for line in updates(Path(run))] for run in ("whole", "cut"))
    assert cut == whole
    losses, evaluations_, layers, micro_steps, _ = zip(*whole, strict=True)
    assert losses[-1] < losses[0] / 10
    assert min(evaluations_) > 1
    assert set(micro_steps) == {4}
    assert [entry is not None for entry in layers] == [False, True, False, True]
    assert all(norms["grad_norm"] > 0 and norms["update_ratio"] > 0 for norms in layers[1].values())
    assert len(layers[1]) > 1


def test_other_optimizers_say_nothing_of_evaluations_and_layers(train: Train) -> None:
    assert train(*TINY, "run_dir=run").status == 0
    assert not {"evaluations", "layers"} & set().union(*updates(Path("run")))


def test_what_lbfgs_cannot_be_had_with_is_refused(train: Train) -> None:
    assert "train.clip_norm=null" in train(*LBFGS, "train.clip_norm=1", "run_dir=run").message
    assert "batch.micro_batch_size=auto" in train(*LBFGS, "batch.micro_batch_size=auto", "run_dir=run").message
    assert "must be strong_wolfe or null" in train(*LBFGS, "optim.line_search_fn=wolfe", "run_dir=run").message
    assert "LBFGS searches for the length of its step" in train(*LBFGS, "optim.lr=0", "run_dir=run").message


def test_early_stopping_stops(train: Train) -> None:
    stopping = ["train.early_stopping.metric=loss", "train.early_stopping.patience=2", "train.eval_every=1"]
    ended = train(*TINY, "run_dir=run", "train.max_updates=50", "optim.lr=0", *stopping)
    assert ended.status == 0
    # Nothing is learned: the first evaluation is the best, and two more are no better.
    assert [line["update"] for line in evaluations(Path("run"))] == [1, 2, 3]
    assert len(updates(Path("run"))) == 3
    assert "3 of 50 updates" in ended.out
    assert re.search(r"stopped early +loss has not improved on [\d.]+ for 2 evaluations", ended.out)


def test_the_same_command_gives_the_same_numbers(train: Train) -> None:
    def numbers(run_dir: str) -> list[tuple[float, float]]:
        assert train(*TINY, f"run_dir={run_dir}", "model.dropout=0.5").status == 0
        return [(line["loss"], line["grad_norm"]) for line in updates(Path(run_dir))]

    assert numbers("one") == numbers("two")


def test_a_project_of_ones_own(train: Train) -> None:
    """Model, data, task, optimizer and observer, none of which the package knows."""
    ended = train(
        *POINTS,
        "data.evaluation={_target_:user_project.Points,num_points:10}",
        "train.eval_every=10",
        "optim=custom",
        "optim._target_=user_project.SignDescent",
        "optim.lr=0.25",
        "schedule=constant",
        "+observers.recorder._target_=user_project.Recorder",
        "+observers.recorder.path=told.json",
        "+model.bias=false",
        "train.max_updates=6",
    )
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(Path("told.json").read_text()) == [
        ["start", 6],
        *(["update", number] for number in range(1, 7)),
        ["evaluation", 6, ["absolute_error", "loss"]],
        ["end", 6],
    ]
    lines = updates(Path("run"))
    assert [line["lr"] for line in lines] == [0.25] * 6
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert set(lines[0]["metrics"]) == {"absolute_error"}


def test_trackers_by_name_have_a_run_that_went_on(train: Train) -> None:
    """As `metrics.jsonl` has it."""
    for limit in (2, 3):
        settings = ["schedule=constant", "observers=[csv,tensorboard,mlflow]", f"train.max_updates={limit}"]
        ended = train(*TINY, *settings, "run_dir=run")
        assert (ended.status, ended.err) == (0, "")
    losses = {line["update"]: line["loss"] for line in updates(Path("run"))}
    assert list(losses) == [1, 2, 3]
    for name, read in trackers_reading.READERS.items():
        # TensorBoard's numbers have 32 bits.
        logged = read(Path("run").absolute(), "train/loss")
        assert dict(logged) == pytest.approx(losses, rel=1e-6), name
        assert len(logged) == 3, name
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


def test_groups_of_ones_own(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "experiment").mkdir()
    (tmp_path / "mine" / "model" / "tiny.yaml").write_text(
        "defaults:\n  - /schema/model@_here_: mlp\n  - _self_\nhidden_sizes: [3]\n"
    )
    (tmp_path / "mine" / "experiment" / "quick.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /optim: momentum\nseed: 9\n"
    )
    ended = train("--config-dir=mine", "experiment=quick", *TINY[:3], *TINY[5:], "run_dir=run")
    assert (ended.status, ended.err) == (0, "")
    config = Path("run/config.yaml").read_text()
    assert "seed: 9\n" in config
    assert "hidden_sizes:\n  - 3\n" in config
    assert "momentum: 0.9\n" in config


def test_an_image_folder_trains(train: Train, tmp_path: Path) -> None:
    _write_images(tmp_path / "images")
    assert train(*IMAGES).status == 0
    assert len(updates(Path("run"))) == 3


# Bad input, each in a process of its own


def test_an_unknown_key_ends_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = start("train.epoch=3")
    assert ended.message.startswith("there is no key train.epoch. Did you mean train.epochs? train has: ")
    assert ended.out == ""
    assert not list(tmp_path.iterdir())


def test_a_sample_that_a_worker_cannot_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = start(*BROKEN, "data.num_workers=2")
    assert ended.message == BROKEN_MESSAGE
    assert "user_project.py" in Path("run/logs/rank0.log").read_text(), "where it was raised is for the log"


def test_a_bug_in_a_users_own_part_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = start(*POINTS, "task._target_=user_project.NanAt", "+task.update=[]")
    assert ended.status == 1
    assert ended.err.count("Traceback (most recent call last)") == 1
    assert "user_project.py" in ended.err
    assert "TypeError" in ended.err


# Bad input, in this process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            [*TINY, "train.epochs=three"],
            "train.epochs=three: Value 'three' of type 'str' could not be converted to Integer.",
            id="wrong type",
        ),
        pytest.param(
            [*TINY, "batch.global_batch_size=100", "batch.micro_batch_size=16", "batch.accumulation_steps=4"],
            "the batch numbers don't fit together (batch.global_batch_size=100, batch.micro_batch_size=16, "
            "batch.accumulation_steps=4, world size 1): 16 × 4 × 1 ranks = 64, not 100. Leave one of the three out "
            "(null) and it follows from the others.",
            id="contradicting batch numbers",
        ),
        pytest.param(
            [*TINY, "batch.global_batch_size=4", "batch.accumulation_steps=8"],
            "the batch numbers don't fit together (batch.global_batch_size=4, batch.micro_batch_size=null, "
            "batch.accumulation_steps=8, world size 1): a rank's share of the window is 4 samples, too few for 8 "
            "micro-steps. Take at most 4 accumulation steps.",
            id="more steps than samples",
        ),
        pytest.param(
            [*TINY, "batch.global_batch_size=null", "batch.micro_batch_size=4"],
            "the batch numbers don't fit together (batch.global_batch_size=null, batch.micro_batch_size=4, "
            "batch.accumulation_steps=null, world size 1): without a global batch both the micro-batch and the "
            "accumulation steps are needed.",
            id="too few batch numbers",
        ),
        pytest.param(
            [*TINY, "batch.global_batch_size=65", "batch.drop_last=true"],
            "the training data has 64 samples, fewer than one window of 65, and batch.drop_last=true would leave out "
            "all of them. Lower batch.global_batch_size or set batch.drop_last=false.",
            id="less than one window",
        ),
        pytest.param(
            [*TINY, "strategy=ddp"],
            "strategy=ddp needs processes that torchrun starts, and this one was started without it. Run "
            "`torchrun --nproc_per_node=4 -m distaccum.train …`, or set strategy=single.",
            id="ddp without torchrun",
        ),
        pytest.param(
            [*TINY, "schedule.warmup_updates=4"],
            "schedule.warmup_updates=4 is longer than the run, which has 3 updates. Shorten the warm-up or train "
            "longer.",
            id="warm-up longer than the run",
        ),
        pytest.param(
            [*POINTS, "model._target_=nowhere.Net"],
            "model._target_=nowhere.Net cannot be imported: ModuleNotFoundError: No module named 'nowhere'. Give the "
            "import path of a class or function that Python finds from here (PYTHONPATH helps).",
            id="no such module",
        ),
        pytest.param(
            [*POINTS, "model._target_=user_project.Lines"],
            "model._target_=user_project.Lines cannot be imported: AttributeError: module 'user_project' has no "
            "attribute 'Lines'. Give the import path of a class or function that Python finds from here (PYTHONPATH "
            "helps).",
            id="no such class",
        ),
        pytest.param(
            [*POINTS, "model._target_=user_project.Curve"],
            "model: Curve cannot be called so: missing a required argument: 'degree'. It takes: degree.",
            id="missing argument",
        ),
        pytest.param(
            [*POINTS, "model._target_=user_project.no_module", "+model.width=3"],
            "model built a int, not a torch.nn.Module.",
            id="no module",
        ),
        pytest.param(
            [*POINTS, "task._target_=user_project.NoObserver"],
            "task built a NoObserver, which can't be called.",
            id="no task",
        ),
        pytest.param(
            [*POINTS, "data.train._target_=user_project.Stream", "~data.train.num_points"],
            "the training data is a Stream, which has no __len__ and __getitem__. Windows need a map-style dataset: "
            "one whose samples have numbers. For what can only be read forwards take data=stream "
            "(distaccum.data.Stream around it), or read the same files by an index: data=jsonl, parquet, webdataset or "
            "tokens.",
            id="no length",
        ),
        pytest.param(
            [*TINY, "+observers.mine._target_=user_project.NoObserver"],
            "observers.mine built a NoObserver, not a distaccum.observers.Observer.",
            id="no observer",
        ),
        pytest.param(
            [*TINY, "+observers.mine._target_=user_project.outputs", "+observers.mine.path=seen"],
            "observers.mine built a Outputs, which uses the model (on_model) and so must be built on every rank: let "
            "observers.mine._target_ name the class itself.",
            id="no class",
        ),
        pytest.param(
            [*TINY, "+observers.mine=3"],
            "observers.mine must name a class or function by _target_; got 3. For example "
            "observers.mine._target_=my_package.MyClass",
            id="no target",
        ),
        pytest.param(
            [*TINY, "data.collate_fn={_target_:user_project.NoObserver}"],
            "data.collate_fn built a NoObserver, which can't be called.",
            id="no collate function",
        ),
    ],
)
def test_bad_input_ends_with_one_message(train: Train, arguments: list[str], message: str) -> None:
    assert train(*arguments, "run_dir=run").message == message
    assert not Path("run/metrics.jsonl").exists(), "no numbers of a run that never was"


def test_an_early_stopping_metric_that_is_not_there_is_refused(train: Train) -> None:
    """The task makes its metrics, so the first evaluation is where it shows."""
    assert train(*TINY, "train.early_stopping.metric=f1").message == (
        "train.early_stopping.metric=f1 is unknown: the evaluation has accuracy, loss. Name one of those, or set "
        "train.early_stopping.metric=null."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none_is_refused(train: Train, tmp_path: Path) -> None:
    build = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
    assert train(*TINY, "device=cuda").message == (
        f"device=cuda, but {build}. Set device=cpu or device=auto, or mend the CUDA installation."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "ImageFolder: root=images does not exist (looked for {here}/images). Images belong in "),
        (lambda: Path("images").mkdir(), "ImageFolder: root=images has no folders in it. Images belong in "),
        (
            lambda: Path("images/cats").mkdir(parents=True),
            "ImageFolder: there are no images in the class folders of images. Looked for files that end in ",
        ),
    ],
    ids=["missing", "empty", "empty class"],
)
def test_an_image_folder_without_images_is_refused(
    train: Train, tmp_path: Path, make: Callable[[], object], message: str
) -> None:
    make()
    assert train(*IMAGES).message.removeprefix("data.train: ").startswith(message.format(here=tmp_path))


def test_an_image_folder_without_a_root_is_refused(train: Train, tmp_path: Path) -> None:
    assert train("data=image_folder").message == "data.root must be given."
    assert not list(tmp_path.iterdir())


def test_an_unreadable_image_is_named(train: Train, tmp_path: Path) -> None:
    _write_images(tmp_path / "images")
    Path("images/dogs/1.png").write_bytes(b"no image")
    everything = [*IMAGES, "data.evaluation_fraction=0", "data.evaluation=null"]
    assert train(*everything).message.startswith(
        "ImageFolder: 1 of 8 images of images can't be read: images/dogs/1.png: cannot identify image file. Replace or"
    )
    assert train(*everything, "data.on_damaged=late").message.startswith(
        "sample 5 of the training data could not be loaded: images/dogs/1.png cannot be read as an image:"
    )


def test_a_sample_that_cannot_be_loaded_is_named(train: Train) -> None:
    assert train(*BROKEN).message == BROKEN_MESSAGE
    assert "user_project.py" in Path("run/logs/rank0.log").read_text(), "where it was raised is for the log"
    assert len(updates(Path("run"))) < 4


def test_a_sample_of_the_evaluation_that_cannot_be_loaded_is_named(train: Train) -> None:
    broken = "{_target_:user_project.BrokenAt,num_points:8,index:6}"
    assert train(*POINTS, f"data.evaluation={broken}").message == (
        "sample 6 of the evaluation data could not be loaded: RuntimeError: broken on purpose"
    )
    assert len(updates(Path("run"))) == 3, "what was done until then is kept"


NAN = [*POINTS, "task._target_=user_project.NanAt", "+task.update=2", "train.max_updates=4"]


def test_a_nan_loss_names_the_update_and_stops(train: Train) -> None:
    assert train(*NAN).message == (
        "update 2: the loss is nan (rank 0, micro-step 1). The parameters have not moved. Look at that data, lower the "
        "learning rate, or leave such updates out with train.on_nonfinite=skip."
    )
    assert [line["update"] for line in updates(Path("run"))] == [1]


def test_a_nan_loss_can_be_skipped_and_is_counted(train: Train) -> None:
    ended = train(*NAN, "train.on_nonfinite=skip")
    assert (ended.status, ended.err) == (0, "")
    lines = updates(Path("run"))
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("skipped", False) for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    assert "update 2 skipped: loss nan" in ended.out
    assert "1 skipped" in ended.out


# The run folder


def test_a_run_folder_that_cannot_be_written_is_refused(train: Train, tmp_path: Path) -> None:
    Path("file").write_text("not a folder")
    assert train(*TINY, "run_dir=file/run").message == (
        "the run folder file/run can't be written: Not a directory. Choose another with run_dir=…"
    )
    assert files_below(tmp_path) == {"file"}


def test_logs_that_cannot_be_written_are_refused(train: Train) -> None:
    Path("run").mkdir()
    Path("run/logs").write_text("not a folder")
    assert train(*TINY, "run_dir=run").message == (
        "the log run/logs/rank0.log can't be written: File exists. Choose another folder with run_dir=…"
    )


def test_the_results_of_another_run_are_not_overwritten(train: Train, tmp_path: Path) -> None:
    assert train(*TINY, "run_dir=run").status == 0
    results = {"config.yaml", "metrics.jsonl", "model.safetensors"}
    before = {name: Path("run", name).read_bytes() for name in results}
    assert train(*TINY, "run_dir=run", "seed=1").message == (
        "run/checkpoints/update-00000003 was saved with seed=0 and now has 1: the windows would no longer be the same. "
        "Put it back as it was, or set resume_override=true to go on from there all the same, or begin anew in another "
        "run_dir."
    )
    assert train(*TINY, "run_dir=run", "resume=none").message == (
        "run_dir=run holds the results of another run, which would be overwritten. Choose another folder, or remove "
        "that one."
    )
    assert {name: Path("run", name).read_bytes() for name in results} == before


def test_a_mended_command_may_take_the_same_folder(train: Train) -> None:
    assert "fit together" in train(*TINY, "run_dir=run", "batch.accumulation_steps=17").message
    assert train(*TINY, "run_dir=run").status == 0
    assert len(updates(Path("run"))) == 3


@pytest.mark.parametrize(("before", "after"), [(32, 16), (16, 32), (24, 16)])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_epochs_count_to_their_end_after_an_override(
    train: Callable[..., Ended], before: int, after: int, schedule: str
) -> None:
    """Updates of two sizes are no measure of epochs: samples are."""
    more = [*(entry for entry in TINY if not entry.startswith(("train.max_updates", "batch."))), f"schedule={schedule}"]
    more += ["schedule.warmup_updates=0", "run_dir=run"]
    assert train(*more, "train.epochs=3", f"batch.global_batch_size={before}").status == 0
    first = updates(Path("run"))
    ended = train(*more, "train.epochs=5", f"batch.global_batch_size={after}", "resume_override=true")
    assert ended.status == 0, ended.err
    found = updates(Path("run"))
    assert found[-1]["samples"] == 5 * 64
    assert len(found) == len(first) + 2 * -(-64 // after)
    if schedule == "linear":
        assert found[-1]["lr"] < found[len(first)]["lr"] / 3, "the schedule ends with the run"
    again = train(*more, "train.epochs=6", f"batch.global_batch_size={after}")
    assert again.status == 0, again.err
    assert updates(Path("run"))[-1]["samples"] == 6 * 64


def test_a_run_needs_nobody_who_reads_it(tmp_path: Path) -> None:
    """Nor characters that it can print, nor standard error."""
    command = [sys.executable, "-m", "distaccum.train", *TINY, "run_dir=run"]
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" 2>&- | head -1', "bash", *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "plan           window 16 = 1 rank \\xd7 1 micro-step \\xd7 16; no sync needed; 4 windows an epoch\n"
    )
    assert [line["update"] for line in updates(tmp_path / "run")] == [1, 2, 3]


def test_help_needs_nobody_who_reads_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distaccum.train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TESTS.parent) as helping:
        assert helping.stdout is not None
        assert helping.stderr is not None
        helping.stdout.close()
        assert helping.stderr.read() == b""
    assert helping.returncode == 0
