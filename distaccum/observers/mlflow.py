"""Logs the run's numbers to MLflow."""

from __future__ import annotations

import logging
import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from distaccum.config.basics import flat
from distaccum.observers.background import default_environment
from distaccum.observers.base import RunEnd, RunStart
from distaccum.observers.tracker import Row, Tracker
from distaccum.runtime.files import write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_MOST_METRICS = 1000
"""Most that MLflow takes in one call."""
_MOST_PARAMS = 100
_MOST_CHARACTERS = 6000
"""Longest value of a parameter or a tag."""

_KEYS = {"train": "train/samples", "eval": "eval/loss"}
"""A metric that each row of the group has."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # At the start a user waits for the message, which by default comes after minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


class MLflow(Tracker):
    """Logs metrics over the number of the update, the configuration as parameters, and the last sample as a tag, to a
    database in the run folder, `mlflow/mlflow.db`, or to a server. MLflow is imported when the run starts.

    A run that goes on is the same run to MLflow: its id is in `mlflow/run_id`. MLflow can't drop values of a run: if it
    has some of updates that will be made again, a new run gets the history, and the old one is deleted (which
    `mlflow.tracking.MlflowClient.restore_run` takes back).
    """

    NAME = "mlflow"

    def __init__(self, tracking_uri: str | None = None, experiment: str = "distaccum", name: str | None = None) -> None:
        """
        Args:
            tracking_uri: a server or a database; None: a database in the run folder.
            experiment: name of the experiment, which is made if it isn't there.
            name: of the run; None: that of the run folder.
        """
        super().__init__()
        self._tracking_uri = tracking_uri
        self._experiment = experiment
        self._name = name
        self._run_id = ""
        self._client: MlflowClient

    def _open(self, run_dir: Path, start: RunStart, history: list[Row]) -> list[Row]:
        folder = run_dir.absolute() / "mlflow"
        folder.mkdir(exist_ok=True)
        with default_environment(**_ENVIRONMENT), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of MLflow's own use of SQLAlchemy
            from mlflow import MlflowClient

            if self._tracking_uri is None:
                import sqlalchemy  # noqa: F401  # without it MLflow says that it doesn't know databases

            self._client = MlflowClient(self._tracking_uri or f"sqlite:///{folder / 'mlflow.db'}")
            path = folder / "run_id"
            old = path.read_bytes().strip().decode("ascii", "replace") if path.exists() else ""
            logged = self._logged(old) if old else None
            if logged is not None and logged <= {(row.group, row.update) for row in history}:
                self._run_id = old
                self._client.update_run(old, status="RUNNING")
                return [row for row in history if (row.group, row.update) not in logged]
            self._run_id = self._new_run(folder, start)
            write_text(path, f"{self._run_id}\n")
            if logged is not None:
                self._client.delete_run(old)
        return history

    def _logged(self, run_id: str) -> set[tuple[str, int]] | None:
        """Returns group and update of each row that a run has; None if there is no such run."""
        from mlflow.exceptions import MlflowException

        try:
            if self._client.get_run(run_id).info.lifecycle_stage != "active":
                return None
        except MlflowException as error:
            said = str(error).partition("\n")[0]
            logger.warning("mlflow can't go on with the run %s, and makes a new one: %s", run_id, said)
            return None
        return {
            (group, metric.step)
            for group, key in _KEYS.items()
            for metric in self._client.get_metric_history(run_id, key)
        }

    def _new_run(self, folder: Path, start: RunStart) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            artifacts = None if self._tracking_uri else (folder / "artifacts").as_uri()
            experiment_id = self._client.create_experiment(self._experiment, artifact_location=artifacts)
        run_id: str = self._client.create_run(experiment_id, run_name=self._name or folder.parent.name).info.run_id
        values = {_allowed(key): str(value)[:_MOST_CHARACTERS] for key, value in flat(start.config).items()}
        params = [Param(key, value) for key, value in values.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MOST_PARAMS])
        return run_id

    def _write(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), x, now, row.update) for row in rows for name, x in row.named().items()]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _MOST_METRICS])
        if samples := [row.sample for row in rows if row.sample is not None]:
            self._client.set_tag(self._run_id, "eval/sample", samples[-1][:_MOST_CHARACTERS])

    def _close(self, end: RunEnd | None) -> None:
        status = "FAILED" if end is None else "FINISHED" if end.interrupted is None else "KILLED"
        self._client.set_terminated(self._run_id, status)


def _allowed(name: str) -> str:
    """Returns a name with `_` for the characters that MLflow refuses."""
    return re.sub(r"[^/\w.\- :]", "_", name)
