"""The first micro-step of an updater."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from distaccum import Accumulator, TaskOutput, WindowLoader
from distaccum.config.enums import PrecisionName
from distaccum.runtime.devices import Precision
from distaccum.training.memory_line import MemoryLine
from distaccum.training.optim import Schedule
from distaccum.training.supervision import Supervision
from distaccum.training.update import Updater


def test_memory_is_that_of_the_first_micro_batch_in_this_process(caplog: pytest.LogCaptureFixture) -> None:
    """After micro-batches of another process, too, whose sizes may be others."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def task(model: nn.Module, batch: Tensor) -> TaskOutput:
        return TaskOutput(model(batch).square().sum(), len(batch))

    accumulator = Accumulator(model, optimizer)
    said = []
    for done in (0, 1):
        updater = Updater(
            task=task,
            accumulator=accumulator,
            schedule=Schedule(optimizer, lambda update: 1.0),
            precision=Precision(PrecisionName.fp64, "cpu"),
            supervision=Supervision(accumulator.strategy),
            memory_line=MemoryLine(accumulator.strategy, optimizer),
        )
        loader = WindowLoader(torch.randn(7, 4, dtype=torch.float64), global_batch_size=7, micro_batch_size=6)
        window = next(loader.epoch(0, 0, done))
        assert window.sizes == (4, 3)
        for batch in window:
            updater._forward(window, batch)
        with caplog.at_level(logging.INFO, "distaccum"):
            updater.memory_line.log_once()
        said.append(caplog.messages[-1].split("activations ")[1].split(" MB")[0])
    (samples, first), (left, second) = (text.split(" × ") for text in said)
    assert (samples, left) == ("4", "3")
    assert first == second
