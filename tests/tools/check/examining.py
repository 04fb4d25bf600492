"""Running the check in this process, on what the zoo holds."""

from __future__ import annotations

import torch

from distaccum.config.compose import compose
from distaccum.runtime.world import joined_world
from distaccum.tools.check import CheckReport, Finding, examine

POINTS = ["data=custom", "data.train._target_=zoo.Points", "task=classification"]
SEQUENCES = ["data=custom", "data.train._target_=zoo.Sequences", "task=language_modeling"]
SMALL = ["batch.global_batch_size=16", "batch.micro_batch_size=4", "device=cpu"]


def examined(
    *overrides: str, model: str | None = "Plain", task: str | None = None, sequences: bool = False, data: bool = True
) -> CheckReport:
    """The report on a model, a task and (unless `data` is off) data of the zoo."""
    arguments = [*(SEQUENCES if sequences else POINTS if data else []), *SMALL]
    if model is not None:
        arguments += ["model=custom", f"model._target_=zoo.{model}"]
    if task is not None:
        arguments += ["task=custom", f"task._target_=zoo.{task}"]
    config = compose([*arguments, *overrides], "check")
    with joined_world() as world:
        return examine(config, world, torch.device("cpu"))


def kinds(report: CheckReport) -> set[str]:
    return {finding.kind for finding in report.findings}


def finding(report: CheckReport, kind: str) -> Finding:
    found = [entry for entry in report.findings if entry.kind == kind]
    assert len(found) == 1, [(entry.kind, entry.where) for entry in report.findings]
    return found[0]
