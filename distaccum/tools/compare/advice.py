"""Says which placement to use, and why, from what was measured alone."""

from __future__ import annotations

from distaccum.config.tools import PlacementName
from distaccum.errors import joined
from distaccum.observers.formatting import byte_size, rate
from distaccum.tools.bench.rounds import milliseconds
from distaccum.tools.compare.results import CompareReport, CompareRow, by_axis, is_within_noise

_CLEARLY_LESS_MEMORY = 0.9
"""A peak is called smaller when it is below this part of the other."""
_AS_INEXACT_AS = 10.0
"""Without float64, a placement passes if its error is at most so many times one shot's own."""


def advise(report: CompareReport) -> list[str]:
    """Returns paragraphs: what to use, why, and what the others are good for."""
    measured = report.measured
    if not measured:
        return ["Nothing could be measured: the table says why for each placement."]
    tolerance = float(report.config["compare"]["tolerance"])
    exact = [row for row in measured if not row.is_lossy and is_exact(row, measured, tolerance)]
    paragraphs = []
    if not exact:
        paragraphs.append(_nothing_exact(report, tolerance))
        exact = [row for row in measured if not row.is_lossy] or measured
    chosen, rivals = choose(exact)
    paragraphs.append(_choice(chosen, rivals, tolerance))
    paragraphs.append(_speed(chosen, measured))
    others = (
        _inexact(measured, tolerance),
        _no_sync(measured),
        _compression(chosen, measured),
        _memory(chosen, exact),
        _flavours(exact),
        _left_out(report),
    )
    return [*paragraphs, *(paragraph for paragraph in others if paragraph)]


def is_exact(row: CompareRow, rows: list[CompareRow], tolerance: float) -> bool:
    """Returns whether a row's update is that of the large batch; True too where nothing was compared."""
    if row.error_float64 is not None:
        return row.error_float64 <= tolerance
    if row.error is None:
        return all(other.error is None for other in rows)
    floor = min(other.error for other in rows if other.error is not None)
    return row.error <= _AS_INEXACT_AS * floor


def choose(rows: list[CompareRow]) -> tuple[CompareRow, list[CompareRow]]:
    """Returns the row to use, and those whose speed does not differ from its speed beyond the noise.

    The fastest; but among those within the noise of the fastest, the one with clearly less memory, then with fewer
    processes, then the one that is simplest (the order of the table).
    """
    fastest = min(rows, key=lambda row: row.seconds)
    equals = [row for row in rows if row is fastest or is_within_noise(row, fastest)]
    least = min(row.peak_memory for row in equals)
    light = [row for row in equals if _CLEARLY_LESS_MEMORY * row.peak_memory <= least]
    chosen = min(light, key=lambda row: (row.num_processes, rows.index(row)))
    return chosen, [row for row in equals if row is not chosen]


def _choice(chosen: CompareRow, rivals: list[CompareRow], tolerance: float) -> str:
    if chosen.placement == PlacementName.one_shot.value:
        exactness = "it is the large batch itself, which fits"
    elif chosen.error_float64 is not None and chosen.error_float64 <= tolerance:
        exactness = f"its update is the large batch's (error {chosen.error_float64:.1e} in float64)"
    elif chosen.error is not None:
        exactness = f"its update differs from the large batch's by {chosen.error:.1e}"
    else:
        exactness = "its exactness could not be measured"
    text = f"Use {chosen.title}: {exactness}, and no exact placement was faster"
    if rivals:
        names = joined([row.title for row in rivals])
        text += (
            f" beyond the noise. {names} {'are' if len(rivals) > 1 else 'is'} as fast within the spread of the rounds; "
            "among equals the choice is by memory, then by simplicity"
        )
    return f"{text}. Train with: {chosen.command}"


def _speed(chosen: CompareRow, rows: list[CompareRow]) -> str:
    text = f"It takes {milliseconds(chosen.seconds)} an update, {rate(chosen.samples_per_second)} samples/s"
    single = [
        row for row in rows if row.placement == PlacementName.single.value and row is not chosen and not row.is_uniform
    ]
    if single and chosen.speedup is not None:
        best = min(single, key=lambda row: row.seconds)
        if is_within_noise(chosen, best):
            text += f", which is within the noise of {best.title}"
        else:
            text += f": {best.seconds / chosen.seconds:.2f} times as fast as {best.title}"
    if chosen.num_processes > 1:
        text += f". {chosen.sync_share:.0%} of its time goes into the sync"
    return f"{text}."


def _inexact(rows: list[CompareRow], tolerance: float) -> str | None:
    """Names placements that should be exact and are not, unless none is."""
    wrong = [row for row in rows if not row.is_lossy and not is_exact(row, rows, tolerance)]
    if not wrong or len(wrong) == sum(not row.is_lossy for row in rows):
        return None
    named = [
        row.title if row.error_float64 is None else f"{row.title} ({row.error_float64:.1e} in float64)" for row in wrong
    ]
    return (
        f"Not the large batch's update: {joined(named)}. A layer or a loss that mixes samples, or randomness such as "
        "dropout, depends on how a window is cut; `python -m distaccum.check` with the same overrides finds out which."
    )


def _no_sync(rows: list[CompareRow]) -> str | None:
    """Says what syncing in every micro-step costs."""
    pairs = [
        (every, once)
        for every in rows
        for once in rows
        if every.placement == PlacementName.ddp_sync_every_step.value
        and once.placement == PlacementName.ddp.value
        and (every.world_size, every.accumulation_steps) == (once.world_size, once.accumulation_steps)
        and every.accumulation_steps > 1
    ]
    if not pairs:
        return None
    every, once = max(pairs, key=lambda pair: (pair[0].accumulation_steps, pair[0].world_size))
    cost = (
        "which takes the same time here, within the noise"
        if is_within_noise(every, once)
        else f"and takes {every.seconds / once.seconds:.2f} times as long"
    )
    return (
        f"Syncing in every micro-step sends {byte_size(every.sync_bytes or 0)} in {every.sync_calls} collectives where "
        f"no_sync sends {byte_size(once.sync_bytes or 0)} in {once.sync_calls} ({every.world_size} ranks × "
        f"{every.accumulation_steps}), {cost}. On a slower network than this machine's the difference grows."
    )


def _compression(chosen: CompareRow, rows: list[CompareRow]) -> str | None:
    lossy = [row for row in rows if row.is_lossy]
    if not lossy:
        return None
    best = min(lossy, key=lambda row: row.seconds)
    time = milliseconds(best.seconds)
    error = "" if best.error is None else f", and its update is off by {best.error:.1e}"
    if best.seconds < chosen.seconds and not is_within_noise(best, chosen):
        return (
            f"Compression would be faster: {best.title} takes {time} an update{error}. Whether that is worth "
            "the error, these times don't say."
        )
    return f"Compression saves no time here: the fastest, {best.title}, takes {time} an update{error}."


def _memory(chosen: CompareRow, rows: list[CompareRow]) -> str:
    least = min(rows, key=lambda row: row.peak_memory)
    text = f"Its peak memory per process is {byte_size(chosen.peak_memory)} ({chosen.memory_kind})"
    if least.peak_memory < _CLEARLY_LESS_MEMORY * chosen.peak_memory:
        return (
            f"{text}. If that is too much: {least.title} needs {byte_size(least.peak_memory)}, at "
            f"{milliseconds(least.seconds)} an update."
        )
    if least is not chosen:
        return f"{text}; no exact placement needs clearly less."
    most = max(rows, key=lambda row: row.peak_memory)
    return f"{text}, the least of all; the most is {byte_size(most.peak_memory)} ({most.title})."


_FLAVOURS = (PlacementName.fsdp.value, PlacementName.fsdp_sharded.value, PlacementName.fsdp_node.value)


def _flavours(rows: list[CompareRow]) -> str | None:
    """Says where FSDP should accumulate gradients: here, where memory is short, and over a slow link."""
    groups: dict[tuple[int, int], dict[str, CompareRow]] = {}
    for row in rows:
        if row.placement in _FLAVOURS:
            groups.setdefault((row.accumulation_steps, row.world_size), {})[row.placement] = row
    numbers = max((key for key, group in groups.items() if len(group) > 1), default=None)
    if numbers is None:
        return None
    steps, ranks = numbers
    found = [groups[numbers][name] for name in _FLAVOURS if name in groups[numbers]]
    best, _ = choose(found)
    text = (
        f"Of FSDP's ways to accumulate ({ranks} ranks × {steps}), take {_name(best)} here: it takes "
        f"{milliseconds(best.seconds)} an update at a peak of {byte_size(best.peak_memory)}, and none is faster beyond "
        "the noise. Where memory is short, "
    )
    least = min(found, key=lambda row: row.peak_memory)
    if least.peak_memory < _CLEARLY_LESS_MEMORY * best.peak_memory:
        text += f"{_name(least)} needs {byte_size(least.peak_memory)}, at {milliseconds(least.seconds)} an update."
    else:
        text += "no other helps: none has a clearly lower peak with this model."
    node = groups[numbers].get(PlacementName.fsdp_node.value)
    if node is None:
        return text
    *_, (calls, sent) = by_axis(node)
    others = " and ".join(
        f"{byte_size(row.sync_bytes or 0)} in {row.sync_calls} under {_name(row)}" for row in found if row is not node
    )
    return (
        f"{text} On several nodes with a slow link, take {_name(node)} (strategy.shard_size: ranks of a node): "
        f"{byte_size(sent)} of gradients in {calls} collective{'s' if calls > 1 else ''} an update cross it then, "
        f"whatever the micro-steps, and no parameters. Else {others} may cross it, and all gathered parameters."
    )


def _name(row: CompareRow) -> str:
    return row.title.partition(" · ")[0]


def _nothing_exact(report: CompareReport, tolerance: float) -> str:
    if report.reference.problem is not None:
        return f"Exactness could not be measured: there is no float64 reference ({report.reference.problem})."
    errors = [row.error_float64 for row in report.measured if row.error_float64 is not None and not row.is_lossy]
    found = f"from {min(errors):.1e} to {max(errors):.1e}" if errors else "unknown"
    return (
        f"No placement gives the large batch's update to {tolerance:g} in float64: errors are {found}. Then the model "
        "or the loss itself depends on how a window is cut: dropout, BatchNorm, or a loss that couples samples; "
        "or the optimizer amplifies rounding, as L-BFGS does from iteration to iteration. "
        "`python -m distaccum.check` with the same overrides finds out which."
    )


def _left_out(report: CompareReport) -> str | None:
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in report.rows:
        if row.reason is not None:
            reasons.setdefault(row.reason.rstrip("."), {}).setdefault(row.placement, []).append(row.title)
    if not reasons:
        return None
    return "Not measured: " + "; ".join(f"{_briefly(titles)} ({reason})" for reason, titles in reasons.items()) + "."


def _briefly(titles: dict[str, list[str]]) -> str:
    """Names rows; several rows of one placement together, by their number."""
    return joined(
        [
            rows[0] if len(rows) == 1 else f"{rows[0].partition(' · ')[0]} in {len(rows)} rows"
            for rows in titles.values()
        ]
    )
