"""Draws the comparison as one page that needs nothing else: its charts and its style are in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from distaccum.config.tools import PlacementName
from distaccum.observers.formatting import byte_size, rate
from distaccum.tools.bench.rounds import milliseconds
from distaccum.tools.compare.placements import PLACEMENTS
from distaccum.tools.compare.results import CompareReport, CompareRow, by_axis
from distaccum.tools.compare.terminal import TWO_AXES, cells, heads
from distaccum.tools.pages.lines import Axis, Curve, line_chart
from distaccum.tools.pages.page import TIME_PARTS, Section, render, subject_of
from distaccum.tools.pages.rows import Cell, Dot, Panel, Segment, row_chart
from distaccum.tools.pages.svg import nice_ticks


def page_of(report: CompareReport) -> str:
    """Returns the whole page."""
    subject = subject_of(report.config)
    return render(
        "pages/results.html",
        "compare",
        f"{subject}: placements compared",
        heading=subject,
        facts=[_facts(report)],
        found=report,
        advice_heading="Which placement to use here",
        sections=[_times(report), _errors(report)] if report.measured else [],
        pair=[_scaling(report), _curves(report)] if report.measured else [],
        table_heading="All numbers",
        heads=["placement", *heads(str(report.config["precision"]["name"]))],
        rows=_rows(report),
        styles=(),
        circumstances=_circumstances(report),
    )


def _facts(report: CompareReport) -> str:
    config = report.config
    facts = [
        f"window of {config['batch']['global_batch_size']} samples",
        f"{report.reference.parameters:,} parameters" if report.reference.parameters else "",
        f"{str(config['optim'].get('_target_', '')).rpartition('.')[2]}, {config['precision']['name']}",
        report.machine,
        report.date.replace("T", " ")[:16],
    ]
    return " · ".join(fact for fact in facts if fact)


def _drawn(name: str, report: CompareReport, reasons: Sequence[str | None], panels: Sequence[Panel]) -> Markup:
    parted = [row.title.partition(" · ") for row in report.rows]
    return row_chart(name, [(title, numbers) for title, _, numbers in parted], reasons, panels)


def _cells(report: CompareReport, draw: Callable[[CompareRow], Cell]) -> list[Cell]:
    return [draw(row) if row.is_measured else Cell() for row in report.rows]


def _times(report: CompareReport) -> Section:
    kind = next((row.memory_kind.removeprefix("of ") for row in report.rows if row.memory_kind), "")
    panels = [
        Panel(title="Time per update, ms", share=0.62, label_width=150, cells=_cells(report, _time)),
        Panel(
            title=f"Peak memory of a process ({kind})",
            share=0.38,
            label_width=72,
            is_bytes=True,
            cells=_cells(report, _memory),
        ),
    ]
    colours = TIME_PARTS | {"before": "Python and torch, before the model", "training": "the training"}
    note = (
        f"Medians of {report.config['compare']['rounds']} rounds, in which the placements took turns; the whisker "
        "spans the middle half of the rounds. × is the speed-up over accumulation in one process with as many steps."
    )
    chart = _drawn("Time per update and peak memory", report, [row.reason for row in report.rows], panels)
    return Section(heading="Time and memory", key=list(colours.items()), wide=chart, note=note)


def _time(row: CompareRow) -> Cell:
    segments = []
    for part, share in (("data", row.data_share), ("compute", row.compute_share), ("sync", row.sync_share)):
        seconds = row.seconds * share
        hint = f"{row.title}: {TIME_PARTS[part]} {milliseconds(seconds)} ({share:.0%})"
        segments.append(Segment(seconds * 1e3, part, hint))
    return Cell(
        bar=segments,
        whisker=(row.low_seconds * 1e3, row.high_seconds * 1e3),
        label=milliseconds(row.seconds) + ("" if row.speedup is None else f"  {row.speedup:.2f}×"),
    )


def _memory(row: CompareRow) -> Cell:
    before = min(max(row.memory_before), row.peak_memory)
    each = ", ".join(byte_size(value) for value in row.memory)
    hint = f"{row.title}: {each}; before the model {byte_size(before)}"
    segments = [Segment(before, "before", hint), Segment(row.peak_memory - before, "training", hint)]
    return Cell(bar=segments, label=byte_size(row.peak_memory))


def _errors(report: CompareReport) -> Section:
    precision = str(report.config["precision"]["name"])
    tolerance = float(report.config["compare"]["tolerance"])
    panels = [
        Panel(
            title="Error of the update, relative",
            share=0.62,
            label_width=30,
            is_log=True,
            cells=_cells(report, lambda row: _error(row, precision)),
            limit=(tolerance, "exact to the left"),
        ),
        Panel(
            title="Gradients sent per update and rank",
            share=0.38,
            label_width=118,
            is_bytes=True,
            cells=_cells(report, _traffic),
        ),
    ]
    colours = [("dot64", "computed in float64"), ("dot", f"computed in {precision}")]
    note = _what_the_error_is(report)
    if any(row.sync_by_axis for row in report.measured):
        note += f" {TWO_AXES}"
    missing = [None if row.is_measured else "not measured" for row in report.rows]
    chart = _drawn("Error of the update and traffic", report, missing, panels)
    return Section(heading="Exactness and traffic", key=colours, wide=chart, note=note)


def _error(row: CompareRow, precision: str) -> Cell:
    dots = []
    if row.error is not None:
        dots.append(Dot(row.error, "dot", f"{row.title}, {precision}: {row.error:.2e}", 5.2))
    if row.error_float64 is not None:
        dots.append(Dot(row.error_float64, "dot64", f"{row.title}, float64: {row.error_float64:.2e}", 3.4))
    return Cell(dots=dots)


def _traffic(row: CompareRow) -> Cell:
    sent = row.sync_bytes or 0
    label = f"{byte_size(sent)} in {row.sync_calls}" if row.sync_calls else "nothing"
    hint = f"{row.title}: {row.sync_calls} collectives"
    if row.sync_by_axis:
        inside, between = (f"{calls} with {byte_size(size)}" for calls, size in by_axis(row))
        hint += f", {inside} in a node and {between} between nodes"
    return Cell(bar=[Segment(sent, "sent", hint)], label=label)


def _what_the_error_is(report: CompareReport) -> str:
    if report.reference.problem is not None:
        return f"There is no float64 reference, so there are no errors: {report.reference.problem}."
    steps = report.reference.accumulation_steps
    how = "in one shot" if steps == 1 else f"in {steps} micro-steps, because one shot did not fit into memory"
    return (
        f"‖difference‖ / ‖value‖ of the change of all parameters together over the first "
        f"{report.config['compare']['exact_updates']} updates, against a float64 run of the same windows {how}."
    )


def _scaling(report: CompareReport) -> Section | None:
    """Shows samples per second over the number of ranks, with the steps that were fastest for each placement."""
    best: dict[str, dict[int, CompareRow]] = {}
    for row in report.measured:
        of_placement = best.setdefault(row.placement, {})
        other = of_placement.get(row.world_size)
        if other is None or row.samples_per_second > other.samples_per_second:
            of_placement[row.world_size] = row
    sizes = sorted({size for of_placement in best.values() for size in of_placement})
    single = best.pop(PlacementName.single.value, {}).get(1)
    best.pop(PlacementName.one_shot.value, None)
    if len(sizes) < 2 or not best:
        return None
    curves = []
    if single is not None:
        ideal = [(float(size), single.samples_per_second * size) for size in sizes]
        curves.append(Curve("c-ideal", ideal, "as many times as fast as there are ranks", is_dashed=True, name="ideal"))
    for name, of_placement in best.items():
        rows = [of_placement[size] for size in sorted(of_placement)]
        rows = [single, *rows] if single is not None and rows[0].world_size > 1 else rows
        points = [(float(row.world_size), row.samples_per_second) for row in rows]
        hint = "; ".join(f"{row.title}: {rate(row.samples_per_second)} samples/s" for row in rows)
        title = PLACEMENTS[PlacementName[name]].title
        curves.append(Curve(f"c-{name}", points, hint, has_marks=True, name=title))
    chart = line_chart(
        "Samples per second over the number of ranks",
        curves,
        x=Axis(title="ranks (replicas under DP)", is_log=True, ticks=[float(size) for size in sizes]),
        y=Axis(title="Samples per second", low=0.0),
    )
    has_choice = len(report.config["compare"]["accumulation_steps"]) > 1
    note = "Each placement with the accumulation steps that were fastest." if has_choice else ""
    return Section(heading="Scaling", wide=chart, note=note)


def _curves(report: CompareReport) -> Section | None:
    rows = [row for row in report.measured if row.loss_curve and all(map(math.isfinite, row.loss_curve))]
    if not rows:
        return None
    groups = coinciding(rows)
    curves = []
    for group in sorted(groups, key=len, reverse=True):
        row = group[0]
        names = ", ".join(member.title for member in group)
        name = row.title.partition(" · ")[0] if len(group) == 1 else f"{len(group)} coincide"
        points = [(float(number), loss) for number, loss in enumerate(row.loss_curve, 1)]
        style = "c-many" if len(group) > 1 else f"c-{row.placement}"
        curves.append(Curve(style, points, names, name=name))
    length = max(len(row.loss_curve) for row in rows)
    chart = line_chart(
        "Loss over the updates",
        curves,
        x=Axis(title="update", ticks=[1.0, *(tick for tick in nice_ticks(length, 6) if tick > 1)]),
        y=Axis(title="Training loss", low=0.0),
    )
    together = max(groups, key=len)
    note = ""
    if len(together) > 1:
        names = "; ".join(dict.fromkeys(row.title.partition(" · ")[0] for row in together))
        note = f"The same windows, the same curve: {names} do not differ here."
    return Section(heading="Loss", wide=chart, note=note)


def coinciding(rows: Sequence[CompareRow]) -> list[list[CompareRow]]:
    """Groups rows whose loss curves look the same: they are closer than a two-hundredth of the range."""
    losses = [loss for row in rows for loss in row.loss_curve]
    near = (max(losses) - min(losses)) / 200
    groups: list[list[CompareRow]] = []
    for row in rows:
        for group in groups:
            pairs = zip(group[0].loss_curve, row.loss_curve, strict=False)
            if all(abs(one - other) <= near for one, other in pairs):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _rows(report: CompareReport) -> list[list[str]]:
    rows = []
    for row in report.rows:
        rows.append([row.title, *(cells(row) or [row.reason or ""])])
        rows += [["", note] for note in row.notes]
    return rows


def _circumstances(report: CompareReport) -> list[tuple[str, str]]:
    compare = report.config["compare"]
    threads = compare["threads_per_rank"]
    timed = (
        f"{compare['rounds']} rounds × {compare['updates']} updates of full windows, after "
        f"{compare['warmup_updates']} to warm up; each rank in a process of its own with {threads} CPU "
        f"thread{'s' if threads > 1 else ''}; the slowest rank counts"
    )
    return [*report.facts, ("took", f"{report.seconds:.0f} s"), ("timed", timed)]
