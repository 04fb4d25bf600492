"""Sweeps (`-m`): the folders of their points, a table of what each came to, and the number that a sweeper optimises."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from distaccum.config import TrainConfig
from distaccum.config.redaction import redacted
from distaccum.errors import UserError

TABLE = "points.csv"
_OPTIMISING = ("direction", "ax_config", "optim")
"""Keys, one of which the section `hydra.sweeper` has if the sweeper optimises: Optuna's, Ax's, Nevergrad's."""


class Finished(NamedTuple):
    """A run that has come to its end."""

    run_dir: str
    metric: str
    """Name of the metric that it is measured by."""
    best: Callable[[], float | None]
    """Returns the best value of the metric; None if the run had no evaluation."""


class Sweep:
    """The points so far of this process; of a single run, nothing.

    Attributes:
        table: the file with a line for each point, beside Hydra's own record of the sweep; None without a point.
    """

    def __init__(self) -> None:
        self.table: Path | None = None
        self._folders: set[str] = set()

    def begin(self, config: TrainConfig) -> None:
        """Checks a point.

        Raises:
            UserError: ranks would sweep; two points share a folder, where the second would resume the first's run; or
                the sweeper is to optimise what is not evaluated.
        """
        hydra = HydraConfig.get()
        if hydra.mode is not RunMode.MULTIRUN:
            return
        if "RANK" in os.environ:
            raise UserError(
                "-m (multirun) under torchrun would make every rank run the whole sweep. Sweep outside: one torchrun "
                "for each point."
            )
        run_dir = config.run_dir
        folder = os.path.realpath(os.path.expanduser(run_dir or ""))
        # A point's own override is a word of the command line only if all points have it.
        if run_dir is not None and (folder in self._folders or f"run_dir={run_dir}" in sys.argv):
            raise UserError(
                f"run_dir={run_dir} is one folder for several points of -m, which would go on with each other's run. "
                "Give each its own, as in 'run_dir=sweep/${optim.lr}', or leave run_dir out."
            )
        self._folders.add(folder)
        if type(config) is TrainConfig and config.data.evaluation is None and set(_OPTIMISING) & set(hydra.sweeper):
            raise UserError(
                "the sweeper optimises a metric of the evaluations, and there is no evaluation data: set "
                "data.evaluation, and checkpoint.best_metric to the metric's name."
            )

    def end(self, run: Finished) -> float | None:
        """Adds a point to the table; returns the number that the sweeper optimises.

        Raises:
            UserError: the evaluations don't have the metric, or the table can't be written.
        """
        hydra = HydraConfig.get()
        if hydra.mode is not RunMode.MULTIRUN:
            return None
        value = run.best()
        self.table = Path(hydra.sweep.dir, TABLE)
        own = [override for override in hydra.overrides.task if override not in sys.argv]
        point = " ".join(_shown(override) for override in own)
        is_new = not self.table.exists()
        try:
            self.table.parent.mkdir(parents=True, exist_ok=True)
            with open(self.table, "a", newline="") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(["point", "metric", "best", "run_dir"])
                writer.writerow([point, run.metric, "" if value is None else value, run.run_dir])
        except OSError as error:
            raise UserError(f"{self.table} can't be written: {error}. Make room, or set hydra.sweep.dir.") from error
        return value


def _shown(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={redacted(value, key.rpartition('.')[2])}"
