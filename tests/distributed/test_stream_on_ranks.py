"""Runs of `python -m distaccum.train data=stream` that are killed, and go on with other ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import evaluations, metrics, updates
from launching import forked

from distaccum.checkpoints.folder import checkpoints_in
from distaccum.data.streams.stream import stream_data

ROWS = [{"id": number, "inputs": [number % 7, number % 5 - 2, number % 3, 1.0]} for number in range(70)]
RUN = [
    "data=stream",
    "data.files=shards/*.jsonl",
    "data.transform={_target_: streaming.Inputs}",
    "data.evaluation_samples=9",
    "data.buffer=16",
    "data.lanes=2",
    "model=mlp",
    "model.hidden_sizes=[8]",
    "batch.global_batch_size=12",
    "schedule=constant",
    "precision=fp64",
    "wandb.mode=disabled",
    "train.eval_every=4",
    "checkpoint.every_updates=1",
    "checkpoint.keep_last=3",
]


@pytest.fixture(autouse=True)
def _with_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """61 samples an epoch beside those held out, so that of its 6 windows the last has one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("shards").mkdir()
    for name, first, stop in (("a", 0, 30), ("b", 30, 30), ("c", 30, 34), ("d", 34, 70)):
        Path(f"shards/{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[first:stop]))


def run(ranks: int, run_dir: str, *overrides: str, status: int | None = 0) -> str:
    done = forked(ranks, "-m", "distaccum.train", *RUN, f"run_dir={run_dir}", *overrides)
    assert done.returncode == status or (status is None and done.returncode), done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_same(folder: str, other: str) -> None:
    for key in ("loss", "grad_norm", "weight", "samples"):
        found = [[line[key] for line in updates(Path(run_dir))] for run_dir in (folder, other)]
        assert found[0] == pytest.approx(found[1], rel=1e-10), key
    evaluated = {line["update"]: line["eval"]["loss"] for line in evaluations(Path(folder))}
    for line in evaluations(Path(other)):
        assert evaluated[line["update"]] == pytest.approx(line["eval"]["loss"], rel=1e-10)


def test_a_run_that_is_killed_and_moves_to_other_ranks_learns_the_same() -> None:
    said = run(1, "undisturbed", "train.max_updates=16")
    assert "the stream has 70 samples, counted in" in said
    assert "6 windows an epoch, the last of 1" in said
    assert [line["window_samples"] for line in updates(Path("undisturbed"))][:7] == [12] * 5 + [1, 12]
    stages = [(4, 4, 0), (2, 8, 2), (1, 13, 1), (3, 16, 0)]
    for ranks, last, workers in stages:
        overrides = [f"train.max_updates={last}", f"data.num_workers={workers}", "batch.micro_batch_size=3"]
        if ranks == 1:
            stream = stream_data(files="shards/*.jsonl", evaluation_samples=9, buffer=16, lanes=2)
            Path("kill").write_text(str(stream.samples_of_epoch(1, [50])[0]["id"]))  # of the 11th update
            assert "worker process that loads the training data" in run(1, "moving", *overrides, status=2)
            assert not Path("kill").exists()
            newest = max(folder.name for folder in checkpoints_in(Path("moving/checkpoints")))
            assert "update-00000008" <= newest < "update-00000013"
        said = run(ranks, "moving", *overrides)
        assert "the stream has" not in said.replace("the stream has 61", "")  # remembered
    assert [line["update"] for line in metrics(Path("moving")) if "loss" in line] == list(range(1, 17))
    assert_same("moving", "undisturbed")
    # Negative control.
    run(1, "other", "train.max_updates=16", "seed=1")
    assert updates(Path("other"))[-1]["loss"] != pytest.approx(updates(Path("moving"))[-1]["loss"], rel=1e-2)


def test_an_endless_stream_and_what_is_refused() -> None:
    """With all that changes cuts and windows on the way."""
    endless = ("data.endless=true", "train.epochs=null", "batch.schedule=ramp", "batch.ramp_from=6")
    endless += (
        "batch.ramp_updates=5",
        "batch.micro_batch_size=auto",
        "batch.balance=speed",
        "insight.noise_scale=true",
    )
    said = run(1, "undisturbed", *endless, "train.max_updates=12")
    assert "counted" not in said
    assert "windows an epoch" not in said
    run(2, "moving", *endless, "train.max_updates=7")
    run(1, "moving", *endless, "train.max_updates=12")
    assert_same("moving", "undisturbed")
    assert [line["window_samples"] for line in updates(Path("moving"))] == [6, 7, 8, 9, 10] + [12] * 7
    refused = {
        "data.endless=true has no end of an epoch": ("other", "data.endless=true"),
        "Take batch=uniform": ("other", "batch=by_length", "batch.max_tokens=64"),
        "has ended after 61 samples in epoch 0, and num_samples=99": ("other", "data.num_samples=99", "train.epochs=1"),
        "data.buffer=16, data.lanes=2, 9 held out and now": (
            "moving",
            *endless,
            "train.max_updates=15",
            "data.buffer=17",
        ),
    }
    for words, (folder, *overrides) in refused.items():
        assert words in run(1, folder, *overrides, status=2)
    source = ["data.files=null", "data.source={_target_: streaming.OfRank}", "data.num_samples=30"]
    source += ["data.evaluation=null", "data.evaluation_samples=null", "train.eval_every=null"]
    assert "another one on rank 1 than on rank 0" in run(2, "by_rank", *source, status=None)
