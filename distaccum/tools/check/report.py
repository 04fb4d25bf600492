"""The result of a check, as text and as JSON: one verdict, a table, findings."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from enum import StrEnum

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LIMITS = {
    "random_forward": "up to random numbers (dropout)",
    "random_data": "for the same samples (the dataset draws them at random)",
    "low_precision": "as far as float32 can tell",
}
"""By the kind of a finding: how far a verdict of equality holds."""


class Severity(StrEnum):
    error = "error"
    """The update depends on the cut, or is not a number at all."""
    warning = "warning"
    """The update is the same for every cut, but something else will fail or is not as it seems."""
    info = "info"
    """Nothing is wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of an experiment.

    Attributes:
        kind: a stable name for programs (`mixes_samples`, `mean_loss`, …).
        because: a clause that ends the sentence "not equal, because …"; only errors have one.
        what: the observation, with numbers.
        where: the module, parameter, sample or task.
        remedy: how to mend it.
    """

    kind: str
    severity: Severity = Severity.error
    because: str = ""
    what: str
    where: str
    remedy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Relative difference of an update from the one-shot update; None everywhere if there is no update.

    Attributes:
        gradient_error: ‖difference‖ / ‖gradient‖ over all parameters together.
        worst_parameter, worst_error: the parameter with the largest error of its own gradient, and that error.
        parameters_error: ‖difference‖ / ‖parameters‖ after the step, over all together.
        factor: the multiple of the one-shot gradient that is nearest.
    """

    gradient_error: float | None = None
    worst_parameter: str | None = None
    worst_error: float | None = None
    parameters_error: float | None = None
    factor: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CutRow(Difference):
    """One update of one window under one cut, against the one-shot update in the same precision."""

    window: int
    precision: str
    ranks: int
    cut: str
    micro_steps: int
    sizes: list[int]
    equal: bool
    loss: float | None = None
    sync_calls: int | None = None
    failure: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterRow:
    """Largest relative error of one parameter over all windows and cuts: of its gradient, and after the step."""

    name: str
    float64_error: float | None
    configured_error: float | None
    step_error: float | None


@dataclass(slots=True)
class CheckReport:
    """All results of a check."""

    model: str
    precision: str
    world_size: int
    tolerance_fp64: float
    tolerance: float
    windows: list[int]
    """Samples of each window that was measured."""
    rows: list[CutRow] = field(default_factory=list)
    parameters: list[ParameterRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return all(row.equal for row in self.rows) and not self._errors()

    @property
    def status(self) -> int:
        return 0 if self.is_equal else 1

    def _errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity is Severity.error]

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        if not self.is_equal:
            reasons = ", and because ".join(finding.because for finding in self._errors())
            if self.rows and all(row.equal for row in self.rows):
                return f"NOT EQUAL for all samples: the measured windows agree, and others won't, because {reasons}."
            return f"NOT EQUAL: {self._how_far()} because {reasons}."
        if max(self.windows, default=0) <= 1:
            return "EQUAL: a window of one sample has only one cut."
        worst = max((row.worst_error or 0.0 for row in self.rows if row.precision == "float64"), default=0.0)
        ranks = f" and {self.world_size} ranks" if self.world_size > 1 else ""
        over = f"over {len({(row.ranks, row.cut) for row in self.rows})} cuts{ranks} of {len(self.windows)} window"
        over += "s" if len(self.windows) > 1 else ""
        kinds = {finding.kind for finding in self.findings}
        up_to = "".join(f" {limit}" for kind, limit in _LIMITS.items() if kind in kinds)
        return f"EQUAL{up_to}: the update is that of the large batch, to {worst:.0e} in float64, {over}."

    def _how_far(self) -> str:
        failed = [row for row in self.rows if row.failure]
        measured = [row for row in self.rows if row.gradient_error is not None and not row.equal]
        if measured:
            row = max(
                [row for row in measured if row.precision == "float64"] or measured,
                key=lambda row: row.gradient_error or 0.0,
            )
            return f"the gradient is off by {_percent(row.gradient_error)} ({row.cut}, {row.precision}),"
        if failed or any(finding.kind == "nonfinite" for finding in self.findings):
            return "an update can't be computed,"
        return "the update depends on the cut,"

    def as_json(self) -> str:
        head = {"verdict": self.verdict, "equal": self.is_equal, "status": self.status}
        text = json.dumps({**head, **dataclasses.asdict(self)})
        # JSON has neither NaN nor infinity: they become strings.
        return json.dumps(json.loads(text, parse_constant=lambda name: str(float(name))), ensure_ascii=False)

    def print(self, console: Console, worst: int) -> None:
        """The verdict on the first line, then the tables, then the findings."""
        console.print(Text(self.verdict, style="bold green" if self.is_equal else "bold red"))
        console.print(_table_of_cuts(self))
        for failure in dict.fromkeys(f"{row.cut} failed: {row.failure}" for row in self.rows if row.failure):
            console.print(Text(failure))
        if self.parameters:
            console.print(_table_of_parameters(self, worst))
        for finding in sorted(self.findings, key=lambda finding: list(Severity).index(finding.severity)):
            style = {Severity.error: "bold red", Severity.warning: "bold yellow", Severity.info: "bold"}
            console.print(Text(f"{finding.severity}: {finding.kind}", style=style[finding.severity]))
            for name in ("where", "what", "remedy"):
                if said := getattr(finding, name):
                    console.print(Text(f"  {name + ':':8}{said}"))


def printed(report: CheckReport, *, as_json: bool, worst: int) -> None:
    """Prints a report on standard output, in files and pipes as wide as its tables need."""
    if as_json:
        sys.stdout.write(report.as_json() + "\n")
    else:
        report.print(Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140), worst)
    sys.stdout.flush()


def _table_of_cuts(report: CheckReport) -> Table:
    table = Table(title=f"against the window in one shot: {report.model}", title_justify="left", title_style="")
    for heading in ("window", "precision", "ranks", "cut", "steps", "gradient", "worst", "after the step", "syncs", ""):
        table.add_column(heading, justify="left" if heading in ("precision", "cut", "") else "right")
    for row in report.rows:
        numbers = [row.gradient_error, row.worst_error, row.parameters_error]
        shown = ["failed", "", ""] if row.failure else [_scientific(value) for value in numbers]
        table.add_row(
            f"{row.window} ({report.windows[row.window - 1]})",
            row.precision,
            str(row.ranks),
            row.cut,
            str(row.micro_steps),
            *shown,
            str(row.sync_calls) if row.ranks > 1 and row.sync_calls is not None else "",
            Text("equal", style="green") if row.equal else Text("NOT EQUAL", style="red"),
        )
    return table


def _table_of_parameters(report: CheckReport, worst: int) -> Table:
    title = f"the {min(worst, len(report.parameters))} parameters that differ most, of {len(report.parameters)}"
    table = Table(title=title, title_justify="left", title_style="")
    table.add_column("parameter")
    configured = [report.precision] if report.precision != "fp64" else []
    for heading in ("float64", *configured, "after the step"):
        table.add_column(heading, justify="right")
    for row in report.parameters[:worst]:
        numbers = [row.float64_error, *([row.configured_error] if configured else []), row.step_error]
        table.add_row(row.name, *(_scientific(value) for value in numbers))
    return table


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    value = value or 0.0
    return f"{100 * value:.3g} %" if value >= 1e-4 else f"{value:.1e}"
