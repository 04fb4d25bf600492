"""Whole comparisons, with real ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import forking
import pytest
from command_line import updates
from launching import ROOT, forked

SMALL = ["data=synthetic", "data.input_shape=[4]", "data.num_samples=90", "model=mlp", "model.hidden_sizes=[8]"]
SMALL += ["batch.global_batch_size=24", "wandb.mode=disabled", "train.epochs=3"]
QUICK = ["compare.rounds=2", "compare.updates=2", "compare.warmup_updates=1", "compare.curve_updates=9"]


def compare(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [forking.python(), "-m", "distaccum.compare", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((folder / "compare.json").read_text())
    return {row["key"]: row for row in report["rows"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    placements = "compare.placements=[one_shot,single,ddp_sync_every_step,ddp,ddp_bf16,ddp_powersgd]"
    # The epoch's last window has 18 samples, so 10 micro-steps are too many for a rank of two, and not for one.
    placements += " compare.exact_updates=2"  # PowerSGD begins with the third
    done = compare(folder, *SMALL, *QUICK, *placements.split(), "compare.accumulation_steps=[3,20]", "run_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout)
    return folder / "run"


def test_exact_placements_are_exact_and_compression_is_not(folder: Path) -> None:
    rows = rows_of(folder)
    for key in ("one_shot_1x1", "single_1x3", "single_1x20", "ddp_sync_every_step_2x3", "ddp_2x3"):
        assert rows[key]["error_float64"] < 1e-12
        assert rows[key]["error"] < 1e-4
    assert rows["one_shot_1x1"]["error_float64"] == 0.0
    assert 1e-6 < rows["ddp_bf16_2x3"]["error_float64"] < 0.1
    not_compressed_yet = rows["ddp_powersgd_2x3"]
    assert not_compressed_yet["error"] is not_compressed_yet["error_float64"] is None
    assert not_compressed_yet["notes"] == ["no error: 2 updates are not compressed yet; compare.exact_updates=3"]


def test_collectives_and_bytes(folder: Path) -> None:
    rows = rows_of(folder)
    once, every, bf16 = (rows[f"{name}_2x3"] for name in ("ddp", "ddp_sync_every_step", "ddp_bf16"))
    assert once["sync_calls"] == 1
    assert every["sync_calls"] == 3 * once["sync_calls"]
    assert every["sync_bytes"] == 3 * once["sync_bytes"]
    assert bf16["sync_bytes"] == once["sync_bytes"] / 2 > 0
    assert rows["single_1x3"]["sync_calls"] == rows["single_1x3"]["sync_bytes"] == 0


def test_what_is_measured_is_plausible(folder: Path) -> None:
    for key, row in rows_of(folder).items():
        if row["reason"] is not None:
            continue
        assert len(row["round_seconds"]) == 2
        assert row["low_seconds"] <= row["seconds"] <= row["high_seconds"]
        assert row["samples_per_second"] == pytest.approx(24 / row["seconds"])
        shares = [row["data_share"], row["compute_share"], row["sync_share"]]
        assert sum(shares) == pytest.approx(1.0)
        assert all(0 <= share <= 1 for share in shares)
        assert len(row["memory"]) == row["num_processes"] == row["world_size"]
        assert all(0 < before < peak for before, peak in zip(row["memory_before"], row["memory"], strict=True))
        assert sum(row["micro_batch_sizes"]) * row["world_size"] == 24, key
        assert (row["sync_share"] > 0) == (row["world_size"] > 1)
    assert rows_of(folder)["single_1x3"]["speedup"] == 1.0


def test_a_placement_that_is_refused_is_a_row_that_says_why(folder: Path) -> None:
    for name in ("ddp", "ddp_sync_every_step", "ddp_bf16"):
        row = rows_of(folder)[f"{name}_2x20"]
        assert "a rank's share of the window is 12 samples, too few for 20 micro-steps" in row["reason"]
        assert row["seconds"] is None


def test_the_loss_curve_is_that_of_a_training(folder: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "strategy=ddp", "batch.accumulation_steps=3", f"run_dir={tmp_path / 'run'}"]
    done = forked(2, "-m", "distaccum.train", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = [line["loss"] for line in updates(tmp_path / "run")][:9]
    assert rows_of(folder)["ddp_2x3"]["loss_curve"] == trained
    assert len(trained) == 9
    alone = rows_of(folder)["one_shot_1x1"]["loss_curve"]
    assert all(math.isclose(one, other, rel_tol=1e-5) for one, other in zip(alone, trained, strict=True))


def test_what_is_left_behind(folder: Path) -> None:
    report = json.loads((folder / "compare.json").read_text())
    assert report["config"]["batch"]["global_batch_size"] == 24
    assert report["command"].startswith("python -m distaccum.compare data=synthetic")
    assert report["reference"] == {"accumulation_steps": 1, "parameters": 4 * 8 + 8 + 8 * 10 + 10, "problem": None}
    assert report["advice"][0].startswith("Use ")
    page = (folder / "compare.html").read_text()
    assert all(row["title"] in page for row in report["rows"])
    said = (folder.parent / "said").read_text()
    assert all(row["title"] in said for row in report["rows"])
    assert report["advice"][0] in said
    files = {path.name for path in folder.iterdir()}
    assert files == {"compare.json", "compare.html", "config.yaml", "logs", "run.lock"}


def test_results_are_not_overwritten(folder: Path) -> None:
    done = compare(folder.parent, *SMALL, "run_dir=run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: run_dir=run holds the results of another comparison")


def test_ranks_that_hang_die_or_fail_are_rows_too(tmp_path: Path) -> None:
    done = compare(
        tmp_path,
        *SMALL[:3],
        "batch.global_batch_size=16",
        "model=custom",
        "model._target_=troublesome.Troublesome",
        f"+model.notes={tmp_path}",
        *QUICK,
        "compare.placements=[single,ddp]",
        "compare.accumulation_steps=[2,4,8]",
        "compare.timeout_seconds=20",
        "run_dir=run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "run")
    assert [rows[f"single_1x{steps}"]["reason"] for steps in (2, 4, 8)] == [None, None, None]
    assert rows["ddp_2x2"]["reason"] == "no answer from 2 of 2 ranks within 20 s (prepare): stopped at timeout_seconds"
    assert rows["ddp_2x4"]["reason"] == "killed by signal 9: out of memory, most likely"
    assert rows["ddp_2x8"]["reason"] == "ZeroDivisionError: one sample is too few"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hangs").read_text()), 0)


def test_what_no_placement_can_train_is_one_message(tmp_path: Path) -> None:
    done = compare(tmp_path, *SMALL, "task._target_=nowhere.Task", "run_dir=run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: task._target_=nowhere.Task cannot be imported")
    assert done.stderr.count("\n") == 1


def test_it_is_not_to_be_started_by_torchrun(tmp_path: Path) -> None:
    done = compare(tmp_path, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "starts its own ranks" in done.stderr


def test_cut_by_length(tmp_path: Path) -> None:
    """The same windows and updates in other micro-batches; with the uniform cut beside it."""
    text = ["data=text", "data.max_length=128", "model=gpt", "model.width=16", "task=language_modeling"]
    more = ["batch=by_length", "batch.global_batch_size=32", "compare.accumulation_steps=[4]", "wandb.mode=disabled"]
    placements = "compare.placements=[single,ddp,ddp_sync_every_step,fsdp,fsdp_sharded,fsdp_node]"
    done = compare(tmp_path, *text, *more, *QUICK, placements, "run_dir=run", "schedule=constant")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "run")
    uniform, grouped = rows["single_1x4_uniform"], rows["single_1x4"]
    assert uniform["micro_batch_sizes"] == [8] * 4
    assert sum(grouped["micro_batch_sizes"]) == 32
    assert len(set(grouped["micro_batch_sizes"])) > 1, "what is short has more company"
    ranks = ("ddp", "ddp_sync_every_step", "fsdp", "fsdp_sharded", "fsdp_node")
    assert {*rows} == {"single_1x4", "single_1x4_uniform", *(f"{name}_2x4" for name in ranks)}
    for row in rows.values():
        assert row["reason"] is None, row
        assert row["error_float64"] < 1e-12
        assert row["loss_curve"] == pytest.approx(uniform["loss_curve"], rel=1e-4)
    whole, sharded, node = (rows[f"fsdp{name}_2x4"] for name in ("", "_sharded", "_node"))
    assert whole["sync_by_axis"] == sharded["sync_by_axis"] == {}
    micro_steps, remainder = divmod(sharded["sync_calls"], whole["sync_calls"])
    assert micro_steps >= 4
    assert remainder == 0
    assert sharded["sync_bytes"] == micro_steps * whole["sync_bytes"]
    assert node["title"].startswith("FSDP, node of 1 · ")
    assert "strategy.accumulate=node strategy.shard_size=1" in node["command"]
    # Each rank is a node: nothing is sent inside, and all gradients once between.
    assert node["sync_by_axis"] == {"replicate": [1, rows["ddp_2x4"]["sync_bytes"]]}
    assert grouped["speedup"] == 1.0
    assert "batch.micro_batch_size=8" in grouped["command"]
    assert "batch=by_length" not in uniform["command"]
    # The command that it gives is one that trains.
    overrides = rows["ddp_2x4"]["command"].partition("distaccum.train ")[2].split()
    trained = forked(2, "-m", "distaccum.train", *overrides, "train.max_updates=2", f"run_dir={tmp_path / 'train'}")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert updates(tmp_path / "train")[0]["loss"] == pytest.approx(grouped["loss_curve"][0], rel=1e-5)


def test_a_budget_of_tokens_would_be_overruled(tmp_path: Path) -> None:
    done = compare(tmp_path, "experiment=text", "batch=by_length", "batch.max_tokens=64")
    assert done.returncode == 2
    assert "compare sets how much a micro-batch may hold" in done.stderr
