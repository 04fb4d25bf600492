"""Draws a study as one page that needs nothing else, and its main chart as a picture of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from distaccum.observers.formatting import duration, number
from distaccum.tools.pages.lines import Axis, Curve, Mark, line_chart
from distaccum.tools.pages.page import Figure, Section, render, standalone, subject_of
from distaccum.tools.pages.svg import short
from distaccum.tools.pages.thinning import thinned
from distaccum.tools.study.advice import round_number, what_metric
from distaccum.tools.study.curves import Spot
from distaccum.tools.study.fit import between
from distaccum.tools.study.results import Result, Study, measured
from distaccum.tools.study.terminal import cells, heads

_POINTS = 300
_STEPS = 81
_NUM_SHADES = 8
_SIZE = (400.0, 280.0)


def page_of(study: Study) -> str:
    """Returns the whole page."""
    rows, styles = _table(study)
    return render(
        "pages/results.html",
        "study",
        f"{subject_of(study.config)}: what batch size?",
        facts=[_facts(study)],
        has_hover=True,
        found=study,
        advice_heading="What batch size to use, and what it costs",
        sections=[_tradeoff(study), _learning(study)],
        pair=[],
        table_heading="All runs",
        heads=heads(study),
        rows=rows,
        styles=styles,
        circumstances=_circumstances(study),
    )


def picture_of(study: Study) -> str:
    """Returns the main chart as an SVG file; empty if no run reached the target."""
    return standalone(_updates_over_samples(study, (620, 400)).chart, "study") if study.chosen else ""


def _facts(study: Study) -> str:
    ranks = study.config["study"]["ranks"]
    sizes = list(dict.fromkeys(result.batch_size for result in study.results))
    facts = [
        f"batch sizes {', '.join(map(str, sizes))}",
        f"{len(study.results)} runs",
        f"{ranks} rank{'s' * (ranks > 1)} each",
        study.machine,
        study.date.replace("T", " ")[:16],
    ]
    return " · ".join(facts)


def _shade(study: Study, size: int) -> str:
    """Returns the colour of a batch size: from light to dark, which differ for those who see no colours too."""
    sizes = sorted({result.batch_size for result in study.results})
    place = sizes.index(size) / max(1, len(sizes) - 1)
    return f"q{round(place * (_NUM_SHADES - 1))}"


def _tradeoff(study: Study) -> Section | None:
    """Shows what the target takes at each batch size."""
    if not study.chosen:
        return None
    figures = [_updates_over_samples(study), *_over_batch_size(study), *_noise(study)]
    note = (
        f"Each dot: the run of a batch size that brought {what_metric(study)} to {number(study.target or 0.0)} in "
        "fewest updates; grey: with another learning rate. Line: (S/S_min - 1)(E/E_min - 1) = 1 for S updates and E "
        "samples, fitted (McCandlish et al. 2018). The critical batch size takes twice the fewest of both."
        if study.fit is not None
        else "Two batch sizes at least have to reach the target for a curve."
    )
    return Section(heading="What the target takes", figures=figures, note=note)


def _drawn(
    title: str, curves: Sequence[Curve], x: Axis, y: Axis, marks: Sequence[Mark], size: tuple[float, float] = _SIZE
) -> Figure:
    each = "; ".join(curve.hint for curve in curves if curve.style != "fit")
    return Figure(line_chart(f"{title}: {each}.", curves, x=x, y=y, marks=marks, size=size))


def _dot(study: Study, result: Result, x: float, y: float, hint: str, tag: str = "") -> Curve:
    style = _shade(study, result.batch_size) if result.is_chosen else "other"
    return Curve(f"{style} dot", [(x, y)], f"{result.title}: {hint}", has_marks=True, tag=tag)


def _log_axis(title: str, values: Sequence[float], ticks: Sequence[float] | None = None) -> Axis:
    """Returns an axis at whose ends no dot lies."""
    positive = [value for value in values if value > 0]
    if not positive:
        return Axis(title=title, is_log=True)
    room = max((max(positive) / min(positive)) ** 0.06, 1.05)
    tick = "{:,.0f}".format if ticks is not None else short
    return Axis(title=title, is_log=True, low=min(positive) / room, high=max(positive) * room, ticks=ticks, tick=tick)


def _coordinates(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    points = [point for curve in curves for point in curve.points]
    return [x for x, _ in points], [y for _, y in points]


def _updates_over_samples(study: Study, size: tuple[float, float] = _SIZE) -> Figure:
    curves, marks = [], []
    fitted = study.fit
    reached = [(result, measured(result)) for result in study.results if result.reached is not None]
    if fitted is not None:
        tried = [point.batch_size for _, point in reached]
        sizes = between(min(tried) / 1.5, max(tried) * 1.5, _STEPS)
        curves.append(Curve("fit", [(fitted.samples(b), fitted.updates(b)) for b in sizes], "the fitted curve"))
        # A limit that the points do not show lies far outside the chart.
        if fitted.high < math.inf:
            marks.append(Mark(fitted.min_updates, f"fewest {short(round(fitted.min_updates))}", is_vertical=False))
        if fitted.low > 0:
            marks.append(Mark(fitted.min_samples, f"fewest {short(float(f'{fitted.min_samples:.2g}'))}"))
    for result, point in reached:
        hint = f"{point.updates:,.0f} updates, {point.samples:,.0f} samples"
        tag = str(result.batch_size) if result.is_chosen else ""
        curves.append(_dot(study, result, point.samples, point.updates, hint, tag))
    xs, ys = _coordinates(curves)
    x, y = _log_axis("samples", xs), _log_axis("Updates against samples to the target", ys)
    return _drawn("Updates against samples to reach the target, by batch size", curves, x, y, marks, size)


def _over_batch_size(study: Study) -> list[Figure]:
    """Shows updates, samples and seconds over the batch size."""
    fitted, noise = study.fit, study.noise_scale
    sizes = [float(result.batch_size) for result in study.chosen]
    marks = []
    if fitted is not None and sizes[0] / 4 < fitted.critical_batch_size < sizes[-1] * 4:
        marks.append(Mark(fitted.critical_batch_size, f"critical {round_number(fitted.critical_batch_size)}"))
    # Its label must not lie on that of the critical batch size.
    is_near = noise is not None and fitted and abs(math.log(noise / fitted.critical_batch_size)) < 0.7
    more = [] if noise is None or is_near else [Mark(noise, "noise scale")]
    figures = [
        _over_size(study, "Updates", lambda spot: spot.updates, fitted.updates if fitted else None, [*marks, *more]),
        _over_size(study, "Samples", lambda spot: spot.samples, fitted.samples if fitted else None, marks),
        _over_size(study, "Seconds", lambda spot: spot.seconds, None, marks),
    ]
    return [figure for figure in figures if figure is not None]


def _over_size(
    study: Study,
    name: str,
    of_spot: Callable[[Spot], float],
    of_fit: Callable[[float], float] | None,
    marks: Sequence[Mark],
) -> Figure | None:
    """Shows one cost of the target over the batch size; None if it is not known."""
    sizes = [float(result.batch_size) for result in study.chosen]
    curves = []
    if of_fit is not None:
        line = [(size, of_fit(size)) for size in between(sizes[0] / 1.2, sizes[-1] * 1.2, _STEPS)]
        curves.append(Curve("fit", line, "the fitted curve"))
    elif len(sizes) > 1:
        line = [(float(result.batch_size), of_spot(result.reached)) for result in study.chosen if result.reached]
        curves.append(Curve("fit", line, "from batch size to batch size", is_dashed=True))
    for result in study.results:
        if result.reached is not None:
            value = of_spot(result.reached)
            curves.append(_dot(study, result, float(result.batch_size), value, f"{value:,.3g}"))
    xs, ys = _coordinates(curves)
    if max(ys) <= 0:
        return None
    x = _log_axis("batch size", [*xs, *(mark.value for mark in marks)], sizes if len(sizes) <= 5 else None)
    title = f"{name} to the target"
    return _drawn(f"{title} over the batch size", curves, x, _log_axis(title, ys), marks)


def _noise(study: Study) -> list[Figure]:
    """Shows the noise scale that the chosen runs measured while they learned."""
    curves = []
    for result in study.chosen:
        if result.noise_curve:
            hint = f"{result.title}: {result.noise_scale:,.0f} in its second half"
            points = thinned(result.noise_curve, _POINTS)
            curves.append(Curve(_shade(study, result.batch_size), points, hint, label=str(result.batch_size)))
    if not curves:
        return []
    critical = [] if study.fit is None else [study.fit.critical_batch_size]
    marks = [Mark(value, "critical batch size", is_vertical=False) for value in critical]
    y = _log_axis("Gradient noise scale", [*_coordinates(curves)[1], *critical])
    return [_drawn("Gradient noise scale over samples", curves, Axis(title="samples"), y, marks)]


def _learning(study: Study) -> Section | None:
    """Shows the curves of all runs over samples, updates and seconds."""
    runs = [result for result in study.results if result.curve]
    if not runs:
        return None
    section = study.config["study"]
    rules = section["lr_rules"]
    dashed = [rules[1]] if len(rules) == 2 else None
    finite = [spot.value for result in runs for spot in result.curve if math.isfinite(spot.value)]
    title = what_metric(study).removeprefix("the ").replace("evaluation's", "evaluation:")
    title = title[:1].upper() + title[1:]
    y = Axis(title=title, is_log=bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite))
    marks = [] if study.target is None else [Mark(study.target, f"target {number(study.target)}", is_vertical=False)]
    figures = []
    wanted: list[tuple[Axis, Callable[[Spot], float]]] = [
        (Axis(title="samples"), lambda spot: spot.samples),
        (Axis(title="updates", is_log=True), lambda spot: spot.updates),
        (Axis(title="seconds in updates"), lambda spot: spot.seconds),
    ]
    for x, of_spot in wanted:
        curves = []
        for result in runs:
            points = thinned([(of_spot(spot), spot.value) for spot in result.curve], _POINTS)
            best = "—" if result.best is None else number(result.best)
            hint = f"{result.title}: best {best} in {result.updates:,} updates, {duration(result.seconds)}"
            style, is_dashed = _shade(study, result.batch_size), result.rules == dashed
            curves.append(Curve(style, points, hint, is_dashed=is_dashed, label=result.title))
        figures.append(_drawn(f"{title} over {x.title}", curves, x, y, marks))
    sizes = dict.fromkeys(result.batch_size for result in runs)
    note = (
        f"Each place is a mean over {section['smoothing']} evaluations, or as many samples."
        f"{f' Dashed: the rule {rules[1]}; whole: {rules[0]}.' if dashed else ''} Seconds leave evaluations out; an "
        "update counts as 20 usual ones at most, so that the start of a process does not show."
    )
    colours = [(_shade(study, size), str(size)) for size in sizes]
    return Section(heading="How they learned", key=colours, figures=figures, note=note)


def _table(study: Study) -> tuple[list[list[str]], list[str]]:
    """Returns the rows, and a CSS class for each or none."""
    rows, styles = [], []
    for result in study.results:
        rows.append(cells(result))
        styles.append("recommended" if result.name == study.recommended else "" if result.is_chosen else "failed")
        if result.reason:
            rows.append(["", result.reason])
            styles.append("")
    return rows, styles


def _circumstances(study: Study) -> list[tuple[str, str]]:
    fitted = study.fit
    facts = [
        *study.facts,
        ("runs", f"at most {study.max_samples:,} samples each, of {study.num_samples:,} training samples; one seed"),
        (
            "kept alike",
            "full windows only (drop_last); warm-up, schedule and evaluations at the same samples for each batch",
        ),
    ]
    if fitted is not None:
        said = (
            f"S_min {fitted.min_updates:,.1f} updates, E_min {fitted.min_samples:,.0f} samples, critical batch size "
            f"{fitted.critical_batch_size:,.0f} ({_limit(fitted.low)} to {_limit(fitted.high)}), {fitted.num_points} "
            "points, Huber's loss of the logarithms of updates"
        )
        facts.append(("fit", said))
    return facts


def _limit(value: float) -> str:
    return "no limit" if value == 0 or not math.isfinite(value) else round_number(value)
