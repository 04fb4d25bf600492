"""The ready-made trackers: what they wrote is read back by their own readers."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import records
from trackers_reading import READERS, mlflow_run, of_csv, of_mlflow

from distaccum.errors import UserError
from distaccum.observers import CsvTables, MetricsFile, MLflow, Observer, TensorBoard, background
from distaccum.observers import tracker as tracker_module
from distaccum.observers.tracker import Tracker

ROOT = Path(__file__).parent.parent.parent
TRACKERS: dict[str, type[Tracker]] = {"csv": CsvTables, "tensorboard": TensorBoard, "mlflow": MLflow}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's, which takes it seconds to make."""
    run_dir = tmp_path_factory.mktemp("tables")
    tracker = MLflow()
    tracker.on_start(records.start(run_dir))
    tracker.close()
    return run_dir / "mlflow" / "mlflow.db"


@pytest.fixture(params=TRACKERS)
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "mlflow":
        (tmp_path / "mlflow").mkdir()
        shutil.copy(request.getfixturevalue("tables"), tmp_path / "mlflow")
    return str(request.param)


def _run(run_dir: Path, trackers: list[Observer], updates: range, evaluated: list[int], loss: float = 0.5) -> None:
    """Makes updates as a trainer would; those at which nothing is evaluated only once are evaluated first."""
    observers = [MetricsFile(run_dir, continues=True), *trackers]
    for observer in observers:
        observer.on_start(records.start(run_dir, resumed_update=updates.start - 1))
    for number in (updates.start - 1, *updates):
        for observer in observers:
            if number in updates:
                scale = {"noise_scale": 5.0, "noise_scale_error": math.inf} if number % 4 == 3 else {}
                observer.on_update(records.update(number, loss=loss + number, **scale))
            if number in evaluated:
                sample = f"{number} → “{loss}”"
                observer.on_evaluation(records.evaluation(number, metrics={"loss": loss - number}, sample=sample))
    observers[0].close()


def _end(run_dir: Path, tracker: Observer, **changes: Any) -> None:
    tracker.on_end(records.end(run_dir, **changes))
    tracker.close()


def test_a_run_reads_back(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ), sys.excepthook, logging.getLogger().handlers[:]
    tracker = TRACKERS[name]()
    _run(tmp_path, [tracker], range(1, 6), [2, 4])
    tracker.on_update(records.update(6, loss=math.nan, terms={"aux, 2": 0.25}, layers={"(rest)": {"grad_norm": 0.125}}))
    _end(tmp_path, tracker)
    tracker.close()
    read = READERS[name]
    assert read(tmp_path, "train/loss")[:5] == [(number, 0.5 + number) for number in range(1, 6)]
    assert math.isnan(read(tmp_path, "train/loss")[5][1])
    assert read(tmp_path, "eval/loss") == [(2, -1.5), (4, -3.5)]
    assert read(tmp_path, "train/noise_scale") == [(3, 5.0)], "only where it was measured"
    cleaned = str.maketrans("(),", "___") if name == "mlflow" else {}
    assert read(tmp_path, "train/loss/aux, 2".translate(cleaned)) == [(6, 0.25)]
    assert read(tmp_path, "train/layers/(rest)/grad_norm".translate(cleaned)) == [(6, 0.125)]
    if name != "tensorboard":  # whose numbers have 32 bits
        assert read(tmp_path, "train/grad_norm") == [(number, 1 / 3) for number in range(1, 7)]
    assert (dict(os.environ), sys.excepthook, logging.getLogger().handlers[:]) == before
    assert capfd.readouterr() == ("", "")


def test_a_killed_run_that_goes_on_has_each_update_once(tmp_path: Path, name: str) -> None:
    """Also an evaluation that comes again, and with the numbers of the run that went on."""
    _run(tmp_path, [killed := TRACKERS[name]()], range(1, 8), [0, 2, 4, 6])
    _kill(killed)
    tracker = TRACKERS[name]()
    _run(tmp_path, [tracker], range(5, 10), [4, 8], loss=0.25)
    _end(tmp_path, tracker)
    expected = [(number, number + (0.5 if number < 5 else 0.25)) for number in range(1, 10)]
    assert READERS[name](tmp_path, "train/loss") == expected
    assert READERS[name](tmp_path, "eval/loss") == [(0, 0.5), (2, -1.5), (4, -3.5), (8, -7.75)]
    assert READERS[name](tmp_path, "train/noise_scale") == [(3, 5.0), (7, 5.0)]


def _kill(tracker: Tracker) -> None:
    """Ends a tracker as a killed process would, once what its thread does has been done."""
    assert tracker._background is not None
    assert tracker._background.end(60)


def test_an_evaluation_that_a_killed_run_still_owed_is_there_once(tmp_path: Path, name: str) -> None:
    _run(tmp_path, [killed := TRACKERS[name]()], range(1, 5), [2])
    _kill(killed)
    tracker = TRACKERS[name]()
    _run(tmp_path, [tracker], range(5, 6), [4])
    _end(tmp_path, tracker)
    assert READERS[name](tmp_path, "eval/loss") == [(2, -1.5), (4, -3.5)]


def test_a_tracker_that_comes_later_has_the_whole_run(tmp_path: Path, name: str) -> None:
    _run(tmp_path, [], range(1, 5), [2, 4])
    tracker = TRACKERS[name]()
    _run(tmp_path, [tracker], range(5, 7), [6])
    _end(tmp_path, tracker)
    assert READERS[name](tmp_path, "train/loss") == [(number, 0.5 + number) for number in range(1, 7)]
    assert READERS[name](tmp_path, "eval/loss") == [(2, -1.5), (4, -3.5), (6, -5.5)]
    assert READERS[name](tmp_path, "train/noise_scale") == [(3, 5.0)]


def test_what_a_tracker_has_missed_is_filled_in(tmp_path: Path, name: str) -> None:
    _run(tmp_path, [killed := TRACKERS[name]()], range(1, 3), [])
    _kill(killed)
    _run(tmp_path, [], range(3, 6), [2, 4])
    tracker = TRACKERS[name]()
    _run(tmp_path, [tracker], range(6, 7), [])
    _end(tmp_path, tracker)
    assert READERS[name](tmp_path, "train/loss") == [(number, 0.5 + number) for number in range(1, 7)]
    assert READERS[name](tmp_path, "eval/loss") == [(2, -1.5), (4, -3.5)]


def test_a_run_that_was_killed_before_it_saved_begins_anew(tmp_path: Path, name: str) -> None:
    _run(tmp_path, [killed := TRACKERS[name]()], range(1, 4), [2])
    _kill(killed)
    tracker = TRACKERS[name]()
    _run(tmp_path, [tracker], range(1, 3), [], loss=0.25)
    _end(tmp_path, tracker)
    assert READERS[name](tmp_path, "train/loss") == [(1, 1.25), (2, 2.25)]
    assert READERS[name](tmp_path, "eval/loss") == []


def test_a_missing_package_says_how_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (
        ("mlflow", "sqlalchemy"),
        ("mlflow", "mlflow"),
        ("tensorboard", "tensorboard.compat.proto.event_pb2"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        tracker = TRACKERS[name]()
        with pytest.raises(UserError, match=rf"observers={name} needs .*pip install \"distaccum\[{name}\]\""):
            tracker.on_start(records.start(tmp_path))
        tracker.close()


def test_a_tracker_that_fails_stops_no_run(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its files are gone."""
    tracker = TRACKERS[name]()
    tracker.on_start(records.start(tmp_path))
    shutil.rmtree(tmp_path / name)
    if isinstance(tracker, MLflow):
        tracker._run_id = "gone"
    for number in (1, 2, 3):
        tracker.on_update(records.update(number))
    tracker.close()
    warnings = [entry.getMessage() for entry in caplog.records if entry.name.startswith("distaccum")]
    (warning,) = warnings
    assert warning.startswith(f"{name} has failed (")
    assert warning.endswith(": training goes on, and nothing more is logged there.")


def test_a_tracker_that_hangs_holds_up_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 3)
    monkeypatch.setattr(tracker_module, "_SECONDS_TO_END", 0.1)
    tracker, goes_on = CsvTables(), threading.Event()
    tracker.on_start(records.start(tmp_path))
    monkeypatch.setattr(tracker, "_write", lambda rows: goes_on.wait(60))
    for number in range(1, 9):
        tracker.on_update(records.update(number))
    tracker.close()
    goes_on.set()
    assert [entry.getMessage() for entry in caplog.records] == [
        "csv has failed (it takes nothing): training goes on, and nothing more is logged there."
    ]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    for name, tracker in TRACKERS.items():
        (tmp_path / name).write_text("in the way")
        with pytest.raises(UserError, match=rf"^observers={name} cannot .*leave {name} out of observers\.$"):
            tracker().on_start(records.start(tmp_path))
        with pytest.raises(UserError, match=rf"^observers={name} writes into the folder of the run"):
            tracker().on_start(records.start(None))


def test_trackers_are_imported_only_when_used() -> None:
    names = ("mlflow", "tensorboard", "torch", "wandb")
    code = f"import sys, distaccum.observers; sys.exit(any(name in sys.modules for name in {names}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Of one of them


def test_samples_are_texts(tmp_path: Path, tables: Path) -> None:
    """Those of before a resume too, which come from `metrics.jsonl`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "mlflow").mkdir()
    shutil.copy(tables, tmp_path / "mlflow")
    _run(tmp_path, [], range(1, 5), [2, 4])
    trackers = [TensorBoard(), MLflow()]
    _run(tmp_path, [*trackers], range(5, 7), [6], loss=0.25)
    for tracker in trackers:
        _end(tmp_path, tracker)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("eval/sample/text_summary")
    found = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]
    assert found == [(2, "    2 → “0.5”\n"), (4, "    4 → “0.5”\n"), (6, "    6 → “0.25”\n")]
    client, run_id = mlflow_run(tmp_path)
    assert client.get_run(run_id).data.tags["eval/sample"] == "6 → “0.25”"


def test_mlflow_has_the_configuration_and_how_the_run_ended(tmp_path: Path, tables: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(tables, tmp_path / "mlflow")
    tracker = MLflow(experiment="mine", name="first")
    _run(tmp_path, [tracker], range(1, 4), [])
    _end(tmp_path, tracker, interrupted="SIGTERM")
    client, run_id = mlflow_run(tmp_path)
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("first", "KILLED")
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    assert run.data.params["batch.global_batch_size"] == "64"
    assert run.data.params["model._target_"] == "m.Net"

    again = MLflow(experiment="mine", name="first")
    _run(tmp_path, [again], range(4, 5), [])
    assert client.get_run(run_id).info.status == "RUNNING"
    again.close()
    assert mlflow_run(tmp_path)[1] == run_id, "it was stopped where it goes on, and is the same run"
    assert client.get_run(run_id).info.status == "FAILED"

    third = MLflow(experiment="mine", name="first")
    _run(tmp_path, [third], range(3, 6), [])
    _end(tmp_path, third)
    new = mlflow_run(tmp_path)[1]
    stages = {key: client.get_run(key).info.lifecycle_stage for key in (run_id, new)}
    assert stages == {run_id: "deleted", new: "active"}
    assert client.get_run(new).info.status == "FINISHED"


@pytest.mark.parametrize("content", [b"", b"\xff no id", b"0" * 32])
def test_an_id_that_mlflow_does_not_know_is_replaced(tmp_path: Path, tables: Path, content: bytes) -> None:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(tables, tmp_path / "mlflow")
    (tmp_path / "mlflow" / "run_id").write_bytes(content)
    tracker = MLflow()
    _run(tmp_path, [tracker], range(1, 3), [])
    _end(tmp_path, tracker)
    assert of_mlflow(tmp_path, "train/loss") == [(1, 1.5), (2, 2.5)]


def test_a_server_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^observers=mlflow cannot start: .*127.0.0.1.*leave mlflow out"):
        MLflow("http://127.0.0.1:9").on_start(records.start(tmp_path))


def test_tensorboard_has_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard()
    _run(tmp_path, [tracker], range(1, 3), [])
    _end(tmp_path, tracker)
    (text,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("config/text_summary")
    assert b"    batch:\n      global_batch_size: 64\n" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("rest", [0, 100], ids=["killed", "zeros after a power cut"])
def test_half_a_record_of_a_killed_run_goes(tmp_path: Path, rest: int) -> None:
    _run(tmp_path, [killed := TensorBoard()], range(1, 4), [3])
    _kill(killed)
    (path,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(path, path.stat().st_size - 7)
    with open(path, "ab") as file:
        file.write(bytes(rest))
    _run(tmp_path, [tracker := TensorBoard()], range(4, 6), [])
    _end(tmp_path, tracker)
    assert READERS["tensorboard"](tmp_path, "train/loss") == [(number, 0.5 + number) for number in range(1, 6)]
    assert READERS["tensorboard"](tmp_path, "eval/loss") == [(3, -2.5)]


def test_half_a_line_of_a_killed_run_goes(tmp_path: Path) -> None:
    _run(tmp_path, [killed := CsvTables()], range(1, 4), [])
    _kill(killed)
    with open(tmp_path / "csv" / "updates.csv", "a") as file:
        file.write("4,0.87")
    _run(tmp_path, [tracker := CsvTables()], range(4, 6), [])
    _end(tmp_path, tracker)
    assert of_csv(tmp_path, "train/loss") == [(number, 0.5 + number) for number in range(1, 6)]
