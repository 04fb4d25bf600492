from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from distaccum.config import DDPConfig, SingleConfig
from distaccum.config.compose import compose
from distaccum.config.enums import PrecisionName
from distaccum.config.optimizers import SGDConfig
from distaccum.config.tools import MemoryConfig
from distaccum.errors import UserError
from distaccum.runtime.devices import Precision
from distaccum.tasks import LossTerm, TaskOutput
from distaccum.tools.memory.measuring import Setting, measure
from distaccum.tools.memory.run import examine, memory

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
    rows = {row.setting: row for row in report.rows}
    configured = rows["configured"]
    assert (configured.accumulation_steps, configured.micro_batch) == (4, 4)
    assert rows["K = 1"].micro_batch == 16
    assert rows["K = 1"].peak > 2 * configured.peak - configured.rest
    assert rows["loss in chunks"].overrides == "task.chunked_loss=true"
    assert rows["loss in chunks"].peak < configured.peak
    assert rows["activation checkpointing on"].peak < configured.peak
    assert rows["activation checkpointing on"].activations < 0.5 * configured.activations
    zero = rows["ddp shard_optimizer=true, 2 ranks"].footprint
    assert zero.optimizer < 0.6 * configured.footprint.optimizer
    sharded = rows["fsdp, 2 ranks"].footprint
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(sharded, part) == pytest.approx(getattr(configured.footprint, part) / 2, rel=0.02)


def test_ways_to_accumulate_under_fsdp(report: Any) -> None:
    rows = {row.accumulate: row for row in report.rows if row.accumulate}
    assert {row.overrides for row in rows.values()} == {
        "strategy=fsdp",
        "strategy=fsdp strategy.accumulate=sharded",
        "strategy=fsdp strategy.accumulate=node strategy.shard_size=1",
    }
    whole = report.configured.footprint
    for way, share in (("whole", 2), ("sharded", 2), ("node", 1)):
        assert rows[way].accumulation_steps == 2
        for part in ("parameters", "gradients", "optimizer"):
            assert getattr(rows[way].footprint, part) == pytest.approx(getattr(whole, part) / share, rel=0.02)
    assert rows["sharded"].peak < rows["whole"].peak - 0.3 * whole.gradients

    def words(usable: int) -> str:
        return " ".join(replace(report, usable=usable).words())

    assert "Take whole, which fits and sends least; over a slow link between nodes take node." in words(report.usable)
    assert "Take sharded, as whole gradients do not fit." in words(rows["sharded"].peak)
    assert "None fits." in words(rows["sharded"].peak - 1)


def test_the_ranks_of_a_node_must_be_said() -> None:
    with pytest.raises(UserError, match=r"Say how many there are: strategy.shard_size=8"):
        examine(composed("strategy=fsdp", "strategy.accumulate=node", "memory.world_size=4"))


def test_other_sizes_are_predicted(report: Any) -> None:
    for row in report.rows:
        points = dict(row.footprint.peak)
        largest = max(points)
        measured = points.pop(largest)
        assert type(row.line)(points).at(largest) == pytest.approx(measured, rel=0.1), row.setting


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
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        memory(composed())


class OutOfMemoryAbove:
    """A task for which memory runs out in micro-batches of more than so many samples."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, model: nn.Module, batch: Tensor) -> TaskOutput:
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("injected")
        return TaskOutput(model(batch).sum(), len(batch))


def _measured(most: int) -> Any:
    setting = Setting(
        strategy=SingleConfig(),
        world_size=1,
        accumulation_steps=1,
        optim=SGDConfig(),
        activation_checkpointing=False,
        device=torch.device("cpu"),
        precision=Precision(PrecisionName.fp32, "cpu"),
    )
    return measure(nn.Linear(3, 2), setting, OutOfMemoryAbove(most), lambda n: torch.ones(n, 3), [1, 2, 4])


class TwoTerms:
    """Two losses of one output; with `apart=False` as one loss."""

    def __init__(self, *, apart: bool) -> None:
        self._apart = apart
        if apart:
            self.weights = lambda batch: {"main": len(batch), "other": len(batch)}

    def __call__(self, model: nn.Module, batch: Tensor) -> TaskOutput:
        outputs = model(batch)
        main, other = outputs.sum(), outputs.square().sum()
        if not self._apart:
            return TaskOutput(main + other, len(batch))
        return TaskOutput(main, len(batch), terms={"other": LossTerm(other, len(batch))})


@pytest.mark.parametrize(("strategy", "world_size"), [(SingleConfig(), 1), (DDPConfig(), 2)])
def test_terms_take_no_second_buffer_of_gradients(strategy: Any, world_size: int) -> None:
    setting = Setting(
        strategy=strategy,
        world_size=world_size,
        accumulation_steps=3,
        optim=SGDConfig(),
        activation_checkpointing=False,
        device=torch.device("cpu"),
        precision=Precision(PrecisionName.fp32, "cpu"),
    )
    found = [
        measure(nn.Linear(1000, 500), setting, TwoTerms(apart=apart), lambda n: torch.ones(n, 1000), [1])
        for apart in (False, True)
    ]
    one, two = (footprint.peak[1] for footprint in found)
    assert one > 2 * found[0].gradients
    assert two - one < 0.01 * found[0].gradients


def test_sizes_for_which_memory_runs_out_are_left_out() -> None:
    assert list(_measured(most=4).peaks) == [1, 2, 4]
    found = _measured(most=2)
    assert list(found.peaks) == list(found.activations) == list(found.batches) == [1, 2]
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        _measured(most=0)


@pytest.mark.parametrize("also_configured", [False, True])
def test_a_setting_that_does_not_fit_is_an_answer(
    also_configured: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def without_room(*arguments: Any, **options: Any) -> Any:
        if arguments[1].activation_checkpointing or also_configured:
            raise torch.OutOfMemoryError("injected")
        return measure(*arguments, **options)

    monkeypatch.setattr("distaccum.tools.memory.run.measure", without_room)
    status = memory(composed())
    said = capfd.readouterr()
    assert status == also_configured
    if also_configured:
        assert said.err.startswith("error: it does not fit: memory ran out on cpu with micro-batches of 1, ")
        assert "Traceback" not in said.err
    else:
        assert "Not measured: activation checkpointing on (memory ran out)." in said.out


class Scaled(nn.Module):
    """With a parameter of no dimension, which FSDP can't shard."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens.long()) * self.scale  # type: ignore[no-any-return]


def test_placements_that_a_model_cannot_have_are_left_out_and_evaluations_count() -> None:
    small = composed("model=custom", f"model._target_={__name__}.Scaled", "train.eval_batch_size=64")
    report = examine(small)
    assert report.configured.moment == "evaluation"
    assert report.configured.footprint.peaks[4]["evaluation"] > 4 * report.configured.footprint.peaks[4]["forward"] / 3
    assert "Not measured: fsdp, 2 ranks (strategy=fsdp can't shard scale, a parameter of shape []);" in " ".join(
        report.words()
    )
    assert {"configured", "ddp, 2 ranks"} <= {row.setting for row in report.rows}
    small.train.eval_batch_size = None
    small.memory.alternatives = False
    assert examine(small).configured.moment != "evaluation"


class Points(torch.utils.data.Dataset[tuple[Tensor, int]]):
    num_classes = 3

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), float(index)), index % 3


class WithBatchNorm(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))


NORMALISED = [
    "data=custom",
    f"data.train._target_={__name__}.Points",
    "task=classification",
    "model=custom",
    f"model._target_={__name__}.WithBatchNorm",
    "device=cpu",
    "memory.world_size=2",
]


def examined(*overrides: str) -> Any:
    return examine(compose([*NORMALISED, *overrides], config_name="memory"))  # type: ignore[arg-type]


def test_batchnorm_is_measured_with_two_samples_or_more() -> None:
    report = examined("batch.global_batch_size=4")
    assert sorted(report.configured.footprint.peaks) == [2, 4]
    assert "ddp, 2 ranks" in {row.setting for row in report.rows}


def test_batchnorm_with_one_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"micro-batches of 1 can't be measured: BatchNorm needs .* GroupNorm"):
        examined("batch.global_batch_size=4", "batch.micro_batch_size=1")


def test_placements_with_more_ranks_than_a_window_has_samples_are_left_out() -> None:
    report = examined("batch.global_batch_size=2", "memory.world_size=3", "batch.micro_batch_size=2")
    assert report.configured.micro_batch == 2
    assert "ddp, 3 ranks (a window of 2 has no sample for each rank)" in report.left_out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["compile=true"], "compile=true has another peak"),
        (["batch.schedule=ramp", "batch.ramp_from=4", "batch.ramp_updates=9"], "memory measures windows of one size"),
    ],
)
def test_what_it_would_measure_wrong_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        composed(*overrides)
