"""`python -m distaccum.check` as it is started: alone, and on ranks."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
from pathlib import Path

import forking
import pytest
from command_line import Ended, message_of_ranks, start
from examining import POINTS
from launching import ROOT, torchrun

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(ROOT), str(HERE)])
SMALL = ["batch.global_batch_size=12", "batch.micro_batch_size=4", "device=cpu", "model=custom"]


def check(*arguments: str, cwd: Path) -> Ended:
    return start(*arguments, tool="check", folder=cwd, PYTHONPATH=PATH)


def test_equal(tmp_path: Path) -> None:
    ended = check(*POINTS, *SMALL, "model._target_=zoo.PartlyUnused", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[0].startswith("EQUAL: the update is that of the large batch, to ")
    assert "micro-batches of 1" in ended.out
    assert "never_called.weight" in ended.out
    assert ended.err == ""
    assert list(tmp_path.iterdir()) == []


def test_not_equal_as_json(tmp_path: Path) -> None:
    ended = check(*POINTS, *SMALL, "model._target_=zoo.WithBatchNorm", "--json", cwd=tmp_path)
    assert ended.status == 1, ended.err
    found = json.loads(ended.out)
    assert found["equal"] is False
    assert found["status"] == 1
    assert found["verdict"].startswith("NOT EQUAL: ")
    assert found["findings"][0]["kind"] == "mixes_samples"
    assert found["findings"][0]["where"] == "layers.1 (BatchNorm1d)"
    # BatchNorm refuses a single sample in training: the row says why.
    refused = next(row for row in found["rows"] if row["cut"] == "micro-batches of 1")
    assert "more than 1 value per channel" in refused["failure"]
    assert found["parameters"][0]["float64_error"] > 1e-3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["check.windos=3"], "check.windows"),
        (["model._target_=zoo.NoSuchModel"], "NoSuchModel"),
        (["model._target_=zoo.Plain", "task=custom", "task._target_=zoo.NoTask"], "TaskOutput"),
    ],
)
def test_bad_input_ends_with_one_message(arguments: list[str], named: str, tmp_path: Path) -> None:
    assert named in check(*POINTS, *SMALL, *arguments, cwd=tmp_path).message


def test_a_window_of_one_sample_is_not_for_batchnorm(tmp_path: Path) -> None:
    one = [*POINTS, *SMALL, "model._target_=zoo.WithBatchNorm", "batch.micro_batch_size=1"]
    said = check(*one, "batch.global_batch_size=1", cwd=tmp_path).message
    assert "BatchNorm needs more than one value per channel" in said
    assert "GroupNorm" in said
    last = [*POINTS, *SMALL, "model._target_=zoo.WithBatchNorm", "batch.global_batch_size=39"]
    assert "(samples of the windows: 32, 1)" in check(*last, cwd=tmp_path).message


def test_a_terminal_shows_what_is_being_done(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [forking.python(), "-m", "distaccum.check", *POINTS, *SMALL, "model._target_=zoo.Plain", "--json"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": PATH},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal says that nobody writes to it any more
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    out, _ = process.communicate(timeout=120)
    assert json.loads(out)["equal"] is True
    for doing in ("window 1 of 2, float64, one shot", "window 2 of 2, fp32, micro-batches of 1", "slopes of the loss"):
        assert doing in shown.decode()


def on_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return torchrun(2, "-m", "distaccum.check", *POINTS, *SMALL, "--json", *arguments, PYTHONPATH=PATH)


def test_a_healthy_model_on_two_ranks() -> None:
    done = on_ranks("model._target_=zoo.Gated")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["world_size"] == 2
    assert "2 ranks" in found["verdict"]
    rows = [row for row in found["rows"] if row["ranks"] == 2 and row["precision"] == "float64"]
    assert {row["cut"] for row in rows} == {"one micro-step a rank", "three micro-steps a rank", "unequal micro-steps"}
    assert all(row["equal"] and row["worst_error"] < 1e-12 for row in rows)
    # One sync per update, whatever the number of micro-steps.
    assert {row["sync_calls"] for row in rows} == {1}
    # An expert that a rank's last micro-batch doesn't use is what DDP stumbles over.
    sometimes = next(entry for entry in found["findings"] if entry["kind"] == "sometimes_no_gradient")
    assert sometimes["severity"] == "warning"
    assert "find_unused_parameters=true" in sometimes["remedy"]


def test_batchnorm_on_two_ranks() -> None:
    done = on_ranks("model._target_=zoo.WithBatchNorm")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["findings"][0]["where"] == "layers.1 (BatchNorm1d)"
    row = next(row for row in found["rows"] if row["ranks"] == 2 and row["cut"] == "one micro-step a rank")
    assert not row["equal"]
    assert row["gradient_error"] > 1e-3


def test_packed_samples_that_see_each_other_on_two_ranks() -> None:
    packed = ["data.train._target_=zoo.Sequences", "task=language_modeling", "batch=packed", "check.windows=1"]
    done = on_ranks("model._target_=zoo.AttendsAcross", *packed)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert [entry["kind"] for entry in found["findings"]] == ["packed_samples_meet"]
    rows = [row for row in found["rows"] if row["ranks"] == 2]
    assert {row["cut"] for row in rows} >= {"one micro-step a rank, packed", "three micro-steps a rank, packed"}
    assert not any(row["equal"] for row in rows)


def test_bad_input_on_ranks_is_said_once() -> None:
    done = on_ranks("model._target_=zoo.NoSuchModel")
    assert done.stdout == ""
    assert "NoSuchModel cannot be imported" in message_of_ranks(done)
