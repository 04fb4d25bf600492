"""Every planted fault must be named, and make status 1 where the update really differs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from examining import examined, finding, kinds

from distaccum.tools.check import Severity

FAULTS: list[tuple[str, dict[str, Any], list[str], str, str]] = [
    # what is wrong; how to build it; further overrides; the kind; what must be named
    ("BatchNorm", {"model": "WithBatchNorm"}, [], "mixes_samples", "layers.1 (BatchNorm1d)"),
    ("a layer that centres over samples", {"model": "WithCentring"}, [], "mixes_samples", "layers.1 (Centred)"),
    ("softmax over samples", {"model": "MixesInForward"}, [], "mixes_samples", "the model itself (MixesInForward)"),
    (
        "attention over samples",
        {"model": "AttendsOverSamples", "sequences": True},
        [],
        "mixes_samples",
        "attention (MultiheadAttention)",
    ),
    (
        "pooling over padding",
        {"model": "PoolsOverPadding", "sequences": True},
        [],
        "padding_dependence",
        "pool (MeanPool)",
    ),
    (
        "a recurrence over samples",
        {"model": "RecursOverSamples", "sequences": True},
        [],
        "mixes_samples",
        "rnn (LSTM)",
    ),
    (
        "packed samples that see each other",
        {"model": "AttendsAcross", "sequences": True},
        ["batch=packed"],
        "packed_samples_meet",
        "blocks.0.attention (_Attention)",
    ),
    (
        "packed samples whose positions go on a little",
        {"model": "PositionsGoOn", "sequences": True},
        ["batch=packed"],
        "packed_samples_meet",
        "position_embedding (Embedding)",
    ),
    (
        "a model that can't be packed",
        {"model": "Recurrent", "sequences": True},
        ["batch=packed"],
        "packing_refused",
        "the model itself (Recurrent), task (LanguageModeling)",
    ),
    ("mixed-up samples", {"model": "MixesUp"}, [], "mixes_samples", "the model itself (MixesUp)"),
    (
        "attention to padding",
        {"model": "Encoder", "sequences": True},
        ["+model.masked=false"],
        "padding_dependence",
        "encoder.layers.0.self_attn (MultiheadAttention)",
    ),
    ("a class-weighted mean", {"task": "ClassWeightedMean"}, [], "loss_couples_samples", "ClassWeightedMean"),
    ("a squeezed sample", {"task": "Squeezes"}, [], "batch_size_dependence", "Squeezes"),
    (
        "spectral normalisation",
        {"model": "SpectralNorm"},
        [],
        "state_in_forward",
        "layers.1.parametrizations.weight.0._u",
    ),
    ("NaN for some samples", {"model": "NanForSome"}, [], "nonfinite", "NanForSome"),
    ("a mean loss", {"task": "MeanLoss"}, [], "mean_loss", "MeanLoss"),
    ("a mean loss of weight 1", {"task": "MeanLossWeightOne"}, [], "mean_loss", "MeanLossWeightOne"),
    ("a contrastive loss", {"task": "Contrastive"}, [], "loss_couples_samples", "Contrastive"),
    ("a ratio of batch sums", {"task": "BatchRatio"}, [], "loss_couples_samples", "BatchRatio"),
    (
        "a mean over the micro-batch's tokens",
        {"task": "TokenMean", "model": "Shared", "sequences": True},
        [],
        "loss_couples_samples",
        "TokenMean",
    ),
    ("a penalty per micro-batch", {"task": "WithPenalty"}, [], "loss_constant_term", "WithPenalty"),
    (
        "a weight that counts padding",
        {"task": "CountsPadding", "model": "Shared", "sequences": True},
        [],
        "wrong_weight",
        "CountsPadding",
    ),
    ("a constant weight", {"task": "ConstantWeight"}, [], "wrong_weight", "ConstantWeight"),
    ("a term that is a mean", {"task": "TermIsAMean"}, [], "mean_loss", "term positive of the task (TermIsAMean)"),
    (
        "a term divided by the number of micro-batches",
        {"task": "TermPerMicroBatch"},
        [],
        "wrong_weight",
        "weight of the term positive",
    ),
    ("a term of another unit", {"task": "TermOfAnotherUnit"}, [], "miscounted_term", "weights(batch) of the task"),
    ("a weight of zero", {"task": "NoWeight"}, [], "wrong_weight", "weight"),
    ("NaN in the data", {}, ["data.train._target_=zoo.PointsWithNan"], "nonfinite", "sample "),
    ("NaN from a layer", {"model": "LogOfNegatives"}, [], "nonfinite", "layers.1 (Log)"),
    ("a gradient that is infinite", {"model": "InfiniteSlope"}, [], "nonfinite", "zeros"),
    ("a running scale", {"model": "WithRunningScale"}, [], "state_in_forward", "layers.1.scale"),
    ("a warm-up in forwards", {"model": "WarmsUp"}, [], "state_in_forward", "WarmsUp"),
    ("noise that no seed reaches", {"model": "Unseeded"}, [], "nondeterministic", "Unseeded"),
    ("a ratio of batch sums in float32", {"task": "BatchRatioInFloat32"}, [], "loss_couples_samples", "InFloat32"),
    ("noise of a collate", {}, ["+data.collate_fn._target_=zoo.NoisyCollate"], "random_collate", "collate_fn"),
    (
        "mixup of a collate",
        {"task": "SoftTargets"},
        ["+data.collate_fn._target_=zoo.Mixup"],
        "collate_couples_samples",
        "collate_fn",
    ),
    (
        "mixup of a collate by a generator of its own",
        {"task": "SoftTargets"},
        ["+data.collate_fn._target_=zoo.Mixup", "+data.collate_fn.own_generator=true"],
        "nondeterministic",
        "collate_fn",
    ),
    (
        "a collate that mixes",
        {},
        ["+data.collate_fn._target_=zoo.Standardise"],
        "collate_couples_samples",
        "collate_fn",
    ),
]


@pytest.mark.parametrize(("build", "overrides", "kind", "where"), [pytest.param(*f[1:], id=f[0]) for f in FAULTS])
def test_a_fault_is_named_and_fails(build: dict[str, Any], overrides: list[str], kind: str, where: str) -> None:
    report = examined("check.windows=1", *overrides, **build)  # healthy models are examined in two
    assert report.status == 1
    found = finding(report, kind)
    assert where in found.where
    assert found.severity is Severity.error
    assert found.what
    assert found.remedy
    # A verdict never contradicts its table.
    is_elsewhere = all(row.equal for row in report.rows)
    assert report.verdict.startswith("NOT EQUAL for all samples: " if is_elsewhere else "NOT EQUAL: ")
    assert is_elsewhere is (build.get("model") == "NanForSome")
    assert found.because in report.verdict
    if kind == "loss_couples_samples":
        assert "distaccum.SumsTask" in found.remedy
    # Nothing that is right is blamed beside it; a running scale does look at all samples.
    errors = {entry.kind for entry in report.findings if entry.severity is Severity.error}
    assert errors == {kind} | ({"mixes_samples"} if build.get("model") == "WithRunningScale" else set())
    json.loads(report.as_json())


NAMED_ONLY: list[tuple[str, dict[str, Any], list[str], str, str, Severity]] = [
    ("a wrong backward", {"model": "WrongBackward"}, [], "wrong_gradient", "first.weight", Severity.warning),
    (
        "a wrong backward in float32",
        {"model": "WrongBackwardInFloat32"},
        [],
        "wrong_gradient",
        "first.weight",
        Severity.warning,
    ),
    ("a detached part", {"model": "Detached"}, [], "wrong_gradient", "first.weight", Severity.warning),
    (
        "augmentation by the global random state",
        {},
        ["data.train._target_=zoo.AugmentedPoints"],
        "random_data",
        "AugmentedPoints",
        Severity.info,
    ),
    (
        "augmentation by a generator of its own",
        {},
        ["data.train._target_=zoo.PythonAugmentedPoints"],
        "random_data",
        "PythonAugmentedPoints",
        Severity.warning,
    ),
    ("a count of forwards", {"model": "Counts"}, [], "state_in_forward", "forwards", Severity.info),
    ("float32 whatever comes", {"model": "InFloat32"}, [], "low_precision", "InFloat32", Severity.info),
    ("a loss that insists on it", {"task": "InsistsOnFloat32"}, [], "low_precision", "the task", Severity.info),
]


@pytest.mark.parametrize(
    ("build", "overrides", "kind", "where", "severity"), [pytest.param(*f[1:], id=f[0]) for f in NAMED_ONLY]
)
def test_what_does_not_change_the_update_is_named_and_passes(
    build: dict[str, Any], overrides: list[str], kind: str, where: str, severity: Severity
) -> None:
    report = examined(*overrides, **build)
    found = finding(report, kind)
    assert where in found.where
    assert found.severity is severity
    assert report.status == 0
    assert report.verdict.startswith("EQUAL")


def test_what_was_built_in_evaluation_mode_is_examined_as_it_trains() -> None:
    report = examined(model="EvalModeIsLost")
    found = finding(report, "eval_mode_lost")
    assert (found.where, found.severity) == ("layers.1 (BatchNorm1d)", Severity.warning)
    assert report.status == 1, "BatchNorm is at work"
    kept = examined("train.keep_modes=true", model="EvalModeIsLost")
    assert kept.status == 0
    assert "eval_mode_lost" not in kinds(kept)


def test_batchnorm_has_three_remedies_and_what_each_fixes() -> None:
    remedy = finding(examined(model="WithBatchNorm"), "mixes_samples").remedy
    assert all(name in remedy for name in ("GroupNorm", "Frozen statistics", "SyncBatchNorm"))
    assert "micro-steps still do" in remedy


def test_a_layer_that_mixes_is_found_beside_a_collate_that_does() -> None:
    report = examined("+data.collate_fn._target_=zoo.Mixup", model="WithBatchNorm", task="SoftTargets")
    assert kinds(report) == {"collate_couples_samples", "mixes_samples"}
    assert finding(report, "mixes_samples").where == "layers.1 (BatchNorm1d)"
    assert "BatchNorm1d" in report.verdict


def test_numbers_that_prove_a_difference_differ() -> None:
    """A loss that couples samples by a hundred-millionth."""
    what = finding(examined(task="CouplesBarely"), "loss_couples_samples").what
    assert float(re.findall(r"([-.e\d]+) apart", what)[0]) > 0


def test_the_error_of_a_mean_loss_is_its_factor() -> None:
    """16 micro-batches of one sample, each a mean of its own: 16 times the gradient of one mean over 16."""
    report = examined(task="MeanLoss")
    row = next(row for row in report.rows if row.cut == "micro-batches of 1" and row.window == 1)
    assert row.sizes == [1] * 16
    # The sum of the means of single samples is the sum, and that of the one shot is a sixteenth of it.
    assert row.factor == pytest.approx(16)
    assert row.gradient_error == pytest.approx(15)


def test_unused_parameters_are_a_warning_under_ddp_only() -> None:
    assert finding(examined(model="PartlyUnused"), "no_gradient").severity is Severity.info
    under_ddp = finding(examined("strategy=ddp", model="PartlyUnused"), "no_gradient")
    assert under_ddp.severity is Severity.warning
    assert "find_unused_parameters=true" in under_ddp.remedy
    cured = examined("strategy=ddp", "strategy.find_unused_parameters=true", model="PartlyUnused")
    assert finding(cured, "no_gradient").severity is Severity.info


def test_a_tolerance_that_the_precision_cannot_keep() -> None:
    report = examined("check.tolerance=1e-12")
    assert report.status == 1
    assert kinds(report) == {"rounding"}
    assert "fp32 rounds more than the tolerance" in report.verdict
