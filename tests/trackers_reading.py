"""Reads what the ready-made trackers wrote, by their own readers."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]
"""Update and value of each entry, in the order of the file; of MLflow, which has no order, sorted."""


def of_csv(run_dir: Path, name: str) -> Points:
    group, _, column = name.partition("/")
    with open(run_dir / "csv" / {"train": "updates.csv", "eval": "evaluations.csv"}[group], newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    return [(int(row["update"]), float(row[column])) for row in rows if row.get(column)]


def of_tensorboard(run_dir: Path, name: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    if name not in reader.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in reader.Scalars(name)]


def mlflow_run(run_dir: Path) -> tuple[Any, str]:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{run_dir}/mlflow/mlflow.db"), (run_dir / "mlflow" / "run_id").read_text().strip()


def of_mlflow(run_dir: Path, name: str) -> Points:
    client, run_id = mlflow_run(run_dir)
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


READERS: dict[str, Callable[[Path, str], Points]] = {
    "csv": of_csv,
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
}
