"""Draws the charts of a page of runs; each has its content in words too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from distaccum.observers.formatting import byte_size, number, words
from distaccum.tools.pages.lines import Axis, Band, Curve, Mark, line_chart
from distaccum.tools.pages.page import TIME_PARTS, Figure
from distaccum.tools.pages.rows import Cell, Panel, Segment, row_chart
from distaccum.tools.pages.thinning import moving_median, thinned
from distaccum.tools.report.runs import Run

NUM_STYLES = 8
"""Colours for runs; further runs have the same ones again, dashed."""
_POINTS = 480
_STRETCHES = 60
_WIDE_RANGE = 30.0
_MANY_SKIPPED = 400
Point = tuple[float, float]


def style_of(index: int) -> str:
    """The CSS class of a run's colour."""
    return f"r{index % NUM_STYLES}"


def window_of_median(length: int) -> int:
    """Returns over how many updates a curve of some length takes its median: an odd number, about a fortieth of it."""
    return 1 if length < 40 else 2 * (length // 80) + 1


def _has_finite(points: Sequence[Point]) -> bool:
    return any(math.isfinite(value) for _, value in points)


def _spread(names: list[str], most: int) -> list[str]:
    """Returns at most `most` of the names, evenly spaced, with the first and the last."""
    if len(names) <= most:
        return names
    return [names[index * (len(names) - 1) // (most - 1)] for index in range(most)]


class Charts:
    """Draws the charts of some runs.

    Args:
        over_samples: the horizontal axis counts samples instead of updates.
    """

    def __init__(self, runs: Sequence[Run], *, over_samples: bool = False) -> None:
        self._runs = runs
        self._is_single = len(runs) == 1
        self._over_samples = over_samples
        self._unit = "sample" if over_samples else "update"

    def _placed(self, run: Run, points: Sequence[Point]) -> list[Point]:
        """Moves points from updates to the horizontal axis."""
        if not self._over_samples:
            return list(points)
        samples = dict(run.metrics.values("samples"))
        return [(samples[update], value) for update, value in points if update in samples]

    def _series(self, name: str) -> list[tuple[int, Run, list[Point]]]:
        found = []
        for index, run in enumerate(self._runs):
            group, _, metric = name.partition("/")
            points = run.metrics.evaluated(metric) if group == "eval" else run.metrics.values(name)
            points = self._placed(run, points)
            if _has_finite(points):
                found.append((index, run, points))
        return found

    def chart(
        self, title: str, name: str, *, is_log: bool | None = None, from_zero: bool = False, averaged: bool = False
    ) -> Figure | None:
        """Draws one measure of all runs over the updates; None if none has it.

        Args:
            name: a key of the lines (`loss`), or `eval/METRIC`.
            is_log: None: if the values are positive and span a wide range.
            averaged: a median over some updates as the line, each update pale behind it.
        """
        series = self._series(name)
        if not series:
            return None
        is_evaluation = name.startswith("eval/")
        curves: list[Curve] = []
        for index, run, points in series:
            curves += self._curves(index, run, points, averaged=averaged, has_marks=is_evaluation)
        if self._is_single and name == "loss" and (evaluated := self._runs[0].metrics.evaluated("loss")):
            run = self._runs[0]
            curves += self._curves(1, run, self._placed(run, evaluated), averaged=False, has_marks=True)
        axis = self._axis(title, [value for _, _, points in series for _, value in points], is_log, from_zero)
        marks = self._skipped(curves, axis) if name == "loss" else []
        described = f"{title} over {self._unit}s: {self._all_in_words(series)}."
        return Figure(self._drawn(described, [*curves, *marks], axis))

    def _curves(self, index: int, run: Run, points: list[Point], *, averaged: bool, has_marks: bool) -> list[Curve]:
        style = style_of(index)
        is_dashed = index >= NUM_STYLES
        hint = self._in_words(run.name, points)
        label = run.name if not self._is_single else "evaluation" if has_marks else "training"
        length = window_of_median(len(points)) if averaged else 1
        if length == 1:
            marks = has_marks and len(points) <= 60
            drawn = thinned(points, _POINTS)
            return [Curve(style, drawn, hint, has_marks=marks, is_dashed=is_dashed, label=label)]
        medians = moving_median(points, length, _POINTS)
        curves = [Curve(style, medians, hint, is_dashed=is_dashed, label=label)]
        if len(self._runs) <= 3:
            curves.insert(0, Curve(f"{style} pale", thinned(points, _POINTS), hint))
        return curves

    def _skipped(self, curves: Sequence[Curve], axis: Axis) -> list[Curve]:
        """Draws skipped updates as marks at the bottom."""
        heights = [y for curve in curves for _, y in curve.points if axis.has(y)]
        bottom = axis.low if axis.low is not None else min(heights, default=1.0)
        found = []
        for run in self._runs:
            points = self._placed(run, [(float(update), bottom) for update in run.skipped[:_MANY_SKIPPED]])
            if points:
                hint = f"{run.name}: {len(run.skipped)} skipped updates"
                found.append(Curve("skipped", points, hint, has_marks=True, has_line=False))
        return found

    def _axis(self, title: str, values: Sequence[float], is_log: bool | None, from_zero: bool) -> Axis:
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite), max(finite)
        if is_log is None:
            is_log = low > 0 and high > low * _WIDE_RANGE
        return Axis(title=title, is_log=is_log and low > 0, low=0.0 if from_zero and low >= 0 and not is_log else None)

    def _drawn(
        self,
        described: str,
        curves: Sequence[Curve],
        axis: Axis,
        bands: Sequence[Band] = (),
    ) -> Markup:
        marks = []
        if self._is_single and not self._over_samples:
            marks = [Mark(float(update), "went on") for update in sorted(set(self._runs[0].resumed_after))[:3]]
        x = Axis(title=self._unit)
        return line_chart(described, curves, x=x, y=axis, bands=bands, marks=marks, size=(400.0, 250.0))

    def _all_in_words(self, series: Sequence[tuple[int, Run, list[Point]]]) -> str:
        return "; ".join(self._in_words(run.name, points) for _, run, points in series)

    def _in_words(self, name: str, points: Sequence[Point]) -> str:
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        if not finite:
            return f"{name}: no finite value"
        low, high = min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])
        ends = [f"{number(y)} at {self._unit} {x:,.0f}" for x, y in (finite[0], finite[-1])]
        extremes = [f"{which} {number(y)} at {x:,.0f}" for which, (x, y) in (("lowest", low), ("highest", high))]
        return f"{name}: {', '.join((*ends, *extremes))}"

    def family(self, title: str, name: str, members: str) -> Figure | None:
        """Draws measures of one run that belong together, a line for each; None if there are fewer than two.

        Of `terms`, evaluations are drawn too, dashed; of `lr`, those that are equal throughout are one line.

        Args:
            name: as `Metrics.family` takes it.
            members: what they are, for the caption.
        """
        if not self._is_single:
            return None
        metrics = self._runs[0].metrics
        found = {member: points for member, points in metrics.family(name).items() if _has_finite(points)}
        is_rate = name == "lr"
        lines: dict[Any, str] = {}
        for member, points in found.items():
            lines.setdefault(tuple(points) if is_rate else member, member)
        if len(lines) < 2:
            return None
        shown = _spread(list(lines.values()), NUM_STYLES)
        curves, described, values = [], [], []
        length = 1 if is_rate else window_of_median(max(len(found[member]) for member in shown))
        for index, member in enumerate(shown):
            evaluated = metrics.evaluated(f"loss/{member}") if name == "terms" else []
            for points, label, median_of in ((found[member], member, length), (evaluated, f"evaluation, {member}", 1)):
                if _has_finite(points):
                    hint = self._in_words(label, points)
                    medians = moving_median(points, median_of, _POINTS)
                    is_dashed = points is evaluated
                    curves.append(Curve(style_of(index), medians, hint, is_dashed=is_dashed, label=label))
                    described.append(hint)
                    values += [value for _, value in points]
        captions = [
            f"{len(shown)} of {len(lines)} {members}, evenly spaced." if len(shown) < len(lines) else "",
            "Groups of equal rates are one line, with the name of the first." if len(lines) < len(found) else "",
            f"Medians over {length} values." if length > 1 else "",
            "Dashed: evaluations." if any(curve.is_dashed for curve in curves) else "",
        ]
        axis = self._axis(title, values, False if is_rate else None, is_rate)
        chart = self._drawn(f"{title} over {self._unit}s: {'; '.join(described)}.", curves, axis)
        key = [(style_of(index), member) for index, member in enumerate(shown)]
        return Figure(chart, key=key, caption=" ".join(filter(None, captions)))

    def noise_scale(self) -> Figure | None:
        """Draws the gradient noise scale, for one run with its error and the window; None if it was not measured."""
        series = self._series("noise_scale")
        if not series:
            return None
        curves = [
            Curve(style_of(index), thinned(points, _POINTS), self._in_words(run.name, points), label=run.name)
            for index, run, points in series
        ]
        bands = []
        if self._is_single:
            run = self._runs[0]
            errors = dict(run.metrics.values("noise_scale_error"))
            triples = [
                (x, max(value - errors[x], value / 10), value + errors[x])
                for x, value in series[0][2]
                if math.isfinite(value) and value > 0 and math.isfinite(errors.get(x, math.nan))
            ]
            if triples:
                bands.append(Band("r0", triples[:: max(1, len(triples) // _POINTS)], "the error of the noise scale"))
            sizes = run.metrics.values("window_samples") or [
                (u, run.window) for u, _ in run.metrics.values("noise_scale")
            ]
            windows = [(x, v) for x, v in self._placed(run, sizes) if math.isfinite(v)]
            if windows:
                curves.append(Curve("quiet-line", thinned(windows, _POINTS), "samples of the window", is_dashed=True))
        values = [value for _, _, points in series for _, value in points if math.isfinite(value) and value > 0]
        if not values:
            return None
        axis = Axis(title="Gradient noise scale, samples", is_log=True, low=min(values) / 2)
        described = f"Gradient noise scale: {self._all_in_words(series)}."
        caption = "Dashed: the window." if self._is_single else ""
        return Figure(self._drawn(described, curves, axis, bands), caption=caption)

    def memory(self) -> Figure | None:
        """Draws the peak of memory so far, on rank 0; None if it is not known."""
        series = self._series("peak_memory_bytes")
        if not series:
            return None
        mebi = 2.0**20
        curves = []
        for index, run, points in series:
            hint = f"{run.name}: {byte_size(run.peak_memory or 0)} at most"
            scaled = [(x, value / mebi) for x, value in points]
            curves.append(Curve(style_of(index), thinned(scaled, _POINTS), hint, len(points) <= 20, label=run.name))
        described = "Peak memory of rank 0: " + "; ".join(curve.hint for curve in curves) + "."
        return Figure(self._drawn(described, curves, Axis(title="Peak memory of rank 0, MiB", low=0.0)))

    def time_split(self) -> Figure | None:
        """Draws what an update's time went into: over the updates for one run, in all for several."""
        return self._time_of_one(self._runs[0]) if self._is_single else self._time_of_all()

    def _time_of_one(self, run: Run) -> Figure | None:
        if run.shares is None:
            return None
        lines = [line for line in run.metrics.updates if all(key in line for key in _TIMES)]
        stretches = min(_STRETCHES, len(lines))
        layers: dict[str, list[tuple[float, float, float]]] = {"compute": [], "data": [], "sync": []}
        for index in range(stretches):
            part = lines[index * len(lines) // stretches : (index + 1) * len(lines) // stretches]
            # The median, since the first update may take a hundred times as long.
            total, data, sync = (1e3 * statistics.median(float(line[key] or 0.0) for line in part) for key in _TIMES)
            middle = float(part[len(part) // 2]["update"])
            compute = max(0.0, total - data - sync)
            layers["compute"].append((middle, 0.0, compute))
            layers["data"].append((middle, compute, compute + data))
            layers["sync"].append((middle, compute + data, max(total, compute + data)))
        names = {part: f"{TIME_PARTS[part]} {run.shares[part]:.0%}" for part in layers}
        bands = [Band(part, triples, f"{names[part]} of the time") for part, triples in layers.items()]
        described = f"Time of an update: {', '.join(band.hint for band in bands)}."
        chart = self._drawn(described, [], Axis(title="Time of an update, ms", low=0.0), bands)
        return Figure(chart, key=list(names.items()))

    def _time_of_all(self) -> Figure | None:
        runs = [run for run in self._runs if run.shares is not None]
        if not runs:
            return None
        times, memories = [], []
        for run in runs:
            shares = run.shares or {}
            seconds = 1e3 * run.train_seconds / len(run.metrics.updates)
            bar = [Segment(seconds * s, n, f"{run.name}: {TIME_PARTS[n]} {s:.0%}") for n, s in shares.items()]
            times.append(Cell(bar=bar, label=f"{number(seconds, 2)} ms"))
            peak = run.peak_memory
            memories.append(
                Cell(bar=[Segment(peak, "training", run.name)], label=byte_size(peak)) if peak is not None else Cell()
            )
        panels = [Panel(title="Mean time of an update, ms", share=0.6, label_width=84, cells=times)]
        if any(cell.bar for cell in memories):
            panels.append(
                Panel(title="Peak memory of rank 0", share=0.4, label_width=84, is_bytes=True, cells=memories)
            )
        names = [(run.name if len(run.name) <= 30 else f"…{run.name[-29:]}", "") for run in runs]
        each = "; ".join(f"{run.name} {cell.label}" for run, cell in zip(runs, times, strict=True))
        chart = row_chart(f"Time of an update: {each}", names, [None] * len(runs), panels)
        return Figure(chart, key=list(TIME_PARTS.items()))

    def evaluations(self) -> list[Figure | None]:
        """Draws each metric of the evaluations, except one run's losses, which are in the charts of training losses."""
        names = dict.fromkeys(name for run in self._runs for name in run.metrics.evaluation_metrics())
        families: list[Figure | None] = []
        if self._is_single:
            terms = self._runs[0].metrics.family("terms")
            for average in dict.fromkeys(name.partition("/loss/")[0] for name in names if "/loss/" in name):
                title = f"Evaluation: mean of each loss, {average}"
                families.append(self.family(title, f"eval/{average}/loss", "losses"))
                names = {name: None for name in names if not name.startswith(f"{average}/loss/")}
            names = {name: None for name in names if name not in {"loss", *(f"loss/{term}" for term in terms)}}
        return families + [self.chart(f"Evaluation: {words(name)}", f"eval/{name}") for name in names]


_TIMES = ("update_seconds", "data_seconds", "sync_seconds")
