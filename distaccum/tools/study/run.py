"""A study from its start to its page: runs its points one after another, or one of them, and concludes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import TextColumn

from distaccum.config import as_plain
from distaccum.config import instantiate as targets
from distaccum.config.enums import usual_goal
from distaccum.config.redaction import redacted, redacted_arguments
from distaccum.config.tools import StudyConfig
from distaccum.errors import EXIT_INTERRUPTED, EXIT_UNFINISHED, UserError
from distaccum.loaders.options import size_of
from distaccum.observers.formatting import duration, number
from distaccum.observers.metrics_reading import read_metrics
from distaccum.observers.run_file import Outcome, RunRecord
from distaccum.runtime.files import read_plain_yaml, without_tilde, write_result
from distaccum.runtime.logs import console, logging_to
from distaccum.runtime.stop_signals import SIGNALS
from distaccum.tools.bench.environment import as_json, environment
from distaccum.tools.bench.terminal import progress_bar
from distaccum.tools.study.advice import advise
from distaccum.tools.study.curves import Learning, crossing, read_learning
from distaccum.tools.study.page import page_of, picture_of
from distaccum.tools.study.point_process import PointFailedError, run
from distaccum.tools.study.points import Point, configuration, max_samples, measures_noise, points_of
from distaccum.tools.study.results import FAILED, Result, Study, chosen_target, conclude, result_of
from distaccum.tools.study.terminal import show
from distaccum.training.run_folder import RunFolder, begin, changes, held_run_folder, refuse_links
from distaccum.training.task import built_task

logger = logging.getLogger(__name__)

_MAY_CHANGE = ("batch_sizes", "lr_rules", "metric", "goal", "target", "smoothing", "point", "threads_per_rank")
"""Keys of `study` that another start of the same study may have otherwise: its runs stay what they are."""


class _StoppedError(Exception):
    """SIGTERM or SIGHUP has arrived: save, and end with the status that asks for another start."""


def study(config: StudyConfig) -> int:
    """Makes a study, or goes on with it; returns the exit status.

    Writes `study.json`, `study.html` and `study.svg` into its folder, beside a run folder for each point.

    Raises:
        UserError: nothing can be learned from this configuration, or the folder can't be written or is another study's.
    """
    num_samples = size_of(targets.build(config.data.train, "data.train"), "training")
    points = points_of(config, num_samples)
    if config.study.point is not None:
        return _study_one(config, points, num_samples)
    _check_same_study(config)
    with held_run_folder(config.run_dir, "none", as_plain(config)) as folder, logging_to(folder.path, 0):
        return _Study(config, folder.path, points, num_samples).make(points)


def _study_one(config: StudyConfig, points: list[Point], num_samples: int) -> int:
    """Runs one point, while other jobs run the others; the last one concludes."""
    index = config.study.point
    assert index is not None
    _check_array(len(points))
    if config.run_dir is None:
        raise UserError(
            f"study.point={index} runs one point of a study that others run too: name its folder with run_dir=…."
        )
    if index >= len(points):
        raise UserError(
            f"study.point={index} is impossible: this study has {len(points)} points, 0 to {len(points) - 1}."
        )
    _check_same_study(config)
    path = without_tilde(config.run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={path} can't be written: {error.strerror or error}.") from error
    if not os.path.exists(path / "config.yaml"):
        plain = as_plain(config)
        plain["study"]["point"] = None
        begin(RunFolder(path, is_restart=False), plain)
    point = points[index]
    with logging_to(path / "logs" / point.name, 0):
        return _Study(config, path, points, num_samples).make([point])


def _check_array(num_points: int) -> None:
    """Refuses an array of another size, which would leave points out, or run some for nothing."""
    count = os.environ.get("SLURM_ARRAY_TASK_COUNT")
    if count is not None and int(count) != num_points:
        raise UserError(
            f"a study of {num_points} points needs sbatch --array=0-{num_points - 1}, and the array has {count} jobs."
        )


def _check_same_study(config: StudyConfig) -> None:
    """Refuses a folder that holds a run or another study."""
    if config.run_dir is None:
        return
    path = without_tilde(config.run_dir)
    if os.path.exists(path / "metrics.jsonl") or os.path.exists(path / "checkpoints"):
        raise UserError(f"run_dir={config.run_dir} holds a run, and a study needs a folder of its own: choose another.")
    if not os.path.exists(path / "points"):
        return
    before = read_plain_yaml(path / "config.yaml")
    if before is None or not isinstance(before.get("study"), dict):
        raise UserError(
            f"{path / 'config.yaml'} can't be read, so it is not known whether run_dir={config.run_dir} holds "
            "this study: choose another folder."
        )
    now = redacted(as_plain(config))
    for plain in (before, now):
        plain["study"] = {key: value for key, value in plain["study"].items() if key not in _MAY_CHANGE}
    if different := changes(before, now):
        raise UserError(
            f"run_dir={config.run_dir} holds a study with other settings ({'; '.join(different[:5])}), whose runs "
            "can't be compared with new ones. Choose another folder, or put that back."
        )


class _Study:
    """Runs the points of a study in its folder, and concludes."""

    def __init__(self, config: StudyConfig, path: Path, points: list[Point], num_samples: int) -> None:
        self.config = config
        self.section = config.study
        self.path = path
        self.points = points
        self.num_samples = num_samples
        self.limit = max_samples(config, num_samples)
        self.noise_scale = measures_noise(config, built_task(config.task))
        assert self.section.metric is not None
        self.metric = self.section.metric
        self.goal = self.section.goal or usual_goal(self.metric)
        self.smoothing_samples = max(1, self.section.smoothing * self.limit // self.section.evaluations)

    def make(self, wanted: list[Point]) -> int:
        """Runs those points that are not finished yet, and writes the results; returns the exit status."""
        waiting = [point for point in wanted if not self._is_over(point, self._learning(point))]
        self._log_start(waiting)
        status = 0
        try:
            with _sigterm_raises():
                self._run_all(waiting)
        except (KeyboardInterrupt, _StoppedError) as stop:
            status = EXIT_INTERRUPTED if isinstance(stop, KeyboardInterrupt) else EXIT_UNFINISHED
        results = [self._result(point) for point in self.points]
        found = self._concluded(results)
        if status == 0 and self.section.point is not None and not found.is_complete:
            return status  # the job that ends last concludes
        self._write_all(found)
        show(found, self.path)
        if all(result.outcome == FAILED for result in results):
            raise UserError(f"no run of the study could be made. Of {results[0].title}: {results[0].reason}")
        if status:
            over = sum(self._is_over(point, self._learning(point)) for point in self.points)
            console.print(
                f"stopped: {over} of {len(self.points)} runs are finished, the one under way has saved. To go on, the "
                f"same command with run_dir={self.path}",
                soft_wrap=True,
            )
        return status

    def _log_start(self, waiting: list[Point]) -> None:
        sizes = ", ".join(str(size) for size in dict.fromkeys(point.batch_size for point in self.points))
        target = "chosen from the runs" if self.section.target is None else f"{self.section.target:g}"
        logger.info(
            "%d runs (batch sizes %s), each of at most %s samples; target of %s: %s",
            *(len(self.points), sizes, f"{self.limit:,}", self.metric, target),
        )
        logger.info(
            "every window has its full size (batch.drop_last=true); warm-up and schedule take the same samples at each "
            "batch size"
        )
        if len(waiting) < len(self.points) and self.section.point is None:
            logger.info("%d of them are finished already", len(self.points) - len(waiting))
        logger.info("files: %s", self.path)

    def _run_all(self, points: list[Point]) -> None:
        with progress_bar(TextColumn("{task.completed:.1f}/{task.total}")) as progress:
            bar = progress.add_task("", total=len(points))
            for done, point in enumerate(points):

                def show_progress(learning: Learning, point: Point = point, done: int = done) -> None:
                    shown = f" · {self.metric} {number(learning.curve[-1].value)}" if learning.curve else ""
                    completed = done + min(1.0, learning.samples / self.limit)
                    progress.update(bar, description=f"{point.title}{shown}", completed=completed)

                show_progress(Learning())
                self._run(point, show_progress)

    def _run(self, point: Point, show_progress: Callable[[Learning], None]) -> None:
        run_dir = self._run_dir(point)
        refuse_links(self.path / "points", point.name)

        def has_learned_enough() -> bool:
            learning = self._learning(point)
            show_progress(learning)
            return self._has_reached(learning)

        if before := RunRecord.read(run_dir):
            replace(before, outcome=Outcome.running, reason=None).write(run_dir)
        try:
            run(
                configuration(point, self.config, self.num_samples, str(run_dir), noise_scale=self.noise_scale),
                has_learned_enough,
                ranks=self.section.ranks,
                threads=self.section.threads_per_rank,
                log=self.path / "logs" / f"{point.name}.log",
            )
        except PointFailedError as failure:
            record = self._record(point)
            if record.reason is None:  # it was killed, or failed before its first update
                record = replace(record, outcome=Outcome.failed, reason=str(failure))
                try:
                    run_dir.mkdir(parents=True, exist_ok=True)
                    record.write(run_dir)
                except OSError as error:
                    raise UserError(f"{run_dir} can't be written: {error.strerror or error}. Remove it.") from failure
            logger.warning("%s: %s", point.title, record.reason)
            return
        logger.info("%s: %s", point.title, self._in_words(self._learning(point)))

    def _in_words(self, learning: Learning) -> str:
        amount = f"{learning.updates:,} updates, {learning.samples:,} samples, {duration(learning.seconds)}"
        if not learning.curve:
            return f"{amount}, and no value of {self.metric}"
        return f"{self.metric} {number(learning.curve[-1].value)} after {amount}"

    def _run_dir(self, point: Point) -> Path:
        return self.path / "points" / point.name

    def _learning(self, point: Point) -> Learning:
        return read_learning(self._run_dir(point), self.metric, self.section.smoothing, self.smoothing_samples)

    def _is_over(self, point: Point, learning: Learning) -> bool:
        """Returns whether nothing of it is left to be run. What failed is tried again, what diverged is not."""
        if self._record(point).outcome is Outcome.diverged:
            return True
        updates = configuration(point, self.config, self.num_samples, "").train.max_updates
        assert updates is not None
        return learning.updates >= updates or self._has_reached(learning)

    def _has_reached(self, learning: Learning) -> bool:
        target = self.section.target
        return target is not None and crossing(learning.curve, target, self.goal) is not None

    def _record(self, point: Point) -> RunRecord:
        return RunRecord.read(self._run_dir(point)) or RunRecord()

    def _result(self, point: Point) -> Result:
        learning, record = self._learning(point), self._record(point)
        has_failed = record.outcome in (Outcome.failed, Outcome.diverged)
        return result_of(
            point,
            learning,
            is_over=self._is_over(point, learning),
            reason=record.reason or "" if has_failed else "",
            diverged=record.outcome is Outcome.diverged,
        )

    def _concluded(self, results: list[Result]) -> Study:
        if self.metric != "train/loss":
            self._check_metric(results)
        target = self.section.target
        found = Study(
            **environment("distaccum.study"),
            config=redacted(as_plain(self.config)),
            num_samples=self.num_samples,
            max_samples=self.limit,
            metric=self.metric,
            goal=self.goal.name,
            target=chosen_target(results, self.goal) if target is None else target,
            is_target_chosen=target is None,
            results=results,
        )
        conclude(found)
        found.advice = advise(found, redacted_arguments(sys.argv[1:]))
        return found

    def _check_metric(self, results: list[Result]) -> None:
        if any(result.curve for result in results) or not any(result.updates for result in results):
            return
        for point in self.points:
            names: list[str] = []
            with suppress(OSError):
                metrics = read_metrics(self._run_dir(point) / "metrics.jsonl")
                names = sorted(set(metrics.evaluation_metrics()))
            if names:
                raise UserError(
                    f"study.metric={self.metric}: the evaluations have no such metric. They have "
                    f"{', '.join(f'eval/{name}' for name in names)}."
                )

    def _write_all(self, found: Study) -> None:
        texts = {"study.json": as_json(found), "study.html": page_of(found), "study.svg": picture_of(found)}
        for name, text in texts.items():
            if text:
                write_result(self.path / name, text, "Mend that, and start the same command again.")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def raise_stop(*_: Any) -> None:
        raise _StoppedError

    before = {number: signal.signal(number, raise_stop) for number in {signal.SIGTERM, signal.SIGHUP} & {*SIGNALS}}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
