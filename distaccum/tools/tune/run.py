"""Runs a tuning: the search, the confirmation and the forecast; writes the results."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from distaccum.config import SingleConfig, TrainConfig, as_plain
from distaccum.config.enums import DeviceChoice
from distaccum.config.redaction import redacted, redacted_arguments
from distaccum.config.tools import TuneConfig
from distaccum.errors import UserError
from distaccum.runtime.files import without_tilde, write_result, write_text
from distaccum.runtime.logs import console, logging_to
from distaccum.tools.bench.environment import as_json, environment, refuse_other_results
from distaccum.tools.bench.sessions import PlacementFailedError, Session
from distaccum.tools.bench.terminal import progress_bar
from distaccum.tools.tune.forecast import forecast_of, why_not
from distaccum.tools.tune.report import TuneReport, TuneRow
from distaccum.tools.tune.search import Search
from distaccum.tools.tune.settings import TuneSetting, base_of, command_of, experiment_of, overrides_of
from distaccum.tools.tune.terminal import line_of, show
from distaccum.training.run_folder import held_run_folder

logger = logging.getLogger(__name__)


def tune(config: TuneConfig) -> TuneReport:
    """Tunes a configuration; writes `tune.json` into the run folder, and the file `tune.write`.

    Raises:
        UserError: the configuration can't be trained as it is, or a file can't be written.
    """
    world_size = _world_size(config)
    refuse_other_results(config.run_dir, "tune.json", "tuning")
    written = without_tilde(config.tune.write) if config.tune.write is not None else None
    if written is not None and written.exists():
        raise UserError(f"tune.write={written} exists already. Choose another name, or remove that file.")
    with held_run_folder(config.run_dir, "none", as_plain(config)) as folder, logging_to(folder.path, 0):
        started = time.monotonic()
        report, setting = _run(config, world_size, folder.path)
        report.seconds = time.monotonic() - started
        write_result(folder.path / "tune.json", as_json(report), "Choose another run_dir.")
        show(report, folder.path)
        if written is not None:
            _write_experiment(written, setting, report)
    return report


def _run(config: TuneConfig, world_size: int, run_dir: Path) -> tuple[TuneReport, TuneSetting]:
    section = config.tune
    base = base_of(config, world_size)
    threads = section.threads_per_rank or (len(os.sched_getaffinity(0)) if world_size == 1 else 1)
    report = TuneReport(
        **environment("distaccum.tune"), config=redacted(as_plain(config)), world_size=world_size, rows=[]
    )
    started = time.monotonic()
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        bar = progress.add_task("starting", total=60 * section.minutes)

        def tell(doing: str, row: TuneRow | None) -> None:
            progress.update(bar, completed=time.monotonic() - started)
            if doing:
                progress.update(bar, description=doing)
            if row is not None:
                console.print(line_of(row), soft_wrap=True)

        def start(candidate: TrainConfig, name: str) -> Session:
            return Session(
                config=candidate,
                num_processes=world_size,
                sync_every_step=False,
                threads=threads,
                reference=run_dir / "unused",
                log=run_dir / "logs" / f"{name}.log",
                timeout_seconds=section.timeout_seconds,
            )

        search = Search(config, base, world_size, start, tell)
        stack.callback(search.close)
        search.run()
        try:
            report.confirmation = search.confirm()
        except PlacementFailedError as failure:
            raise UserError(f"the suggestion can't be confirmed: {failure}. Run the same command again.") from failure
        report.rows, report.not_tried = search.rows, search.not_tried
        report.memory_kind = search.default.prepared["memory_kind"]
        setting = search.best.setting
        report.suggestion = overrides_of(setting)
        report.train_command = shlex.join(command_of(setting, redacted_arguments(sys.argv[1:]), world_size))
        report.no_forecast = why_not(base)
        if report.no_forecast is None:
            tell("measuring for the forecast", None)
            try:
                report.forecast = forecast_of(
                    search.best, search.best_config, world_size, section, search.gradient_bytes
                )
            except PlacementFailedError as failure:
                report.no_forecast = str(failure)
    return report, setting


def _world_size(config: TuneConfig) -> int:
    count = config.tune.world_size
    if count is None:
        count = 1 if config.device is DeviceChoice.cpu else max(1, torch.cuda.device_count())
    if count == 1 and not isinstance(config.strategy, SingleConfig) and config.strategy.name != "dp":
        raise UserError(
            f"strategy={config.strategy.name} needs ranks, and tune.world_size is 1 here. Set tune.world_size=2 or "
            "more, or strategy=single."
        )
    return count


def _write_experiment(path: Path, setting: TuneSetting, report: TuneReport) -> None:
    chosen = [entry.partition("=")[2] for entry in sys.argv[1:] if entry.lstrip("+").startswith("experiment=")]
    comment = f"Made on {report.date[:10]} by: {report.command}"
    text = experiment_of(setting, chosen[-1] if chosen else None, comment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. Choose another path.") from error
    console.print(f"written: {path} (experiment={path.stem})", soft_wrap=True)
