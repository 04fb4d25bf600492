"""Observers watch a run and write down what they see; a run without them comes out the same."""

from distaccum.observers.base import EvaluationRecord, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.observers.csv_tables import CsvTables
from distaccum.observers.early_stopping import EarlyStopping
from distaccum.observers.metrics_file import MetricsFile
from distaccum.observers.mlflow import MLflow
from distaccum.observers.progress import Progress
from distaccum.observers.tensorboard import TensorBoard
from distaccum.observers.wandb import Wandb

__all__ = [
    "CsvTables",
    "EarlyStopping",
    "EvaluationRecord",
    "MLflow",
    "MetricsFile",
    "Observer",
    "Progress",
    "RunEnd",
    "RunStart",
    "TensorBoard",
    "UpdateRecord",
    "Wandb",
]
