"""Whole runs with `batch.micro_batch_size=auto`, whose memory runs out at the start or later."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import message_of_ranks, updates
from launching import torchrun

RUN = [
    "data=custom",
    "data.train._target_=injection.Vectors",
    "data.evaluation=null",
    "model=custom",
    "model._target_=injection.FragileRun",
    "task=classification",
    "batch.global_batch_size=16",
    "wandb.mode=disabled",
    "precision=fp64",
    "schedule=constant",
    "train.max_updates=8",
    "checkpoint.enabled=false",
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def _run(ranks: int, run_dir: str, *overrides: str, **environment: str) -> None:
    done = torchrun(ranks, "-m", "distaccum.train", *RUN, f"run_dir={run_dir}", *overrides, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


def _log(run_dir: str, rank: int = 0) -> str:
    return Path(run_dir, f"logs/rank{rank}.log").read_text()


def _assert_same_curve(found: str, wanted: str) -> None:
    for key in ("loss", "grad_norm", "weight", "samples"):
        mine, reference = ([line[key] for line in updates(Path(name))] for name in (found, wanted))
        assert mine == pytest.approx(reference, rel=1e-12), (found, key)


def test_sizes_are_found_remembered_and_made_smaller_and_the_curve_stays_the_same() -> None:
    _run(1, "alone", "strategy=single", "+model.fits=99", "batch.micro_batch_size=4")
    # On rank 1 only 3 fit.
    fragile = ["batch.micro_batch_size=auto", "+model.fits=3", "+model.rank=1", "data.num_workers=1"]
    _run(2, "found", *fragile)
    assert "micro-batches of at most 8, 3 samples, found by trying" in _log("found")
    _run(2, "remembered", *fragile, "train.max_updates=1")
    assert "micro-batches of at most 8, 3 samples, as found before on this machine" in _log("remembered")
    # After the search, from the 9th forward on, there is less memory than there was: in the backward that synchronises.
    less = ["+model.fits=2", "+model.from_forward=9", "+model.rank=0", "+model.direction=backward"]
    _run(2, "late", "batch.micro_batch_size=auto", *less, "data.num_workers=1")
    assert "out of memory in the backward of 8 samples; micro-batches of this rank are at most 4" in _log("late")
    assert "out of memory in the backward of 4 samples; micro-batches of this rank are at most 2" in _log("late")
    assert "its window is taken again" in _log("late", 1)
    for name in ("found", "late"):
        _assert_same_curve(name, "alone")


def test_a_resumed_run_keeps_its_sizes(tmp_path: Path) -> None:
    less = ["batch.micro_batch_size=auto", "+model.fits=2", "+model.rank=1"]
    saving = ["checkpoint.enabled=true", "checkpoint.every_updates=4", "train.epochs=null"]
    _run(2, "unbroken", *less, "+model.from_forward=8", *saving)
    nothing_known = {"XDG_CACHE_HOME": str(tmp_path / "another_cache")}
    _run(2, "broken", *less, "+model.from_forward=8", *saving, "train.max_updates=5", **nothing_known)
    said = _log("broken", 1)
    assert said.count("out of memory") == _log("unbroken", 1).count("out of memory") == 2
    _run(2, "broken", *less, *saving, **nothing_known)
    assert "as before in this run" in _log("broken")
    assert _log("broken", 1).count("out of memory") == 2
    assert [line["loss"] for line in updates(Path("broken"))] == [line["loss"] for line in updates(Path("unbroken"))]


def test_under_fsdp_a_restart_goes_on_with_the_smaller_size() -> None:
    _run(1, "alone", "strategy=single", "+model.fits=99", "batch.micro_batch_size=4")
    auto = ["strategy=fsdp", "batch.micro_batch_size=auto", "checkpoint.enabled=true", "checkpoint.every_updates=2"]
    less = [*auto, "+model.fits=4", "+model.from_forward=7", "+model.rank=1", "run_dir=sharded"]
    done = torchrun(2, "-m", "distaccum.train", *RUN, *less)
    assert "micro-batches of at most 8 samples, reckoned" in _log("sharded")
    assert "The smaller size 4 is remembered: start the same command again" in message_of_ranks(done)
    done = torchrun(2, "-m", "distaccum.train", *RUN, *less)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "micro-batches of at most 4 samples, as before in this run" in _log("sharded")
    _assert_same_curve("sharded", "alone")


def test_what_is_reckoned_follows_the_memory_that_may_be_used() -> None:
    _run(2, "scarce", "strategy=fsdp", "batch.micro_batch_size=auto", "+model.fits=99", "batch.auto_memory=1e-9")
    assert "micro-batches of at most 1 samples, reckoned" in _log("scarce")
    assert {line["micro_steps"] for line in updates(Path("scarce"))} == {8, 6}
