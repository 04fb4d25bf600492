"""The page of one run or of several, and its file."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from distaccum.errors import UserError, require
from distaccum.observers.formatting import byte_size, duration, number, rate, words
from distaccum.runtime.files import write_text
from distaccum.tools.pages.page import MADE_BY, Section, render
from distaccum.tools.report.charts import Charts, style_of, window_of_median
from distaccum.tools.report.runs import Run, differences, read_runs
from distaccum.tools.report.story import comparison, facts, how_it_went, what_to_look_at

_MANY_UPDATES = 480


def write_page(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of some runs; returns its path.

    Args:
        out: None: `report.html` in the run's folder, or in the current one if there are several runs.

    Raises:
        UserError: a folder holds no run, or the file can't be written or is somebody else's.
    """
    runs = read_runs(folders)
    path = out if out is not None else folders[0] if len(folders) == 1 else Path()
    if out is None or os.path.isdir(path):
        path = path / "report.html"
    try:
        if path.is_file() and not path.is_symlink():  # a link is replaced, whatever it leads to
            with path.open("rb") as file:
                is_a_page = MADE_BY.encode() in file.read(1000)
            require(is_a_page, f"{path} exists already and is no page of distaccum: choose another file with --out.")
        write_text(path, page_of(runs))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. Choose another with --out.") from error
    return path


def page_of(runs: Sequence[Run]) -> str:
    """Returns the whole page."""
    is_single = len(runs) == 1
    subjects = list(dict.fromkeys(run.subject for run in runs))
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics.evaluation_metrics()))[:4]
    where = " · ".join(str(run.path) for run in runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")
    return render(
        "report/page.html",
        "report",
        subjects[0] if is_single else f"{len(runs)} runs: {', '.join(subjects[:3])}",
        has_hover=True,
        facts=[facts(runs[0]) if is_single else "", where],
        runs=runs,
        names=[run.name for run in runs],
        lead=how_it_went(runs[0]) if is_single else comparison(runs),
        striking=[(run.name, text) for run in runs for text in what_to_look_at(run)],
        metrics=metrics,
        heads=["run", "state", "updates", "samples", "window", "training loss"]
        + [f"best {words(name)}" for name in metrics]
        + ["samples/s", "in updates", "memory"],
        rows=[_row(run, metrics) for run in runs],
        learning=_learning(runs),
        machine=_machine(runs),
        differences=[[name, *texts] for name, texts in differences(runs)],
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _row(run: Run, metrics: Sequence[str]) -> list[str]:
    """Returns what the table of several runs says of one."""
    bests = [run.best(name) for name in metrics]
    losses = run.metrics.finite("loss")
    return [
        run.name,
        run.state,
        f"{run.num_updates:,}",
        _count(run.samples),
        _count(run.window),
        number(losses[-1]) if losses else "—",
        *(f"{number(best[1])} ({best[0]:,})" if best else "—" for best in bests),
        "—" if math.isnan(run.samples_per_second) else rate(run.samples_per_second),
        "—" if math.isnan(run.train_seconds) else duration(run.train_seconds),
        "—" if run.peak_memory is None else byte_size(run.peak_memory),
    ]


def _count(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:,.0f}"


def _learning(runs: Sequence[Run]) -> Section:
    is_single = len(runs) == 1
    drawn = Charts(runs)
    figures = [
        drawn.chart("Loss" if is_single else "Training loss", "loss", averaged=True),
        drawn.family("Mean of each loss", "terms", "losses"),
        *drawn.evaluations(),
    ]
    if len({run.window for run in runs}) > 1:
        # Of windows of unequal size, updates alone are no fair comparison.
        over_samples = Charts(runs, over_samples=True)
        figures += [over_samples.chart("Training loss", "loss", averaged=True), *over_samples.evaluations()]
    figures += [
        drawn.chart("Gradient norm before clipping", "grad_norm", averaged=True),
        drawn.family("Gradient norm of each group", "grad_norm", "groups"),
        drawn.family("Learning rate of each group", "lr", "rates")
        or drawn.chart("Learning rate", "lr", is_log=False, from_zero=True),
        drawn.family("Gradient norm of each block", "layers/grad_norm", "blocks"),
        drawn.family("Update over weights of each block", "layers/update_ratio", "blocks"),
        drawn.chart("Evaluations of a window", "evaluations", is_log=False, from_zero=True),
        drawn.noise_scale(),
        drawn.chart("Coherence of the micro-gradients", "coherence"),
    ]
    return Section(heading="Learning", key=_colours(runs), figures=list(filter(None, figures)), note=_how_drawn(runs))


def _colours(runs: Sequence[Run]) -> list[tuple[str, str]]:
    if len(runs) > 1:
        return [(style_of(index), run.name) for index, run in enumerate(runs)]
    entries = [("r0", "training")]
    if runs[0].metrics.evaluations:
        entries.append(("r1", "evaluation (of the loss)"))
    if runs[0].skipped:
        entries.append(("skipped", "skipped update"))
    return entries


def _how_drawn(runs: Sequence[Run]) -> str:
    lengths = sorted({window_of_median(len(run.metrics.updates)) for run in runs})
    texts = []
    if lengths[-1] > 1:
        span = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        pale = "; pale: each update" if len(runs) <= 3 else ""
        texts.append(f"Lines of training loss and gradient norm are medians over {span} updates{pale}.")
    if any(len(run.metrics.updates) > _MANY_UPDATES for run in runs):
        texts.append(
            f"Where there are more points than {_MANY_UPDATES}, the lowest and the highest of each of "
            f"{_MANY_UPDATES // 2} equal stretches are drawn, so that no spike is lost."
        )
    if any(not math.isfinite(value) for run in runs for _, value in run.metrics.values("loss")):
        texts.append("Gaps: values that were not finite.")
    return " ".join(texts)


def _machine(runs: Sequence[Run]) -> Section | None:
    """Shows how fast it was, what the time went into, and memory; None if nothing of it is known."""
    drawn = Charts(runs)
    throughput = drawn.chart("Samples per second", "samples_per_second", is_log=False, from_zero=True, averaged=True)
    split, memory = drawn.time_split(), drawn.memory()
    title = "Time and memory"
    if len(runs) > 1 and split is not None:
        figures = list(filter(None, (throughput, memory)))
        return Section(heading=title, key=split.key, wide=split.chart, figures=figures)
    figures = list(filter(None, (throughput, split, memory)))
    return Section(heading=title, figures=figures) if figures else None
