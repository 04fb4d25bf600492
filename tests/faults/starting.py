"""Training processes that can be troubled."""

from __future__ import annotations

import json
from typing import Any

import forking
from forking import Ended, Running

RUN = (
    "data=custom",
    "data.train._target_=troubles.Points",
    "+data.train.num_samples=100",
    "+data.evaluation._target_=troubles.Points",
    "+data.evaluation.num_samples=20",
    "model=custom",
    "model._target_=troubles.Net",
    "batch.global_batch_size=12",
    "batch.micro_batch_size=2",
    "train.max_updates=8",
    "train.eval_every=3",
    "checkpoint.every_updates=2",
    "run_dir=run",
    "wandb.mode=disabled",
)
"""8 updates of 6 micro-steps on one rank, of 3 on two, with evaluations after the 3rd, 6th and 8th."""

STEPS = 6
"""Micro-steps of an update on one rank."""


class Starter:
    """Starts `distaccum.train` in a process per rank, in the current folder."""

    def start(
        self, *arguments: str, ranks: int = 1, troubles: list[dict[str, Any]] | None = None, **variables: str
    ) -> Running:
        """Returns at once.

        Args:
            troubles: what befalls the ranks.
            variables: of their environment.
        """
        variables["TROUBLES"] = json.dumps(troubles or [])
        return forking.start("-m", "distaccum.train", *arguments, ranks=ranks, **variables)

    def run(self, *arguments: str, **more: Any) -> Ended:
        """Waits for their end."""
        return self.start(*arguments, **more).ended()
