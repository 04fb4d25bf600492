"""Checkpoints that are damaged, belong to another run or are missing; run folders that others want too."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import leftovers, lines, outcome, saved_updates, undisturbed
from starting import RUN, STEPS, Starter
from troubles import trouble

from distaccum.checkpoints import MODEL_FILE
from distaccum.checkpoints.memory_place import VARIABLE

pytestmark = pytest.mark.usefixtures("here")

CHECKPOINTS = Path("run/checkpoints")
KEEP = "checkpoint.keep_last=3"


def stop_after(runs: Starter, update: int, *settings: str, ranks: int = 1) -> None:
    """A run that is killed right after an update; up to it there are checkpoints."""
    troubles = [trouble("forward", "SIGKILL", nth=update * STEPS // ranks + 1, rank=None)]
    ended = runs.run(*RUN, "checkpoint.async_save=false", *settings, ranks=ranks, troubles=troubles)
    assert ended.statuses == [-9] * ranks, ended


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "rank-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def flip_byte(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def remove_shard(checkpoint: Path) -> None:
    (checkpoint / "rank-00001.safetensors").unlink()


def flip_byte_of_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"update": 6', b'"update": 5'))


def empty_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"")


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "rank-00001.safetensors has",
    flip_byte: "rank-00000.safetensors is not as it was written: its hash is another",
    remove_shard: "rank-00001.safetensors is missing",
    flip_byte_of_manifest: "manifest.json is not as it was written",
    empty_manifest: "manifest.json is not as it was written",
    remove_manifest: "manifest.json is missing",
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(runs: Starter) -> None:
    stop_after(runs, 7, KEEP, ranks=2)
    assert saved_updates() == [6, 4, 2]
    Path("run").rename("whole")
    for damage, said in DAMAGES.items():
        shutil.copytree("whole", "run")
        damage(CHECKPOINTS / "update-00000006")
        refused = runs.run(*RUN, "run_dir=other", f"resume={CHECKPOINTS}/update-00000006")
        assert refused.message.startswith(f"resume={CHECKPOINTS}/update-00000006: there is no checkpoint to go on from")
        assert said in refused.message
        shutil.rmtree("other")
        ended = runs.run(*RUN, KEEP, ranks=2)
        assert ended.statuses == [0, 0], ended
        assert f"the checkpoint {CHECKPOINTS}/update-00000006 is damaged and passed over: {said}" in ended.out
        assert f"going on from {CHECKPOINTS}/update-00000004, update 4" in ended.out
        assert outcome() == undisturbed(runs, ranks=2)
        shutil.rmtree("run")


def test_what_is_saved_after_a_damaged_checkpoint_is_kept(runs: Starter) -> None:
    """A damaged one with a higher number doesn't count among the newest."""
    stop_after(runs, 7)
    assert saved_updates() == [6, 4]
    flip_byte(CHECKPOINTS / "update-00000006")
    stop_after(runs, 1, "checkpoint.every_updates=1", "checkpoint.keep_last=1")
    assert saved_updates() == [6, 5]
    ended = runs.run(*RUN)
    assert f"going on from {CHECKPOINTS}/update-00000005" in ended.out
    assert outcome() == undisturbed(runs)


def test_when_all_checkpoints_are_damaged_nothing_is_thrown_away(runs: Starter) -> None:
    stop_after(runs, 7)
    for update in saved_updates():
        flip_byte(CHECKPOINTS / f"update-{update:08d}")
    before = lines(Path("run"))
    message = runs.run(*RUN).message
    assert message.startswith(f"all checkpoints in {CHECKPOINTS} are damaged")
    assert lines(Path("run")) == before
    assert saved_updates() == [6, 4]


def test_a_run_with_a_state_in_memory_alone_goes_on_with_other_settings(
    runs: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["checkpoint.every_updates=null", "checkpoint.memory_every_updates=1"]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        monkeypatch.setenv(VARIABLE, memory)
        stop_after(runs, 5, *settings)
        assert not saved_updates()
        settings.append("optim.lr=0.003")
        before = lines(Path("run"))
        message = runs.run(*RUN, *settings, f"resume={CHECKPOINTS}/update-00000002").message
        assert f"is not the newest checkpoint of run_dir=run, which is {memory}/distaccum-" in message
        (root,) = Path(memory).glob("distaccum-*")
        root.rename(f"{memory}/elsewhere")
        message = runs.run(*RUN, *settings).message
        assert "results of another run, with other settings and without a checkpoint to go on from" in message
        assert lines(Path("run")) == before
        Path(memory, "elsewhere").rename(root)
        ended = runs.run(*RUN, *settings, f"resume={CHECKPOINTS}")
    assert ended.statuses == [0], ended
    assert "in memory, is newer than any on the disk" in ended.out
    assert f"going on from {memory}/distaccum-" in ended.out
    assert "changed since: optim.lr" in ended.out
    assert [line["update"] for line in lines(Path("run")) if "eval" not in line] == list(range(1, 9))


REFUSED = {
    "batch.global_batch_size=10": "batch.global_batch_size=12 and now has 10",
    "seed=1": "seed=0 and now has 1",
    "data.train.num_samples=90": "training samples=100 and now has 90",
    "batch.drop_last=true": "batch.drop_last=False and now has True",
}


def test_other_windows_are_refused_unless_overridden(runs: Starter) -> None:
    stop_after(runs, 5)
    Path("run").rename("whole")
    for setting, said in REFUSED.items():
        shutil.copytree("whole", "run")
        before = lines(Path("run"))
        settings = [*RUN, setting.replace("data.train.num", "+data.train.num")]
        settings = [s for s in settings if s != "+data.train.num_samples=100" or "num_samples" not in setting]
        message = runs.run(*settings).message
        assert message.startswith(f"{CHECKPOINTS}/update-00000004 was saved with {said}")
        assert "resume_override=true" in message
        assert lines(Path("run")) == before
        assert saved_updates() == [4, 2]
        ended = runs.run(*settings, "resume_override=true")
        assert ended.statuses == [0], ended
        assert f"resume_override: saved with {said}" in ended.out
        found = [line for line in lines(Path("run")) if "eval" not in line]
        assert [line["update"] for line in found] == list(range(1, 9))
        size = 10 if "global" in setting else 12
        # 48 samples of the epoch were done; the first window of 10 that begins there or later is the sixth.
        first = 50 if size == 10 else 48
        samples = [48 + min(size * n, (90 if "num_samples" in setting else 100) - first) for n in range(1, 5)]
        assert [line["samples"] for line in found] == [12, 24, 36, 48, *samples]
        assert found[:4] == before[:3] + before[4:5]
        shutil.rmtree("run")


def test_a_finished_run_that_is_started_again_stays_as_it_is(runs: Starter) -> None:
    assert runs.run(*RUN).statuses == [0]
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and "logs" not in path.parts}
    ended = runs.run(*RUN)
    assert (ended.statuses, ended.err) == ([0], "")
    assert "finished       8 of 8 updates" in ended.out
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and "logs" not in path.parts}
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path] and path.name != "run.lock"] == []


def test_a_finished_run_goes_on_when_it_is_given_more_to_do(runs: Starter) -> None:
    # Saved beside the training, update 4 would be left out while update 2 is still being written.
    settings = ("schedule=constant", "checkpoint.async_save=false")
    assert runs.run(*RUN, *settings, "train.max_updates=5").statuses == [0]
    assert saved_updates() == [5, 4]
    ended = runs.run(*RUN, *settings)
    assert "changed since: train.max_updates: 5 → 8" in ended.out
    numbers, weights = undisturbed(runs, "schedule=constant")
    found, same_weights = outcome()
    assert same_weights == weights
    # The end of the shorter run had an evaluation of its own.
    assert [line for line in found if not (line["update"] == 5 and "eval" in line)] == numbers


def test_going_on_from_another_folder(runs: Starter) -> None:
    stop_after(runs, 7)
    before = lines(Path("run"))
    for number, resume in enumerate(["run", "run/checkpoints", "run/checkpoints/update-00000004"]):
        ended = runs.run(*RUN, f"run_dir=new{number}", f"resume={resume}")
        assert ended.statuses == [0], ended
        update = 4 if "update" in resume else 6
        assert f"going on from run/checkpoints/update-{update:08d}, update {update}" in ended.out
        assert outcome(Path(f"new{number}")) == undisturbed(runs)
    assert lines(Path("run")) == before, "the other folder is left alone"
    assert saved_updates() == [6, 4]


def test_where_a_run_can_not_go_on_from(runs: Starter) -> None:
    message = runs.run(*RUN, "resume=nowhere").message
    assert message.startswith("resume=nowhere: there is no checkpoint to go on from")
    stop_after(runs, 3)
    before = lines(Path("run"))
    message = runs.run(*RUN, "resume=none").message
    assert message.startswith("run_dir=run holds the results of another run, which would be overwritten")
    message = runs.run(*RUN, "+model.width=20").message
    assert message.startswith("the checkpoint holds another model: layers.0.bias is [16] there and [20] here")
    message = runs.run(*RUN, "optim=sgd").message
    assert "holds the state of AdamW, and the optimizer is SGD" in message
    assert lines(Path("run")) == before
    assert saved_updates() == [2]
    ended = runs.run(*RUN)
    assert ended.statuses == [0]
    assert outcome() == undisturbed(runs)


def test_a_second_job_in_the_folder_is_refused(runs: Starter) -> None:
    held = [trouble("forward", "wait", nth=10, path="there")]
    first = runs.start(*RUN, "data.num_workers=1", ranks=2, troubles=held)
    deadline = time.monotonic() + 30
    while not Path("there").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert f"run_dir=run is in use: process {first.pids[0]} on " in runs.run(*RUN, ranks=2).message
    Path("there").unlink()
    ended = first.ended()
    assert ended.statuses == [0, 0], ended
    assert outcome() == undisturbed(runs, ranks=2)


@pytest.mark.alone
def test_a_folder_is_free_when_its_job_was_killed(runs: Starter) -> None:
    """At once, though the data loader's workers live on for some seconds."""
    ended = runs.run(*RUN, "data.num_workers=2", troubles=[trouble("forward", "SIGKILL", nth=20)])
    assert ended.statuses == [-signal.SIGKILL]
    began = time.monotonic()
    ended = runs.run(*RUN)
    assert ended.statuses == [0]
    assert time.monotonic() - began < 4, "not after the patience for a lock"
    assert outcome() == undisturbed(runs)
    assert leftovers() == []
    assert (Path("run") / MODEL_FILE).exists()
