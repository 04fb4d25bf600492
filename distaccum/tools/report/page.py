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
from distaccum.tools.pages import page as html
from distaccum.tools.pages.svg import escaped
from distaccum.tools.report.charts import Charts, style_of, window_of_median
from distaccum.tools.report.runs import Run, differences, read_runs
from distaccum.tools.report.story import comparison, facts, how_it_went, what_to_look_at

_STYLE = Path(__file__).with_name("page.css")
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
                is_a_page = html.MADE_BY.encode() in file.read(1000)
            require(is_a_page, f"{path} exists already and is no page of distaccum: choose another file with --out.")
        write_text(path, page_of(runs))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}. Choose another with --out.") from error
    return path


def page_of(runs: Sequence[Run]) -> str:
    """The whole page."""
    is_single = len(runs) == 1
    subjects = list(dict.fromkeys(html.subject_of(run.config) or run.name for run in runs))
    title = subjects[0] if is_single else f"{len(runs)} runs: {', '.join(subjects[:3])}"
    where = " · ".join(str(run.path) for run in runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")
    sections = [html.header(title, facts(runs[0]) if is_single else "", where), _verdict(runs)]
    if not is_single:
        sections.append(_runs_table(runs))
    sections += [_progress(runs), _machine(runs), _differences(runs), _circumstances(runs)]
    return html.whole_page(title, sections, _STYLE.read_text(encoding="utf-8"), has_hover=True)


def _verdict(runs: Sequence[Run]) -> str:
    is_single = len(runs) == 1
    lead = how_it_went(runs[0]) if is_single else comparison(runs)
    told = [(run, text) for run in runs for text in what_to_look_at(run)]
    content = [f'<p class="lead">{escaped(lead)}</p>']
    if told:
        items = "".join(
            f"<li>{'' if is_single else f'<b>{escaped(run.name)}</b>: '}{escaped(text)}</li>" for run, text in told[:12]
        )
        more = f"<li>and {len(told) - 12} more</li>" if len(told) > 12 else ""
        content.append(f"<h3>What to look at</h3><ul>{items}{more}</ul>")
    else:
        content.append("<p>Nothing stands out: no skipped update, no long wait for data or in the sync.</p>")
    return html.section("How it went", *content, style="verdict")


def _runs_table(runs: Sequence[Run]) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics.evaluation_metrics()))[:4]
    heads = ["run", "state", "updates", "samples", "window", "training loss"]
    heads += [f"best {words(name)}" for name in metrics] + ["samples/s", "in updates", "memory"]
    rows = []
    for run in runs:
        bests = [run.best(name) for name in metrics]
        losses = [value for _, value in run.metrics.values("loss") if math.isfinite(value)]
        rows.append(
            [
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
        )
    told = "In brackets: the update of the best evaluation." if metrics else ""
    return html.section("The runs", html.table(heads, rows), html.note(told))


def _count(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:,.0f}"


def _progress(runs: Sequence[Run]) -> str:
    """What was learned."""
    is_single = len(runs) == 1
    drawn = Charts(runs)
    figures = [drawn.chart("Loss" if is_single else "Training loss", "loss", averaged=True), *drawn.evaluations()]
    if len({run.window for run in runs}) > 1:
        # Of windows of unequal size, updates alone are no fair comparison.
        over_samples = Charts(runs, over_samples=True)
        figures += [over_samples.chart("Training loss", "loss", averaged=True), *over_samples.evaluations()]
    figures += [
        drawn.chart("Gradient norm before clipping", "grad_norm", averaged=True),
        drawn.chart("Learning rate", "lr", is_log=False, from_zero=True),
        drawn.noise_scale(),
        drawn.chart("Coherence of the micro-gradients", "coherence"),
    ]
    return html.section("Learning", _colours(runs), html.charts(figures), html.note(_how_drawn(runs)))


def _colours(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return html.key([(style_of(index), run.name) for index, run in enumerate(runs)])
    entries = [("r0", "training")]
    if runs[0].metrics.evaluations:
        entries.append(("r1", "evaluation (of the loss)"))
    if runs[0].skipped:
        entries.append(("skipped", "skipped update"))
    return html.key(entries)


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


def _machine(runs: Sequence[Run]) -> str:
    """What it took."""
    drawn = Charts(runs)
    throughput = drawn.chart("Samples per second", "samples_per_second", is_log=False, from_zero=True, averaged=True)
    if len(runs) == 1:
        content = html.charts([throughput, drawn.time_split(), drawn.memory()])
    else:
        content = drawn.time_split() + html.charts([throughput, drawn.memory()])
    return html.section("Time and memory", content) if content else ""


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    rows = [[name, *texts] for name, texts in differences(runs)]
    if not rows:
        return html.section("What differs in the configuration", "<p>Nothing: all runs were told the same.</p>")
    return html.section("What differs in the configuration", html.table(["key", *(run.name for run in runs)], rows))


def _circumstances(runs: Sequence[Run]) -> str:
    entries = []
    for run in runs:
        facts_of_run = [("folder", str(run.path.resolve()))]
        if run.record is not None and run.record.plan:
            facts_of_run.append(("cut", run.record.plan))
        if run.resumed_after:
            after = ", ".join(f"{update:,}" for update in run.resumed_after)
            facts_of_run.append(("went on", f"from the checkpoint after update {after}"))
        facts_of_run += [("not read", problem) for problem in run.problems]
        entries.append(html.definitions(facts_of_run))
        if run.config:
            name = "The configuration" if len(runs) == 1 else f"The configuration of {run.name}"
            entries.append(html.configuration(run.config, name))
    made = time.strftime("%Y-%m-%d %H:%M")
    return html.section("Where this comes from", *entries, html.note(f"Made by distaccum.report, {made}."))
