"""A study as one page that needs nothing else, and its main chart as a picture of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from distaccum.observers.formatting import duration, number
from distaccum.tools.pages.lines import Axis, Curve, Mark, line_chart
from distaccum.tools.pages.page import Figure, Section, render, standalone, subject_of
from distaccum.tools.pages.svg import short
from distaccum.tools.pages.thinning import thinned
from distaccum.tools.study.advice import round_number, what_metric
from distaccum.tools.study.curves import Spot
from distaccum.tools.study.results import Study, measured
from distaccum.tools.study.terminal import cells, heads

_POINTS = 300
_NUM_SHADES = 8
_SIZE = (400.0, 280.0)


def page_of(study: Study) -> str:
    """Returns the whole page."""
    rows, styles = _table(study)
    return render(
        "study",
        f"{subject_of(study.config)}: what batch size?",
        facts=[_facts(study)],
        study=study,
        sections=[_tradeoff(study), _learning(study)],
        heads=heads(study),
        rows=rows,
        styles=styles,
        circumstances=_circumstances(study),
    )


def picture_of(study: Study) -> str:
    """Returns the main chart as an SVG file; empty if no run reached the target."""
    return standalone(_updates_over_samples(study, (620, 400)), "study") if study.chosen else ""


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
    """The colour of a batch size: from light to dark, which is told apart without seeing colours too."""
    sizes = sorted({result.batch_size for result in study.results})
    place = sizes.index(size) / max(1, len(sizes) - 1)
    return f"q{round(place * (_NUM_SHADES - 1))}"


def _tradeoff(study: Study) -> Section | None:
    """Shows what the target takes at each batch size."""
    if not study.chosen:
        return None
    figures = [Figure(_updates_over_samples(study)), *_over_batch_size(study), *_noise(study)]
    told = (
        f"Each dot: the run of a batch size that brought {what_metric(study)} to {number(study.target or 0.0)} in "
        "fewest updates; grey: with another learning rate. Line: (S/S_min - 1)(E/E_min - 1) = 1 for S updates and E "
        "samples, fitted (McCandlish et al. 2018). The critical batch size takes twice the fewest of both."
        if study.fit is not None
        else "Two batch sizes at least have to reach the target for a curve."
    )
    return Section(heading="What the target takes", figures=figures, note=told)


def _updates_over_samples(study: Study, size: tuple[float, float] = _SIZE) -> Markup:
    curves, marks = [], []
    fitted = study.fit
    reached = [result for result in study.results if result.reached is not None]
    points = [measured(result) for result in reached]
    if fitted is not None:
        low = min(point.batch_size for point in points) / 1.5
        high = max(point.batch_size for point in points) * 1.5
        sizes = [low * (high / low) ** (index / 80) for index in range(81)]
        line = [(fitted.samples(size), fitted.updates(size)) for size in sizes]
        curves.append(Curve("fit", line, "the fitted curve"))
        # Only where the points tell of them: else they are far away.
        if fitted.high < math.inf:
            marks.append(Mark(fitted.min_updates, f"fewest {short(round(fitted.min_updates))}", is_vertical=False))
        if fitted.low > 0:
            marks.append(Mark(fitted.min_samples, f"fewest {short(float(f'{fitted.min_samples:.2g}'))}"))
    for result, point in zip(reached, points, strict=True):
        style = _shade(study, result.batch_size) if result.is_chosen else "other"
        hint = f"{result.title}: {point.updates:,.0f} updates, {point.samples:,.0f} samples"
        tag = str(result.batch_size) if result.is_chosen else ""
        curves.append(Curve(f"{style} dot", [(point.samples, point.updates)], hint, has_marks=True, tag=tag))
    each = "; ".join(curve.hint for curve in curves if "dot" in curve.style)
    return line_chart(
        f"Updates against samples to reach the target, by batch size: {each}.",
        curves,
        x=_log_axis("samples", [x for curve in curves for x, _ in curve.points]),
        y=_log_axis("Updates against samples to the target", [y for curve in curves for _, y in curve.points]),
        marks=marks,
        size=size,
    )


def _log_axis(title: str, values: list[float], ticks: Sequence[float] | None = None) -> Axis:
    """An axis on which no dot lies at an end."""
    positive = [value for value in values if value > 0]
    if not positive:
        return Axis(title=title, is_log=True)
    room = (max(positive) / min(positive)) ** 0.06
    room = max(room, 1.05)
    tick = (lambda value: f"{value:,.0f}") if ticks is not None else short
    return Axis(title=title, is_log=True, low=min(positive) / room, high=max(positive) * room, ticks=ticks, tick=tick)


def _over_batch_size(study: Study) -> list[Figure]:
    """Shows updates, samples and seconds over the batch size."""
    fitted = study.fit
    wanted: list[tuple[str, Callable[[Spot], float], Callable[[float], float] | None]] = [
        ("Updates to the target", lambda spot: spot.updates, fitted.updates if fitted else None),
        ("Samples to the target", lambda spot: spot.samples, fitted.samples if fitted else None),
        ("Seconds to the target", lambda spot: spot.seconds, None),
    ]
    sizes = [float(result.batch_size) for result in study.chosen]
    marks = []
    if fitted is not None and sizes[0] / 4 < fitted.critical_batch_size < sizes[-1] * 4:
        marks.append(Mark(fitted.critical_batch_size, f"critical {round_number(fitted.critical_batch_size)}"))
    figures = []
    for title, of_spot, of_fit in wanted:
        curves = []
        low, high = sizes[0] / 1.2, sizes[-1] * 1.2
        if of_fit is not None:
            line = [low * (high / low) ** (index / 60) for index in range(61)]
            curves.append(Curve("fit", [(size, of_fit(size)) for size in line], "the fitted curve"))
        elif len(sizes) > 1:
            measured_points = [(float(r.batch_size), of_spot(r.reached)) for r in study.chosen if r.reached]
            curves.append(Curve("fit", measured_points, "from batch size to batch size", is_dashed=True))
        for result in study.results:
            if result.reached is None:
                continue
            style = _shade(study, result.batch_size) if result.is_chosen else "other"
            value = of_spot(result.reached)
            hint = f"{result.title}: {value:,.3g}"
            curves.append(Curve(f"{style} dot", [(float(result.batch_size), value)], hint, has_marks=True))
        if not any(point[1] > 0 for curve in curves for point in curve.points):
            continue
        noise = study.noise_scale if title.startswith("Updates") else None
        # Its label must not lie on that of the critical batch size.
        is_near = noise is not None and fitted and abs(math.log(noise / fitted.critical_batch_size)) < 0.7
        more = [] if noise is None or is_near else [Mark(noise, "noise scale")]
        ticks = sizes if len(sizes) <= 5 else None
        drawn = [point for curve in curves for point in curve.points]
        chart = line_chart(
            f"{title} over the batch size: {'; '.join(curve.hint for curve in curves if 'dot' in curve.style)}.",
            curves,
            x=_log_axis("batch size", [x for x, _ in drawn] + [mark.value for mark in (*marks, *more)], ticks),
            y=_log_axis(title, [y for _, y in drawn]),
            marks=[*marks, *more],
            size=_SIZE,
        )
        figures.append(Figure(chart))
    return figures


def _noise(study: Study) -> list[Figure]:
    """The noise scale that the chosen runs measured while they learned."""
    curves = []
    for result in study.chosen:
        points = [(x, y) for x, y in result.noise_curve if math.isfinite(y) and y > 0]
        if points:
            hint = f"{result.title}: {result.noise_scale:,.0f} in its second half"
            label = str(result.batch_size)
            curves.append(Curve(_shade(study, result.batch_size), thinned(points, _POINTS), hint, label=label))
    if not curves:
        return []
    fitted = study.fit
    marks = [] if fitted is None else [Mark(fitted.critical_batch_size, "critical batch size", is_vertical=False)]
    chart = line_chart(
        f"Gradient noise scale over samples: {'; '.join(curve.hint for curve in curves)}.",
        curves,
        x=Axis(title="samples"),
        y=_log_axis(
            "Gradient noise scale", [y for curve in curves for _, y in curve.points] + [m.value for m in marks]
        ),
        marks=marks,
        size=_SIZE,
    )
    return [Figure(chart)]


def _learning(study: Study) -> Section | None:
    """Shows the curves of all runs over samples, updates and seconds."""
    runs = [result for result in study.results if result.curve]
    if not runs:
        return None
    finite = [spot.value for result in runs for spot in result.curve if math.isfinite(spot.value)]
    is_log = bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)
    marks = [] if study.target is None else [Mark(study.target, f"target {number(study.target)}", is_vertical=False)]
    figures = []
    wanted: list[tuple[str, bool, Callable[[Spot], float]]] = [
        ("samples", False, lambda spot: spot.samples),
        ("updates", True, lambda spot: spot.updates),
        ("seconds in updates", False, lambda spot: spot.seconds),
    ]
    title = what_metric(study)
    title = (title.removeprefix("the ")[:1].upper() + title.removeprefix("the ")[1:]).replace(
        "Evaluation's", "Evaluation:"
    )
    for name, is_log_x, of_spot in wanted:
        curves = []
        for result in runs:
            points = thinned([(of_spot(spot), spot.value) for spot in result.curve], _POINTS)
            best = "—" if result.best is None else number(result.best)
            hint = f"{result.title}: best {best} in {result.updates:,} updates, {duration(result.seconds)}"
            style, is_sqrt_alone = _shade(study, result.batch_size), result.rules == ["sqrt"]
            curves.append(Curve(style, points, hint, is_dashed=is_sqrt_alone, label=result.title))
        chart = line_chart(
            f"{title} over {name}: {'; '.join(curve.hint for curve in curves)}.",
            curves,
            x=Axis(title=name, is_log=is_log_x),
            y=Axis(title=title, is_log=is_log),
            marks=marks,
            size=_SIZE,
        )
        figures.append(Figure(chart))
    sizes = dict.fromkeys(result.batch_size for result in runs)
    colours = [(_shade(study, size), str(size)) for size in sizes]
    rules = study.config["study"]["lr_rules"]
    dashes = f" Dashed: the rule {rules[1]}; whole: {rules[0]}." if len(rules) == 2 else ""
    told = (
        f"Each place is a mean over {study.config['study']['smoothing']} evaluations, or as many samples.{dashes} "
        "Seconds leave evaluations out; an update counts as 20 usual ones at most, so that the start of a process does "
        "not show."
    )
    return Section(heading="How they learned", key=colours, figures=figures, note=told)


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
