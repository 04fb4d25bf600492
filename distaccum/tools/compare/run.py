"""Runs a comparison: the reference, then every placement, turn by turn, and writes what came out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import TextColumn

from distaccum.config import as_plain
from distaccum.config.redaction import redacted, redacted_arguments
from distaccum.config.tools import CompareConfig
from distaccum.errors import UserError
from distaccum.observers.formatting import number
from distaccum.runtime.files import write_result
from distaccum.runtime.logs import console, logging_to
from distaccum.runtime.memory import free_memory
from distaccum.tools.bench.environment import as_json, environment, refuse_other_results
from distaccum.tools.bench.rounds import Round, round_of
from distaccum.tools.bench.sessions import PlacementFailedError, Session
from distaccum.tools.bench.terminal import progress_bar
from distaccum.tools.compare.advice import advise
from distaccum.tools.compare.page import page_of
from distaccum.tools.compare.placements import Case, cases_of, reference_case
from distaccum.tools.compare.results import (
    CompareReport,
    CompareRow,
    Reference,
    add_preparation,
    add_rounds,
    add_speedups,
    row_of,
)
from distaccum.tools.compare.terminal import show
from distaccum.training.run_folder import held_run_folder

logger = logging.getLogger(__name__)

_KEPT_SHARE = 0.25
"""A placement's processes may wait for their next turn if they take no more than this share of the memory left."""


def compare(config: CompareConfig) -> CompareReport:
    """Compares what a configuration asks for; writes `compare.json` and `compare.html` into the run folder.

    Raises:
        UserError: the configuration can't be trained at all, or the folder can't be written.
    """
    refuse_other_results(config.run_dir, "compare.json", "comparison")
    with held_run_folder(config.run_dir, "none", as_plain(config)) as folder, logging_to(folder.path, 0):
        run_dir = folder.path
        started = time.monotonic()
        report = _Comparison(config, run_dir).run()
        report.seconds = time.monotonic() - started
        for name, text in (("compare.json", as_json(report)), ("compare.html", page_of(report))):
            write_result(run_dir / name, text, "Choose another run_dir.")
        show(report, run_dir)
    return report


@dataclass(slots=True)
class _Contender:
    """A row that is being measured."""

    case: Case
    row: CompareRow
    session: Session
    rounds: list[Round] = field(default_factory=list)


class _Comparison:
    """Runs the reference and every placement of one comparison."""

    def __init__(self, config: CompareConfig, run_dir: Path) -> None:
        self.config = config
        self.section = config.compare
        self.run_dir = run_dir
        self.reference_file = run_dir / "reference.pt"
        self.reference: Reference | None = None
        self.on_cuda = False

    def run(self) -> CompareReport:
        contenders = [
            _Contender(
                case,
                row_of(case, case.command(self.config, redacted_arguments(sys.argv[1:]))),
                self._session(case, case.key),
            )
            for case in cases_of(self.config)
        ]
        with ExitStack() as stack:
            stack.callback(self.reference_file.unlink, missing_ok=True)
            for contender in contenders:
                stack.callback(contender.session.close)
            progress = stack.enter_context(progress_bar(TextColumn("{task.completed}/{task.total}")))
            bar = progress.add_task("float64 reference", total=len(contenders) * self.section.rounds)
            self.reference = self._make_reference()
            # All are built before any is timed, so that starting one never disturbs another's time.
            for contender in contenders:
                progress.update(bar, description=f"starting · {contender.case.title}")
                self._attempt(contender, self._prepare)
            for turn in range(1, self.section.rounds + 1):
                for contender in contenders:
                    progress.update(bar, description=f"round {turn} · {contender.case.title}")
                    self._attempt(contender, self._time)
                    progress.advance(bar)
            progress.update(bar, description="ending")
            for contender in contenders:
                contender.session.dismiss()  # all at once, and then wait for each
        rows = [contender.row for contender in contenders]
        for contender in contenders:
            add_rounds(contender.row, contender.rounds)
        add_speedups(rows)
        report = CompareReport(
            **environment(),
            config=redacted(as_plain(self.config)),
            reference=self.reference,
            rows=rows,
            on_cuda=self.on_cuda,
        )
        report.advice = advise(report)
        return report

    def _attempt(self, contender: _Contender, step: Callable[[_Contender], None]) -> None:
        """Takes a step with a placement. If it fails, its row gives the reason."""
        if contender.row.reason is not None:
            return
        try:
            step(contender)
        except PlacementFailedError as failure:
            contender.row.reason = str(failure)
            logger.info("%s can't run: %s", contender.case.title, failure)

    def _session(self, case: Case, name: str) -> Session:
        return Session(
            config=self.config if case.impossible else case.configuration(self.config),
            num_processes=case.num_processes,
            sync_every_step=case.placement.syncs_every_step,
            threads=self.section.threads_per_rank,
            reference=self.reference_file.absolute(),
            log=self.run_dir / "logs" / f"{name}.log",
            timeout_seconds=self.section.timeout_seconds,
        )

    def _prepare(self, contender: _Contender) -> None:
        row = contender.row
        answers = contender.session.ask("prepare", curve_updates=self.section.curve_updates)
        add_preparation(row, answers)
        self.on_cuda = answers[0]["device"] != "CPU"
        exact = contender.case.exact_updates
        if self.section.exact_updates <= exact:
            row.notes.append(f"no error: {exact} updates are not compressed yet; compare.exact_updates={exact + 1}")
        elif self.reference is not None and self.reference.problem is None:
            row.error = self._error_of(contender, None)
            row.error_float64 = self._error_of(contender, "fp64")
        logger.debug("%s: %s", row.title, row)
        if not console.is_terminal:  # where there is no progress bar
            logger.info("ready: %s", row.title)
        self._let_stay(contender)

    def _error_of(self, contender: _Contender, precision: str | None) -> float | None:
        try:
            answers = contender.session.ask("exactness", updates=self.section.exact_updates, precision=precision)
        except PlacementFailedError as failure:
            contender.row.notes.append(f"no error in {precision or 'the configured precision'}: {failure}")
            return None
        return float(answers[0]["error"])

    def _time(self, contender: _Contender) -> None:
        answers = contender.session.ask(
            "round", updates=self.section.updates, warmup_updates=self.section.warmup_updates
        )
        contender.rounds.append(round_of(answers))
        logger.debug("%s: %s s per update", contender.case.title, number(contender.rounds[-1].seconds))
        self._let_stay(contender)

    def _let_stay(self, contender: _Contender) -> None:
        """Keeps processes until their next turn where that is wanted, and ends them elsewhere."""
        may_stay = self.section.keep_alive
        if may_stay is None:
            # What waits on a GPU takes up its memory, which the others are to have for themselves.
            memory = sum(contender.row.memory)
            may_stay = not self.on_cuda and memory <= _KEPT_SHARE * free_memory(torch.device("cpu"))
        if not may_stay:
            contender.session.close()

    def _make_reference(self) -> Reference:
        """Makes the float64 run, in one shot; where that doesn't fit, in as many micro-steps as are compared.

        Raises:
            UserError: the configuration can't be trained, whatever the placement.
        """
        problem = ""
        for steps in dict.fromkeys([1, max(self.section.accumulation_steps)]):
            try:
                with closing(self._session(reference_case(steps), "reference")) as session:
                    answer = session.ask("make_reference", updates=self.section.exact_updates)[0]
                return Reference(accumulation_steps=steps, parameters=answer["parameters"])
            except PlacementFailedError as failure:
                if failure.kind == "user":
                    raise UserError(str(failure)) from failure
                problem = str(failure)
                logger.debug("the reference in %d micro-steps: %s", steps, failure)
                if failure.kind not in ("memory", "died"):
                    break
        logger.warning("there is no float64 reference, so no errors: %s", problem)
        return Reference(problem=problem)
