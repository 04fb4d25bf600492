"""Findings that follow from the measurements, without an experiment of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from distaccum.config import DDPConfig, StrategyConfig
from distaccum.config.enums import Compression
from distaccum.errors import UserError
from distaccum.tools.check.measuring import Update
from distaccum.tools.check.report import CheckReport, CutRow, Finding, Severity


def weight_not_positive(update: Update) -> Finding:
    return Finding(
        kind="wrong_weight",
        because=f"the weights of a window add up to {update.weight:g}",
        what=f"The total weight is {update.weight:g}, so there is nothing to take the mean of.",
        where="the weight that the task returns",
        remedy="Return the number of elements that loss_sum is the sum of.",
    )


def miscounted(update: Update, task: str) -> Finding:
    return Finding(
        kind="miscounted_term",
        because="a loss is divided by something else than the number of its elements",
        what=update.failure,
        where=f"weights(batch) of the {task}, or the weight that it returns",
        remedy="Count the same elements in both, and sum just these in loss_sum: valid tokens for a sum over tokens, "
        "sequences for a sum over sequences.",
    )


def find_on_ranks(
    report: CheckReport, strategy: StrategyConfig, measured: DDPConfig, calls: Mapping[str, int]
) -> Iterator[Finding]:
    """Finds what limits the proof over ranks, and updates whose number of collectives depends on the cut.

    Args:
        strategy: as configured.
        measured: what the ranks were placed by.
        calls: gradient collectives of an update, by the name of the cut.
    """
    if not isinstance(strategy, DDPConfig):
        yield Finding(
            kind="measured_under_ddp",
            severity=Severity.info,
            what="The ranks were measured under DDP, which shows whether model, data or loss depend on the cut.",
            where=f"strategy={strategy.name}",
            remedy="python -m distaccum.compare measures the placements themselves.",
        )
    if not calls:
        yield Finding(
            kind="not_measured_on_ranks",
            severity=Severity.warning,
            what=f"No window could be dealt to {report.world_size} ranks and computed: they have "
            f"{', '.join(map(str, report.windows))} samples.",
            where="ranks",
            remedy="Mend what the other findings say; or give each rank a sample: check.samples, "
            "batch.global_batch_size.",
        )
    if measured.compression is not Compression.none:
        later = f" after update {measured.powersgd_start_update}: the measured one is not compressed yet"
        yield Finding(
            kind="compression",
            severity=Severity.warning,
            what="The ranks send rounded gradients, so an update over ranks is not exact"
            + (f"{later}." if measured.compression is Compression.powersgd else "."),
            where=f"strategy.compression={measured.compression.value}",
            remedy="strategy.compression=none for exact updates.",
        )
    if len(set(calls.values())) > 1 and not measured.static_graph:
        counts = "; ".join(f"{count} with {name}" for name, count in calls.items())
        yield Finding(
            kind="collectives_grow",
            severity=Severity.warning,
            what=f"The number of gradient collectives per update depends on the cut: {counts}.",
            where="DDP",
            remedy="A model that calls collectives of its own, or re-enters DDP in a micro-step, pays for each.",
        )


def batchnorm_refuses(windows: Sequence[int]) -> UserError:
    """The error to raise when BatchNorm can't compute a window of one sample, in a check as in a training."""
    return UserError(
        "BatchNorm needs more than one value per channel in training, and a window that the check computes in one "
        f"micro-batch has one sample (samples of the windows: {', '.join(map(str, windows))}). Leave out a short last "
        "window (batch.drop_last=true); raise batch.global_batch_size and check.samples to 2 or more; or use GroupNorm "
        "or LayerNorm."
    )


def unexplained(report: CheckReport, rows: list[CutRow]) -> Finding:
    row = max(rows, key=lambda row: row.worst_error or 0.0)
    if row.failure:
        because, where = f"the cut into {row.cut} can't be computed ({row.failure})", f"cut: {row.cut}"
    elif any(finding.kind == "compression" for finding in report.findings):
        because, where = "gradients are compressed between the ranks", "strategy.compression"
    else:
        because, where = f"the gradient of {row.worst_parameter} depends on the cut", str(row.worst_parameter)
    return Finding(
        kind="unexplained",
        because=because,
        what="None of the experiments found the reason. "
        + (f"The gradient is {row.factor:.6g} times the one-shot gradient." if row.factor is not None else ""),
        where=where,
        remedy="Look for code that depends on the number of forwards, the size of the micro-batch or the order of the "
        "samples. check.samples=2 check.windows=1 makes the case small.",
    )


def amplified(optimizer: str, error: float) -> Finding:
    return Finding(
        kind="amplified_rounding",
        severity=Severity.info,
        what=f"Gradients agree to rounding, and the parameters after the step only to {error:.1e}: where a gradient is "
        "zero but for rounding, the optimizer divides it by its own size.",
        where=f"optim ({optimizer})",
        remedy="Nothing; or a larger eps of the optimizer.",
    )


def rounding(report: CheckReport) -> Finding:
    row = max((row for row in report.rows if not row.equal), key=lambda row: row.gradient_error or 0.0)
    return Finding(
        kind="rounding",
        because=f"{report.precision} rounds more than the tolerance of {report.tolerance:g} allows",
        what="In float64 all cuts give the same update; in the configured precision "
        + (row.failure or f"it differs by {row.gradient_error:.1e}."),
        where=f"precision={report.precision}, {row.worst_parameter}",
        remedy="Nothing is wrong with the accumulation. A higher precision, or a check.tolerance that suits this one.",
    )
