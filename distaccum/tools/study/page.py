"""A study as one page that needs nothing else, and its main chart as a picture of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from distaccum.observers.formatting import duration, number
from distaccum.tools.pages import (
    Axis,
    Curve,
    Mark,
    definitions,
    escaped,
    key,
    line_chart,
    section,
    short,
    standalone,
    subject_of,
    thinned,
    whole_page,
)
from distaccum.tools.study.advice import round_number, what_metric
from distaccum.tools.study.curves import Spot
from distaccum.tools.study.results import Result, Study, measured
from distaccum.tools.study.terminal import cells, heads

_STYLE = Path(__file__).with_name("page.css")
_POINTS = 300
_NUM_SHADES = 8


def page_of(study: Study) -> str:
    """The whole page."""
    subject = subject_of(study.config)
    sections = [
        _header(study, subject),
        _verdict(study),
        _tradeoff(study),
        _learning(study),
        _table(study),
        _circumstances(study),
    ]
    return whole_page(f"{subject}: what batch size?", sections, _STYLE.read_text(encoding="utf-8"), has_hover=True)


def picture_of(study: Study) -> str:
    """The main chart as an SVG file; empty if no run reached the target."""
    if not study.chosen:
        return ""
    return standalone(_updates_over_samples(study, 620, 400), _STYLE.read_text(encoding="utf-8"))


def _header(study: Study, subject: str) -> str:
    section_of = study.config["study"]
    sizes = list(dict.fromkeys(result.batch_size for result in study.results))
    facts = [
        f"batch sizes {', '.join(map(str, sizes))}",
        f"{len(study.results)} runs",
        f"{section_of['ranks']} rank{'s' * (section_of['ranks'] > 1)} each",
        study.machine,
        study.date.replace("T", " ")[:16],
    ]
    return (
        f"<header><h1>{escaped(subject)}: what batch size?</h1>"
        f'<p class="facts">{escaped(" · ".join(facts))}</p></header>'
    )


def _verdict(study: Study) -> str:
    content = []
    for index, paragraph in enumerate(study.advice):
        said, has_command, command = paragraph.partition("Train with: ")
        if said.strip():
            content.append(f"<p{' class=lead' if index == 0 else ''}>{escaped(said)}</p>")
        if has_command:
            content.append(f"<pre><code>{escaped(command)}</code></pre>")
    return section("What batch size to use, and what it costs", *content, style="verdict")


def _shade(study: Study, size: int) -> str:
    """The colour of a batch size: from light to dark, which is told apart without seeing colours too."""
    sizes = sorted({result.batch_size for result in study.results})
    place = sizes.index(size) / max(1, len(sizes) - 1)
    return f"q{round(place * (_NUM_SHADES - 1))}"


def _tradeoff(study: Study) -> str:
    """What the target takes at each batch size."""
    if not study.chosen:
        return ""
    figures = [f"<figure>{_updates_over_samples(study)}</figure>", *_over_batch_size(study)]
    note = (
        f"Each dot: the run of a batch size that brought {what_metric(study)} to {number(study.target or 0.0)} in "
        "fewest updates; grey: with another learning rate. Line: (S/S_min - 1)(E/E_min - 1) = 1 for S updates and E "
        "samples, fitted (McCandlish et al. 2018). The critical batch size takes twice the fewest of both."
        if study.fit is not None
        else "Two batch sizes at least have to reach the target for a curve."
    )
    return section("What the target takes", f'<div class="charts">{"".join(figures)}</div>', _note(note))


def _note(text: str) -> str:
    return f'<p class="note">{escaped(text)}</p>'


def _updates_over_samples(study: Study, width: float = 400, height: float = 280) -> str:
    curves, marks = [], []
    fitted = study.fit
    reached = [result for result in study.results if result.reached is not None]
    points = [measured(result) for result in reached]
    if fitted is not None:
        low = min(point.batch_size for point in points) / 1.5
        high = max(point.batch_size for point in points) * 1.5
        sizes = [low * (high / low) ** (index / 80) for index in range(81)]
        line = [(fitted.samples(size), fitted.updates(size)) for size in sizes]
        curves.append(Curve("", "fit", line, "the fitted curve"))
        # Only where the points tell of them: else they are far away.
        if fitted.high < math.inf:
            marks.append(Mark(fitted.min_updates, f"fewest {short(round(fitted.min_updates))}", is_vertical=False))
        if fitted.low > 0:
            marks.append(Mark(fitted.min_samples, f"fewest {short(float(f'{fitted.min_samples:.2g}'))}"))
    for result, point in zip(reached, points, strict=True):
        style = _shade(study, result.batch_size) if result.is_chosen else "other"
        hint = f"{result.title}: {point.updates:,.0f} updates, {point.samples:,.0f} samples"
        tag = str(result.batch_size) if result.is_chosen else ""
        curves.append(Curve("", f"{style} dot", [(point.samples, point.updates)], hint, has_marks=True, tag=tag))
    each = "; ".join(curve.hint for curve in curves if "dot" in curve.style)
    return line_chart(
        f"Updates against samples to reach the target, by batch size: {each}.",
        curves,
        x=_log_axis("samples", [x for curve in curves for x, _ in curve.points]),
        y=_log_axis("Updates against samples to the target", [y for curve in curves for _, y in curve.points]),
        marks=marks,
        width=width,
        height=height,
        has_names=False,
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


def _over_batch_size(study: Study) -> list[str]:
    """Updates, samples and seconds over the batch size."""
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
            curves.append(Curve("", "fit", [(size, of_fit(size)) for size in line], "the fitted curve"))
        elif len(sizes) > 1:
            measured_points = [(float(r.batch_size), of_spot(r.reached)) for r in study.chosen if r.reached]
            curves.append(Curve("", "fit", measured_points, "from batch size to batch size", is_dashed=True))
        for result in study.results:
            if result.reached is None:
                continue
            style = _shade(study, result.batch_size) if result.is_chosen else "other"
            value = of_spot(result.reached)
            hint = f"{result.title}: {value:,.3g}"
            curves.append(Curve("", f"{style} dot", [(float(result.batch_size), value)], hint, has_marks=True))
        if not any(point[1] > 0 for curve in curves for point in curve.points):
            continue
        noise = study.noise_scale if title.startswith("Updates") else None
        more = [Mark(noise, "noise scale")] if noise is not None and not marks_overlap(noise, fitted) else []
        ticks = sizes if len(sizes) <= 5 else None
        drawn = [point for curve in curves for point in curve.points]
        chart = line_chart(
            f"{title} over the batch size: {'; '.join(curve.hint for curve in curves if 'dot' in curve.style)}.",
            curves,
            x=_log_axis("batch size", [x for x, _ in drawn] + [mark.value for mark in (*marks, *more)], ticks),
            y=_log_axis(title, [y for _, y in drawn]),
            marks=[*marks, *more],
            width=400,
            height=280,
            has_names=False,
        )
        figures.append(f"<figure>{chart}</figure>")
    return [*figures, *_noise(study)]


def _noise(study: Study) -> list[str]:
    """The noise scale that the chosen runs measured while they learned."""
    curves = []
    for result in study.chosen:
        points = [(x, y) for x, y in result.noise_curve if math.isfinite(y) and y > 0]
        if points:
            hint = f"{result.title}: {result.noise_scale:,.0f} in its second half"
            label = str(result.batch_size)
            curves.append(Curve("", _shade(study, result.batch_size), thinned(points, _POINTS), hint, label=label))
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
        width=400,
        height=280,
        has_names=False,
    )
    return [f"<figure>{chart}</figure>"]


def marks_overlap(noise: float, fitted: object) -> bool:
    """Whether the label of the noise scale would lie on that of the critical batch size."""
    critical = getattr(fitted, "critical_batch_size", None)
    return critical is not None and abs(math.log(noise / critical)) < 0.7


def _learning(study: Study) -> str:
    """The curves of all runs over samples, updates and seconds."""
    runs = [result for result in study.results if result.curve]
    if not runs:
        return ""
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
            curves.append(
                Curve(
                    "", _shade(study, result.batch_size), points, hint, is_dashed=_is_second(result), label=result.title
                )
            )
        chart = line_chart(
            f"{title} over {name}: {'; '.join(curve.hint for curve in curves)}.",
            curves,
            x=Axis(title=name, is_log=is_log_x),
            y=Axis(title=title, is_log=is_log),
            marks=marks,
            width=400,
            height=280,
            has_names=False,
        )
        figures.append(f"<figure>{chart}</figure>")
    sizes = list(dict.fromkeys(result.batch_size for result in runs))
    colours = key([(_shade(study, size), str(size)) for size in sizes])
    rules = study.config["study"]["lr_rules"]
    dashes = f" Dashed: the rule {rules[1]}; whole: {rules[0]}." if len(rules) == 2 else ""
    note = _note(
        f"Each place is a mean over {study.config['study']['smoothing']} evaluations, or as many samples.{dashes} "
        "Seconds leave evaluations out; an update counts as 20 usual ones at most, so that the start of a process does "
        "not show."
    )
    return section("How they learned", colours, f'<div class="charts">{"".join(figures)}</div>', note)


def _is_second(result: Result) -> bool:
    return result.rules[0] == "sqrt" and len(result.rules) == 1


def _table(study: Study) -> str:
    names = heads(study)
    body = []
    for result in study.results:
        style = (
            " class=recommended" if result.name == study.recommended else "" if result.is_chosen else " class=failed"
        )
        first, *rest = cells(result)
        row = "".join(f"<td>{escaped(cell)}</td>" for cell in rest)
        body.append(f'<tr{style}><th scope="row">{escaped(first)}</th>{row}</tr>')
        if result.reason:
            reason = f'<td></td><td colspan="{len(names) - 1}" class="reason">{escaped(result.reason)}</td>'
            body.append(f"<tr class=failed>{reason}</tr>")
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in names)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return section("All runs", f'<div class="scroll">{table}</div>')


def _circumstances(study: Study) -> str:
    fitted = study.fit
    facts: list[tuple[str, str]] = [
        ("command", study.command),
        ("date", study.date),
        ("machine", study.machine),
        ("versions", ", ".join(f"{name} {version}" for name, version in study.versions.items())),
        ("runs", f"at most {study.max_samples:,} samples each, of {study.num_samples:,} training samples; one seed"),
        (
            "kept alike",
            "full windows only (drop_last); warm-up, schedule and evaluations at the same samples for each batch",
        ),
    ]
    if fitted is not None:
        facts.append(
            (
                "fit",
                f"S_min {fitted.min_updates:,.1f} updates, E_min {fitted.min_samples:,.0f} samples, critical batch "
                f"size {fitted.critical_batch_size:,.0f} ({_limit(fitted.low)} to {_limit(fitted.high)}), "
                f"{fitted.num_points} points, Huber's loss of the logarithms of updates",
            )
        )
    text = yaml.safe_dump(study.config, sort_keys=False, allow_unicode=True)
    details = f"<details><summary>The configuration</summary><pre><code>{escaped(text)}</code></pre></details>"
    return section("How this came about", definitions(facts), details)


def _limit(value: float) -> str:
    return "no limit" if value == 0 or not math.isfinite(value) else round_number(value)
