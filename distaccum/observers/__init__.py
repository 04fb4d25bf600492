"""Observers watch a run and write down what they see; a run without them comes out the same."""

from distaccum.observers.base import EvaluationRecord, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.observers.early_stopping import EarlyStopping
from distaccum.observers.metrics_file import MetricsFile
from distaccum.observers.progress import Progress
from distaccum.observers.wandb import Wandb

__all__ = [
    "EarlyStopping",
    "EvaluationRecord",
    "MetricsFile",
    "Observer",
    "Progress",
    "RunEnd",
    "RunStart",
    "UpdateRecord",
    "Wandb",
]
