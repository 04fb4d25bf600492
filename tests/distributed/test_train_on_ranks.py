"""Whole runs, some under torchrun as a user starts them. What goes wrong is said once, whichever rank it is on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, evaluations, files_below, message_of_ranks, metrics, updates, without_measurements
from launching import HERE, forked, torchrun

BY_RANK = str(HERE / "train_by_rank.py")
POINTS = [
    "wandb.mode=disabled",
    "batch.global_batch_size=16",
    "train.max_updates=4",
    "run_dir=run",
    "data=custom",
    "data.train._target_=user_project.Points",
    "+data.train.num_points=64",
    "model=custom",
    "model._target_=user_project.Line",
    "task=custom",
    "task._target_=user_project.SquaredDistance",
]


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    return [without_measurements(line) for line in metrics(run_dir)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_of_two_ranks_leaves_one_folder() -> None:
    done = torchrun(2, "-m", "distaccum.train", *TINY, cold=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = Path("runs").iterdir()
    shards = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")
    assert files_below(Path()) == {
        *(
            f"{run_dir}/{name}"
            for name in ("config.yaml", "metrics.jsonl", "run.json", "run.lock", "model.safetensors")
        ),
        *(f"{run_dir}/logs/rank{rank}.log" for rank in (0, 1)),
        *(f"{run_dir}/checkpoints/update-00000003/{name}" for name in shards),
    }
    lines = updates(run_dir)
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert [line["samples"] for line in lines] == [16, 32, 48]
    assert [line["sync_calls"] for line in lines] == [1, 1, 1]
    assert {line["sync_bytes"] for line in lines} == {4 * (4 * 8 + 8 + 8 * 10 + 10)}, "every parameter once, in float32"
    assert [line["update"] for line in evaluations(run_dir)] == [3]
    assert "name: ddp\n" in (run_dir / "config.yaml").read_text()
    assert done.stdout.count("window 16 = 2 ranks × 1 micro-step × 8; 1 sync per update; 4 windows an epoch") == 1
    assert done.stdout.count("3 of 3 updates") == 1


def test_an_observer_may_call_the_model_on_all_ranks() -> None:
    """Also one that is sharded. The run comes out the same, bit for bit, with dropout and a weight average."""
    settings = ["model.dropout=0.5", "train.eval_every=2", "train.ema.decay=0.5"]
    observing = ["+observers.mine._target_=user_project.Outputs", "+observers.mine.path=seen-${run_dir}"]
    for run_dir, strategy, more in (("a", "fsdp", observing), ("b", "fsdp", []), ("c", "ddp", observing)):
        arguments = [*TINY, *settings, f"strategy={strategy}", f"run_dir={run_dir}", *more]
        done = forked(2, "-m", "distaccum.train", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(Path("a")) == numbers(Path("b"))
    main, other = (json.loads(Path(f"seen-a-{rank}").read_text()) for rank in (0, 1))
    assert main == ["evaluation", other[0], "evaluation", other[1]]
    ddp = json.loads(Path("seen-c-1").read_text())
    for seen, whole, update in zip(other, ddp, (2, 3), strict=True):
        assert seen[:4] == [update, "DTensor", False, False]
        assert whole[:5] == [update, "Parameter", False, False, seen[4]]
        assert seen[5] == pytest.approx(whole[5], rel=1e-4)


def test_a_config_error_is_said_once() -> None:
    done = forked(2, "-m", "distaccum.train", *TINY, "train.epoch=3")
    assert message_of_ranks(done).startswith("there is no key train.epoch. Did you mean train.epochs? ")
    assert files_below(Path()) == set()


def test_a_syntax_error_on_one_rank_alone_is_said() -> None:
    done = torchrun(2, BY_RANK, *TINY, "1:seed=[1")
    assert message_of_ranks(done).startswith("seed=[1 can't be read. ")
    assert files_below(Path()) == set()


def test_ranks_with_different_configurations_are_refused() -> None:
    done = forked(2, BY_RANK, *TINY, "0:optim.lr=0.1", "1:optim.lr=0.2")
    assert message_of_ranks(done) == (
        "the ranks were started with different configurations: optim.lr is 0.1 on rank 0, 0.2 on rank 1. Give all the "
        "same."
    )
    assert files_below(Path()) == set()


def test_one_strategy_for_many_processes_is_refused() -> None:
    done = forked(2, "-m", "distaccum.train", *TINY, "run_dir=run", "strategy=single")
    assert message_of_ranks(done) == (
        "strategy=single is one process, and the launcher started 2: each would train a model of its own. Set "
        "strategy=ddp, or start one process."
    )
    assert not Path("run/metrics.jsonl").exists()


def test_fewer_samples_than_ranks_are_refused() -> None:
    few = ["data.num_samples=1", "batch.global_batch_size=2"]
    done = forked(2, "-m", "distaccum.train", *TINY, "run_dir=run", *few)
    assert message_of_ranks(done) == (
        "the training data has 1 sample, fewer than the 2 ranks. Start fewer ranks or give more data."
    )
    assert not Path("run/metrics.jsonl").exists()


def test_a_sample_that_one_rank_cannot_load_is_named() -> None:
    broken = ["data.train._target_=user_project.BrokenAt", "+data.train.index=37"]
    done = torchrun(2, "-m", "distaccum.train", *POINTS, *broken)
    assert (
        message_of_ranks(done) == "sample 37 of the training data could not be loaded: RuntimeError: broken on purpose"
    )
    logs = [Path(f"run/logs/rank{rank}.log").read_text() for rank in (0, 1)]
    assert ["user_project.py" in log for log in logs].count(True) == 1, "the log of the rank that it happened on"
    assert len(updates(Path("run"))) < 4


def test_a_nan_loss_on_one_rank_stops_all() -> None:
    nan = ["task._target_=user_project.NanAt", "+task.update=2", "+task.rank=1"]
    done = forked(2, "-m", "distaccum.train", *POINTS, *nan)
    assert message_of_ranks(done) == (
        "update 2: the loss is nan (rank 1, micro-step 1). The parameters have not moved. Look at that data, lower the "
        "learning rate, or leave such updates out with train.on_nonfinite=skip."
    )
    assert [line["update"] for line in updates(Path("run"))] == [1]


@pytest.mark.parametrize("unused_on", ["null", "1"])
def test_a_parameter_that_the_loss_does_not_reach_is_named(unused_on: str) -> None:
    spare = ["model._target_=user_project.Spare", f"+model.unused_on={unused_on}"]
    done = forked(2, "-m", "distaccum.train", *POINTS, *spare)
    rank = "1" if unused_on == "1" else r"\d"
    assert re.fullmatch(
        rf"the loss of the window's last micro-step doesn't reach spare\.weight, spare\.bias on rank {rank}, and DDP "
        r"waits for their gradients\. Set strategy\.find_unused_parameters=true .*",
        message_of_ranks(done),
    )
    assert not updates(Path("run")), "nothing has moved"


def test_a_task_that_calls_another_method_of_the_model_is_told_what_ddp_needs() -> None:
    done = forked(
        2,
        "-m",
        "distaccum.train",
        *POINTS,
        "model._target_=user_project.Spare",
        "task._target_=user_project.EncodedDistance",
    )
    assert message_of_ranks(done).startswith(
        "the task asks the model for .encode, and DistributedDataParallel has none: gradients cross the network only "
    )


def test_a_bug_keeps_its_traceback_on_one_rank() -> None:
    done = torchrun(2, "-m", "distaccum.train", *POINTS, "task._target_=user_project.NanAt", "+task.update=[]")
    assert done.returncode != 0
    # torchrun adds one of its own.
    assert done.stderr.count("Traceback (most recent call last)") == 2
    assert len(re.findall(r"^(?:\[rank\d\]: )?TypeError: ", done.stderr, re.MULTILINE)) == 1
    assert re.search("traceback : TypeError: .+\n====", done.stderr), "what torchrun prints last has it again"
    assert "user_project.py" in done.stderr
