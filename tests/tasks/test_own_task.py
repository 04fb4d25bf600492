"""The task of docs/getting-started.md."""

from __future__ import annotations

import pytest
import torch
from documents import block_run_by
from torch import nn


def test_it_gives_sums_of_which_metrics_are_made() -> None:
    found: dict[str, type] = {}
    exec(block_run_by("tasks/test_own_task.py"), found)
    model = nn.Linear(2, 1)
    task = found["Regression"]()
    output = task(model, (torch.ones(3, 2), torch.zeros(3)))
    assert output.weight == 3
    assert output.loss_sum.requires_grad
    error = float(model(torch.ones(2)).detach().abs())
    assert task.metrics(output.sums, 3.0)["mean absolute error"] == pytest.approx(error)
