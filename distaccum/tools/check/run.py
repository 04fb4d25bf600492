"""The check itself: which experiments are made, in which order, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from distaccum.config import DDPConfig, as_plain
from distaccum.config.enums import PrecisionName
from distaccum.config.tools import CheckConfig
from distaccum.errors import UserError, is_one_value_per_channel
from distaccum.planning import split_evenly
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.randomness import GlobalStates
from distaccum.runtime.world import World, joined_world
from distaccum.tools.bench.terminal import status_line
from distaccum.tools.check import conclusions, coupling, numerics, packing, randomness
from distaccum.tools.check.measuring import Update, ddp_config, difference, measure
from distaccum.tools.check.report import CheckReport, CutRow, Difference, ParameterRow, Severity, printed
from distaccum.tools.check.subject import FOUND_OUT, NOISE, Subject, cuts_of, packed_cuts, split, window_samples
from distaccum.training.build import Parts
from distaccum.training.run import check_same_config

_TOLERANCES = {PrecisionName.fp64: 1e-10, PrecisionName.fp32: 1e-4, PrecisionName.fp16: 1e-2}
_TOLERANCES |= dict.fromkeys((PrecisionName.bf16, PrecisionName.bf16_params), 5e-2)
"""Largest error of an equal gradient in each precision, over all parameters together."""


def check(config: CheckConfig) -> int:
    """Examines what a configuration names, prints the report on rank 0, and returns the exit status on every rank.

    Raises:
        UserError: the configuration, the data or the machine doesn't allow the check.
    """
    with joined_world() as world, GlobalStates.now(*range(torch.cuda.device_count())):
        device = resolve_device(config.device, world.local_rank)
        world.init_process_group(device)
        check_same_config(world, as_plain(config))
        with status_line("checking", is_shown=world.is_main) as tell:
            report = examine(config, world, device, tell)
        if world.is_main:
            printed(report, as_json=config.check.json, worst=config.check.worst)
        return world.from_main(report.status)


def examine(
    config: CheckConfig, world: World, device: torch.device, tell: Callable[[str], None] = lambda doing: None
) -> CheckReport:
    """Makes all experiments. The report is complete on rank 0 only.

    Args:
        tell: called on rank 0 with what is being done.
    """
    with world.together():
        parts = Parts(config, device, rank=world.rank, world_size=world.world_size)
        subject = Subject(config, parts, device)
        windows = window_samples(subject)
    report = CheckReport(
        model=type(subject.model).__name__,
        precision=config.precision.name.value,
        world_size=world.world_size,
        tolerance_fp64=config.check.tolerance_fp64,
        tolerance=config.check.tolerance or _TOLERANCES[config.precision.name],
        windows=[len(window) for window in windows],
    )
    examination = _Examination(subject, report, windows, tell)
    with world.together():
        if world.is_main:
            try:
                examination.alone()
            except ValueError as error:
                if not is_one_value_per_channel(error):
                    raise
                raise conclusions.batchnorm_refuses(report.windows) from error
    # The other ranks go by what rank 0 has found out.
    vars(subject).update(world.from_main({name: getattr(subject, name) for name in FOUND_OUT}))
    if world.world_size > 1:
        examination.on_ranks(world)
    if world.is_main:
        examination.conclude()
    return report


class _Examination:
    """The measurements so far, and what follows from them."""

    def __init__(
        self, subject: Subject, report: CheckReport, windows: list[list[int]], tell: Callable[[str], None]
    ) -> None:
        self.subject = subject
        self.report = report
        self.windows = windows
        self._tell = tell
        self._one_shots: dict[tuple[int, str], Update] = {}
        """By window and precision."""
        self._errors: dict[str, dict[str, float]] = {"float64_error": {}, "configured_error": {}, "step_error": {}}
        """Of `ParameterRow`, by parameter: the largest so far."""

    def _in_each_precision(self) -> list[Subject]:
        """Returns the subject in float64 and, unless that is the same, in the configured precision."""
        is_same = self.subject.precision.name is PrecisionName.fp64
        return [self.subject] if is_same else [self.subject, self.subject.replaced(in_float64=False)]

    def alone(self) -> None:
        """Makes the experiments of one process, on rank 0."""
        subject, windows, findings = self.subject, self.windows, self.report.findings
        self._tell("samples")
        few = sorted(windows[0], key=subject.samples.size)[:4]
        findings += randomness.find_random_data(subject, few)
        self._tell("forwards, repeated")
        findings += randomness.find_precision(subject, few)
        findings += randomness.find_randomness(subject, few)
        findings += randomness.find_lost_eval_mode(subject)
        # Experiments that compare two forwards say nothing about a model that gives something else each time.
        is_repeatable = not self._has("nondeterministic")
        if is_repeatable:
            findings += randomness.find_state(subject, few)
            if subject.loader.cuts.is_packed:
                self._tell("packed samples")
                findings += packing.find_leaks(subject, few)
        for number, window in enumerate(windows):
            for one in self._in_each_precision():
                self._measure_alone(one, number, window)
        first = self._one_shots[0, "float64"]
        subject.has_unused = bool(first.without_gradient)
        findings += numerics.find_without_gradient(subject, first, windows[0], self.report.world_size)
        if first.failure or not is_repeatable:
            return
        self._tell("coupled samples")
        findings += randomness.find_unequal_repeat(first, measure(subject, [windows[0]]))
        trio = coupling.choose_trio(subject, windows)
        if trio is not None:
            findings += coupling.find_coupling(subject, trio)
        self._examine_terms(windows)
        findings += numerics.find_wrong_gradient(subject, few[:2], self._tell)

    def _examine_terms(self, windows: list[list[int]]) -> None:
        """Finds what is wrong with one of several losses, unless something is wrong that they have in common."""
        findings = self.report.findings
        for name in sorted(self.subject.probe(windows[0], record=False).terms):
            if any(finding.kind in coupling.NOT_OF_A_LOSS for finding in findings):
                return
            subject = self.subject.replaced(term=name)
            trio = coupling.choose_trio(subject, windows)
            if trio is not None:
                findings += coupling.find_coupling(subject, trio)

    def _has(self, kind: str) -> bool:
        return any(finding.kind == kind for finding in self.report.findings)

    def _measure_alone(self, subject: Subject, number: int, window: list[int]) -> None:
        where = f"window {number + 1} of {len(self.windows)}, {subject.digits}"
        self._tell(f"{where}, one shot")
        try:
            one_shot = measure(subject, [window])
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(window)} samples don't fit into the memory in one micro-batch, which is what the cuts are "
                "compared with. Lower check.samples: a part of a window proves as much."
            ) from error
        self._one_shots[number, subject.digits] = one_shot
        if one_shot.failure:
            self._add(subject, number, "one shot", [[len(window)]], one_shot)
            self._explain_failure(subject, window, one_shot)
            return
        for name, cut in _cuts(subject, window).items():
            self._tell(f"{where}, {name}")
            try:
                update = measure(subject.as_trained(), cut)
            except Exception as error:  # of the cut, as the window in one shot was computed
                update = Update(failure=_said(error))
            self._add(subject, number, name, [list(map(len, cut))], update)

    def _explain_failure(self, subject: Subject, window: list[int], update: Update) -> None:
        if update.is_miscounted:
            if not self._has("miscounted_term"):
                self.report.findings.append(conclusions.miscounted(update, subject.task_name))
            return
        is_weight = "weight" in update.failure
        if not self._has("wrong_weight" if is_weight else "nonfinite"):
            self.report.findings.append(
                conclusions.weight_not_positive(update) if is_weight else numerics.find_nonfinite(subject, window)
            )

    def on_ranks(self, world: World) -> None:
        """Measures the same windows under DDP. All ranks call it."""
        config = ddp_config(self.subject)
        calls: dict[str, int] = {}
        for number, window in enumerate(self.windows):
            shares = split_evenly(len(window), world.world_size)
            is_failed = any(update.failure for (where, _), update in self._one_shots.items() if where == number)
            if min(shares) == 0 or world.from_main(is_failed):
                continue
            mine = list(split(window, shares))[world.rank]
            for name, steps in _steps_on_ranks(shares, world.rank, config).items():
                self._tell(f"window {number + 1} of {len(self.windows)}, {world.world_size} ranks, {name}")
                cut = list(split(mine, split_evenly(len(mine), steps)))
                failure, placed = self._rehearse(world, cut, config)
                for subject in self._in_each_precision():
                    update = Update(failure=failure) if failure else measure(subject.as_trained(), cut, ddp=placed)
                    cuts = world.gather([len(part) for part in cut])
                    if world.is_main:
                        calls.setdefault(name, update.sync_calls)
                        self._add(subject, number, name, cuts, update)
        if world.is_main:
            strategy = self.subject.config.strategy
            self.report.findings += conclusions.find_on_ranks(self.report, strategy, config, calls)

    def _rehearse(self, world: World, cut: list[list[int]], config: DDPConfig) -> tuple[str, DDPConfig]:
        """Runs this rank's micro-batches without the others: what fails on one rank alone would leave them waiting."""
        failure, lacks_gradient = "", False
        try:
            lacks_gradient = any(measure(self.subject.as_trained(), [part]).without_gradient for part in cut)
        except Exception as error:
            failure = f"rank {world.rank}: {_said(error)}"
        failures = [said for said in world.gather(failure) if said]
        if any(world.gather(lacks_gradient)):
            config = dataclasses.replace(config, find_unused_parameters=True, static_graph=False)
        return (failures[0] if failures else ""), config

    def _add(self, subject: Subject, window: int, name: str, cuts: list[list[int]], update: Update) -> None:
        """Adds an update to the report; `cuts` are the sizes of each rank's micro-batches."""
        found = Difference()
        if not update.failure:
            found, gradients, steps = difference(update, self._one_shots[window, subject.digits])
            _keep_largest(self._errors["float64_error" if subject.in_float64 else "configured_error"], gradients)
            if subject.in_float64:
                _keep_largest(self._errors["step_error"], steps)
        self.report.rows.append(
            CutRow(
                **dataclasses.asdict(found),
                window=window + 1,
                precision=subject.digits,
                ranks=len(cuts),
                cut=f"{name}, packed" if subject.loader.cuts.is_packed else name,
                micro_steps=len(cuts[0]),
                sizes=[size for sizes in cuts for size in sizes],
                loss=update.loss,
                sync_calls=update.sync_calls,
                equal=not update.failure and self._is_equal(subject, found),
                failure=update.failure,
            )
        )

    def _is_equal(self, subject: Subject, found: Difference) -> bool:
        assert found.gradient_error is not None
        if not subject.in_float64:
            return found.gradient_error <= self.report.tolerance
        if subject.noise > NOISE:
            return found.gradient_error <= max(self.report.tolerance_fp64, subject.noise)
        return max(found.gradient_error, found.worst_error or 0.0) <= self.report.tolerance_fp64

    def conclude(self) -> None:
        """Makes the table of parameters, and names a reason where a difference has none yet."""
        report = self.report
        report.parameters = self._parameter_rows()
        in_float64 = [row for row in report.rows if row.precision == "float64"]
        amplified = max((row.parameters_error or 0.0 for row in in_float64), default=0.0)
        all_equal = all(row.equal for row in report.rows)
        if all_equal and amplified > report.tolerance_fp64 and not self._has("low_precision"):
            report.findings.append(conclusions.amplified(type(self.subject.config.optim).__name__, amplified))
        if all_equal or any(finding.severity is Severity.error for finding in report.findings):
            return
        unequal = [row for row in in_float64 if not row.equal]
        report.findings.append(conclusions.unexplained(report, unequal) if unequal else conclusions.rounding(report))

    def _parameter_rows(self) -> list[ParameterRow]:
        names = {**self._errors["float64_error"], **self._errors["configured_error"]}
        rows = [
            ParameterRow(name=name, **{kind: errors.get(name) for kind, errors in self._errors.items()})
            for name in names
        ]
        return sorted(rows, key=lambda row: (row.float64_error or 0.0, row.configured_error or 0.0), reverse=True)


def _cuts(subject: Subject, window: list[int]) -> dict[str, list[list[int]]]:
    """Returns the cuts of a window to measure in one process, by name: the dataset indices of their micro-batches."""
    if subject.loader.cuts.is_packed:
        found = packed_cuts(subject, window)
    else:
        plan, size = subject.loader.plan, len(window)
        steps = plan.accumulation_steps or -(-size // (plan.micro_batch_size or size))
        sizes = cuts_of(size, split_evenly(size, max(1, min(steps, size))))
        found = {name: list(split(window, cut)) for name, cut in sizes.items()}
    if subject.in_float64:
        return found
    # Rounding is all that is left to see: two cuts show it.
    return {name: cut for name, cut in found.items() if name in ("as configured", "micro-batches of 1")}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _keep_largest(known: dict[str, float], errors: dict[str, float]) -> None:
    known.update({name: max(error, known.get(name, 0.0)) for name, error in errors.items()})


def _steps_on_ranks(shares: Sequence[int], rank: int, config: DDPConfig) -> dict[str, int]:
    """Micro-steps of this rank, by the name of the cut."""
    steps = {"one micro-step a rank": 1, "three micro-steps a rank": min(3, *shares)}
    if not (config.static_graph or config.sync_batchnorm):
        steps["unequal micro-steps"] = min(shares[rank], 1 + 2 * (rank % 2))
    return steps
