from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from distaccum.entry import compose
from distaccum.errors import UserError
from distaccum.footprint.running import examine, memory
from distaccum.tool_configs import MemoryConfig

SMALL = [
    "data=text",
    "data.max_length=32",
    "model=gpt",
    "task=language_modeling",
    "device=cpu",
    "batch.global_batch_size=16",
    "batch.micro_batch_size=4",
]


def composed(*overrides: str) -> MemoryConfig:
    config = compose([*SMALL, *overrides], config_name="memory")
    assert isinstance(config, MemoryConfig)
    return config


@pytest.fixture(scope="module")
def report() -> Any:
    return examine(composed())


def test_what_is_at_rest(report: Any) -> None:
    found = report.configured.footprint
    assert found.gradients == found.parameters
    assert 2 * found.parameters <= found.optimizer <= 2.01 * found.parameters
    assert not torch.distributed.is_initialized()


def test_rows(report: Any) -> None:
    rows = {row.label: row for row in report.rows}
    configured = rows["configured"]
    assert (configured.accumulation_steps, configured.micro_batch) == (4, 4)
    assert rows["K = 1"].micro_batch == 16
    assert rows["K = 1"].peak > 2 * configured.peak - configured.rest
    assert rows["activation checkpointing on"].peak < configured.peak
    assert rows["activation checkpointing on"].activations < 0.5 * configured.activations
    zero = rows["ddp shard_optimizer=true, 2 ranks"].footprint
    assert zero.optimizer < 0.6 * configured.footprint.optimizer
    sharded = rows["fsdp, 2 ranks"].footprint
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(sharded, part) == pytest.approx(getattr(configured.footprint, part) / 2, rel=0.02)


def test_other_sizes_are_predicted(report: Any) -> None:
    for row in report.rows:
        points = dict(row.footprint.peak)
        largest = max(points)
        measured = points.pop(largest)
        assert type(row.line)(points).at(largest) == pytest.approx(measured, rel=0.1), row.label


def test_in_words_and_as_json(report: Any) -> None:
    out = StringIO()
    report.print(Console(file=out, width=80))
    text = out.getvalue()
    assert "It fits: " in text
    assert "To save memory, change first: " in text
    assert max(map(len, text.splitlines())) <= 80
    found = json.loads(report.as_json())
    assert found["fits"] is True
    assert found["rows"][0]["activation_bytes_per_sample"] > 0


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory(composed("memory.limit_gb=0.006", "memory.alternatives=false", "memory.json=true")) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    most = found["rows"][0]["largest_micro_batch"]
    assert 1 <= most < 4
    assert f"batch.micro_batch_size={most}" in " ".join(found["words"])


def test_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        memory(composed())
