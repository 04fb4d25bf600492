from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import forking
import pytest
import yaml
from command_line import files_below

from distaccum.config.redaction import REDACTED, redacted
from distaccum.errors import UserError
from distaccum.training.run_folder import RunFolder, begin, changes, held_run_folder, leave_marker

CONFIG = {"seed": 3, "model": {"_target_": "mine.Net", "sizes": [1, 2]}, "run_dir": None}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def hold(run_dir: str | None, plain: dict[str, Any] | None = None, resume: str = "auto") -> RunFolder:
    """Opens a run folder and closes it again."""
    with held_run_folder(run_dir, resume, CONFIG if plain is None else plain) as folder:
        return folder


def _checkpoint(run_dir: str, update: int = 8) -> None:
    Path(run_dir, "checkpoints", f"update-{update:08d}").mkdir(parents=True)


def test_the_run_folder_holds_the_configuration() -> None:
    folder = hold("a/b")
    assert folder == RunFolder(Path("a/b"), is_restart=False)
    assert yaml.safe_load(Path("a/b/config.yaml").read_text()) == CONFIG
    assert files_below(Path()) == {"a/b/config.yaml", "a/b/run.lock"}


@pytest.mark.parametrize("text", ["a: b", "# no comment", "über", "null", "3", "${seed}", "'", "line\nbreak"])
def test_the_configuration_reads_back_as_it_was(text: str) -> None:
    folder = hold(None, {"wandb": {"name": text}})
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {"wandb": {"name": text}}


def test_each_run_has_a_folder_of_its_own_even_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda pattern: "now")
    assert [str(hold(None).path) for _ in range(3)] == ["runs/now", "runs/now_2", "runs/now_3"]


def test_runs_that_start_at_once_share_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda pattern: "now")
    barrier = threading.Barrier(8)
    made: list[Path] = []

    def make() -> None:
        barrier.wait()
        made.append(hold(None).path)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8


# A folder that holds a run


def test_a_run_with_checkpoints_goes_on() -> None:
    hold("mine", {"seed": 1})
    _checkpoint("mine")
    assert hold("mine", {"seed": 1}).is_restart
    assert Path("mine/config.yaml").read_text() == "seed: 1\n"
    assert hold("mine", {"seed": 2}).is_restart, "whether its windows are the same is for the checkpoint to say"


def test_a_run_that_died_before_its_first_checkpoint_starts_over() -> None:
    hold("mine", {"seed": 1, "run_dir": "mine"})
    Path("mine/metrics.jsonl").write_text('{"update": 1}\n')
    assert hold("mine", {"seed": 1, "run_dir": "./mine"}).is_restart


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_the_results_of_another_run_are_refused_and_left_as_they_were(resume: str) -> None:
    hold("mine", {"seed": 1})
    Path("mine/metrics.jsonl").write_text('{"update": 1}\n')
    before = {name: Path(name).read_bytes() for name in files_below(Path())}
    with pytest.raises(UserError, match=r"^run_dir=mine holds the results of another run, .+ or remove that one\.$"):
        hold("mine", {"seed": 2}, resume)
    after = {name: Path(name).read_bytes() for name in files_below(Path())}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name != "mine/run.lock")


def test_a_run_with_checkpoints_is_refused_when_it_is_to_begin_anew() -> None:
    _checkpoint("mine")
    with pytest.raises(UserError, match=r"^run_dir=mine holds the results of another run, which would be"):
        hold("mine", resume="none")


def test_a_run_that_failed_before_its_first_update_can_be_started_again() -> None:
    hold("mine", {"seed": 1})
    assert not hold("mine", {"seed": 2}).is_restart
    assert Path("mine/config.yaml").read_text() == "seed: 2\n"


def test_what_a_killed_run_left_half_written_is_cleared_away() -> None:
    _checkpoint("mine", 8)
    for name in (".writing-00000012", ".removed-update-00000004"):
        Path("mine/checkpoints", name).mkdir()
    hold("mine")
    assert [path.name for path in Path("mine/checkpoints").iterdir()] == ["update-00000008"]


def test_the_marker_of_an_unfinished_run_goes_when_it_goes_on() -> None:
    folder = hold("mine")
    leave_marker(folder.path, 7, "SIGTERM")
    left = json.loads(Path("mine/unfinished.json").read_text())
    assert (left["update"], left["signal"]) == (7, "SIGTERM")
    _checkpoint("mine")
    folder = hold("mine", {"seed": 2})
    assert Path("mine/unfinished.json").exists(), "it may still be refused"
    begin(folder, {"seed": 2})
    assert not Path("mine/unfinished.json").exists()
    assert Path("mine/config.yaml").read_text() == "seed: 2\n"


def test_files_of_others_in_the_folder_are_left_alone() -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    hold("mine")
    assert Path("mine/notes.txt").read_text() == "keep"


def test_a_restart_by_torchrun_finds_its_folder_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    first = hold(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "that")
    other = hold(None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert hold(None).path == other.path
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    assert hold(None).path == first.path
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a third")
    assert hold(None).path not in (first.path, other.path)


# A folder that can't be had


def test_a_second_job_on_one_folder_is_refused() -> None:
    code = "import sys; from test_run_folder import hold; from distaccum.errors import UserError\n"
    code += "try: hold('mine')\nexcept UserError as error: sys.exit(str(error))"
    with held_run_folder("mine", "auto", CONFIG):
        before = Path("mine/config.yaml").read_bytes()
        done = subprocess.run([forking.python(), "-c", code], capture_output=True, text=True, check=False, env=_env())
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("run_dir=mine is in use: process "), done.stderr
        assert Path("mine/config.yaml").read_bytes() == before
    done = subprocess.run([forking.python(), "-c", code], capture_output=True, text=True, check=False, env=_env())
    assert done.returncode == 0, done.stderr


def _env() -> dict[str, str]:
    import os

    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parent.parent, here.parent, here)))}


@pytest.mark.parametrize("run_dir", ["file", "file/run", "file/a/b"])
def test_a_folder_that_cannot_be_made_is_refused(run_dir: str) -> None:
    Path("file").write_text("not a folder")
    with pytest.raises(UserError, match=rf"^the run folder {run_dir} can't be written: .+\. Choose another with run_"):
        hold(run_dir)
    assert Path("file").read_text() == "not a folder"


def test_a_runs_folder_that_cannot_be_made_is_refused() -> None:
    Path("runs").write_text("not a folder")
    with pytest.raises(UserError, match=r"^the run folder runs can't be written: Not a directory\. Choose another"):
        hold(None)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"^run_dir is empty\. Name a folder, or leave run_dir out"):
        hold("")
    assert files_below(Path()) == set()


# Secrets, and what has changed


def test_secrets_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "hunter2hunter2")
    plain = {
        "observers": {"mail": {"password": "secret", "url": "https://hunter2hunter2@example.org", "port": 25}},
        "model": {"num_tokens": 512, "tokenizer": "bytes", "keys": ["a"]},
    }
    assert redacted(plain) == {
        "observers": {"mail": {"password": REDACTED, "url": REDACTED, "port": 25}},
        "model": {"num_tokens": 512, "tokenizer": "bytes", "keys": ["a"]},
    }
    hold("mine", plain)
    assert "hunter2" not in Path("mine/config.yaml").read_text()
    assert "secret" not in Path("mine/config.yaml").read_text()


def test_changes_are_told_as_far_as_they_are_the_runs_own() -> None:
    before = {"optim": {"lr": 0.1, "eps": float("nan")}, "run_dir": "a", "wandb": {"mode": "offline"}}
    now = {"optim": {"lr": 0.2, "eps": float("nan")}, "run_dir": "b", "wandb": {"mode": "online"}, "seed": 0}
    assert changes(before, now) == ["optim.lr: 0.1 → 0.2", "seed: None → 0"]
