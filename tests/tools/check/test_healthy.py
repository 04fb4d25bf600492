"""Models that are right must pass, with nothing blamed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from examining import POINTS, SMALL, examined, finding, kinds

from distaccum.config.compose import compose
from distaccum.errors import UserError
from distaccum.tools.check.report import CheckReport
from distaccum.tools.check.run import _Examination
from distaccum.tools.check.subject import Subject, cuts_of, window_samples
from distaccum.training.build import Parts

GPT = ["model=gpt", "model.width=16", "model.num_heads=2", "model.num_layers=2"]
SYNTHETIC = ["data=synthetic", "data.num_samples=40", "data.input_shape=[1,6,6]"]

HEALTHY: list[tuple[str, dict[str, Any], list[str], set[str]]] = [
    ("LayerNorm", {}, [], set()),
    ("BatchNorm with frozen statistics", {"model": "FrozenBatchNorm"}, ["+data.evaluation._target_=zoo.Points"], set()),
    ("a GPT with ragged lengths", {"model": None, "sequences": True}, GPT, set()),
    ("a GPT with dropout", {"model": None, "sequences": True}, [*GPT, "model.dropout=0.1"], {"random_forward"}),
    ("a packed GPT", {"model": None, "sequences": True}, [*GPT, "batch=packed", "batch.max_tokens=20"], set()),
    ("shared weights", {"model": "Shared", "sequences": True}, [], set()),
    ("packed sequences", {"model": "Recurrent", "sequences": True}, [], set()),
    ("a recurrence with time first", {"model": "TimeFirst", "sequences": True}, [], set()),
    (
        "an encoder that masks padding",
        {"model": "Encoder", "sequences": True},
        ["+model.masked=true"],
        {"random_forward"},
    ),
    ("checkpointed dropout", {"model": "Checkpointed"}, [], {"random_forward"}),
    ("noise added by hand", {"model": "AddsNoise"}, [], {"random_forward"}),
    ("outputs in an object", {"model": "ReturnsAnObject", "task": "OfAnObject"}, [], set()),
    ("two losses", {"task": "WithTerm"}, [], set()),
    ("a loss in float32", {"task": "LossInFloat32"}, [], set()),
    ("checkpointed norms in float32", {"model": "NormsInFloat32", "sequences": True}, ["precision=bf16"], set()),
    ("unused parameters", {"model": "PartlyUnused"}, [], {"no_gradient"}),
    ("experts", {"model": "Gated"}, [], {"sometimes_no_gradient"}),
    ("dropout of three kinds", {"model": "Drops"}, [], {"random_forward"}),
    ("GroupNorm on images", {"model": "Images"}, [], set()),
    ("the built-in CNN", {"model": None, "data": False}, [*SYNTHETIC, "model=cnn", "model.channels=[8,8]"], set()),
    ("the built-in MLP", {"model": None, "data": False}, [*SYNTHETIC, "model=mlp", "model.hidden_sizes=[8]"], set()),
    ("a window of one sample", {}, ["batch.global_batch_size=1", "batch.micro_batch_size=1"], set()),
    ("two samples in all", {}, ["+data.train.num_samples=2"], set()),
    ("one sample in all", {}, ["+data.train.num_samples=1"], set()),
    ("SGD", {}, ["optim=momentum"], set()),
    ("float64", {}, ["precision=fp64"], set()),
    ("bfloat16", {}, ["precision=bf16"], set()),
    ("float16", {}, ["precision=fp16"], set()),
]


@pytest.mark.parametrize(("build", "overrides", "wanted"), [pytest.param(*h[1:], id=h[0]) for h in HEALTHY])
def test_a_healthy_model_passes(build: dict[str, Any], overrides: list[str], wanted: set[str]) -> None:
    report = examined(*overrides, **build)
    assert report.status == 0, report.verdict
    assert report.verdict.startswith("EQUAL")
    assert kinds(report) == wanted
    in_float64 = [row.worst_error for row in report.rows if row.precision == "float64"]
    assert all(error is not None and error < 1e-12 for error in in_float64)


def test_what_is_steep_has_no_wrong_gradient() -> None:
    small = ["data.train._target_=zoo.Pictures", "check.samples=4", "check.windows=1"]
    assert kinds(examined(*small, model="ResNet")) == {"mixes_samples"}


def test_dropout_is_named_where_it_is() -> None:
    report = examined(model="Drops")
    assert report.verdict.startswith("EQUAL up to random numbers (dropout)")
    where = finding(report, "random_forward").where
    assert "layers.1 (Dropout)" in where
    assert "attention (MultiheadAttention)" in where
    assert "the model itself (Drops)" in where  # functional dropout


def test_nothing_of_the_users_is_changed() -> None:
    config = compose([*POINTS, *SMALL, "model=custom", "model._target_=zoo.WithBatchNorm"], "check")
    parts = Parts(config, torch.device("cpu"))
    before = copy.deepcopy(parts.module.state_dict())
    subject = Subject(config, parts, torch.device("cpu"))
    report = CheckReport(
        model="", precision="fp32", world_size=1, tolerance_fp64=1e-10, tolerance=1e-4, windows=[16, 16]
    )
    _Examination(subject, report, window_samples(subject), lambda doing: None).alone()
    assert parts.module.training
    assert all(torch.equal(value, before[name]) for name, value in parts.module.state_dict().items())
    assert all(parameter.grad is None for parameter in parts.module.parameters())


def test_windows_are_real_ones_and_the_last_is_among_them() -> None:
    config = compose([*POINTS, *SMALL, "model=custom", "model._target_=zoo.Plain"], "check")
    subject = Subject(config, Parts(config, torch.device("cpu")), torch.device("cpu"))
    windows = [[index for part in window.sample_indices for index in part] for window in subject.loader.epoch(0)]
    assert [len(window) for window in windows] == [16, 16, 8]
    assert window_samples(subject) == [windows[0], windows[2]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 33])
def test_cuts_hold_every_sample_once(size: int) -> None:
    cuts = cuts_of(size, [size])
    assert all(sum(sizes) == size and min(sizes) > 0 for sizes in cuts.values())
    assert len({tuple(sizes) for sizes in cuts.values()}) == len(cuts)
    assert bool(cuts) is (size > 1)


def test_a_task_that_is_none() -> None:
    with pytest.raises(UserError, match=r"returned a Tensor, not a distaccum\.TaskOutput"):
        examined(task="NoTask")


@pytest.mark.parametrize("override", ["check.windows=0", "check.samples=0", "check.tolerance=0", "check.worst=0"])
def test_impossible_numbers(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        compose([override], "check")
