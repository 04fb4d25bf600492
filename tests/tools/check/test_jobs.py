"""The check of tasks whose loss couples samples, and of the other jobs that the package ships."""

from __future__ import annotations

import pytest
from examining import examined, finding, kinds

CONTRASTIVE = ["experiment=contrastive", "model.channels=[8]", "model.width=8", "model.embedding_size=4"]


def test_a_contrastive_task_passes() -> None:
    report = examined(*CONTRASTIVE, "check.samples=12", model=None, data=False)
    assert report.verdict.startswith("EQUAL for the same samples (the dataset draws them at random)")
    assert kinds(report) == {"random_data"}
    errors = [row.worst_error for row in report.rows if row.precision == "float64"]
    assert len(errors) >= 6
    assert all(error is not None and error < 1e-12 for error in errors)


def test_its_dropout_is_taken_out_and_its_temperature_learned() -> None:
    learned = ["model.dropout=0.3", "model.learn_temperature=true", "task.temperature=null"]
    report = examined(*CONTRASTIVE, *learned, "check.samples=8", "check.windows=1", model=None, data=False)
    assert report.status == 0, report.verdict
    assert kinds(report) == {"random_data", "random_forward"}


def test_plain_accumulation_of_it_is_named_with_the_way_out() -> None:
    report = examined(
        *CONTRASTIVE, "check.samples=12", "check.windows=1", model=None, data=False, task="PlainContrastive"
    )
    assert report.status == 1
    assert "accumulate_coupled" in finding(report, "loss_couples_samples").remedy
    assert "task=contrastive" in finding(report, "loss_couples_samples").remedy
    assert max(row.gradient_error or 0 for row in report.rows) > 1e-2


def test_a_layer_that_mixes_samples_is_found_in_it_too() -> None:
    report = examined(
        "experiment=contrastive", "check.samples=12", "check.windows=1", model="CoupledBatchNorm", data=False
    )
    assert report.status == 1
    assert "BatchNorm1d" in finding(report, "mixes_samples").where


@pytest.mark.parametrize("task", ["segmentation", "dice"])
def test_segmentation_passes(task: str) -> None:
    small = ["data.patch_size=16", "model.channels=[8,16]", "check.samples=6", "check.windows=1"]
    report = examined("experiment=segmentation", *small, f"task={task}", model=None, data=False)
    assert report.verdict.startswith("EQUAL")
    assert kinds(report) == {"random_data"}


@pytest.mark.parametrize(("model", "task"), [("Judge", "JudgeLoss"), ("Generator", "GeneratorLoss")])
def test_both_halves_of_a_gan_pass(model: str, task: str) -> None:
    """The GAN of the documentation is a loop of its own, so each half is examined with the other one frozen."""
    own = ["data=custom", "data.train._target_=gan.Pairs", "model=custom", f"model._target_=gan.{model}"]
    report = examined(*own, "task=custom", f"task._target_=gan.{task}", model=None, data=False)
    assert report.verdict.startswith("EQUAL")
    assert kinds(report) == {"random_data"}
