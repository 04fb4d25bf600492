"""Sentences of a page: what a run was, how it went, and what stands out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from distaccum.errors import joined
from distaccum.observers.formatting import byte_size, duration, number, rate, words
from distaccum.observers.metrics_reading import number_or_nan
from distaccum.observers.run_file import Outcome
from distaccum.tools.pages.page import TIME_PARTS
from distaccum.tools.report.runs import Run, is_better_low

_MUCH_DATA = 0.1
_MUCH_SYNC = 0.2
_WORSE = 1.05
"""The factor by which the evaluation's loss has risen since its best, from which it is mentioned."""
_SLOWER = 0.8
_GROWN = 1.1
_FEWEST = 20
"""Updates that it takes to say how a run develops."""


def facts(run: Run) -> str:
    """Returns what the run was, in one line."""
    ranks = (run.record.plan if run.record else "").partition(" = ")[2].partition(" × ")[0]
    optimizer = str(run.configured("optim._target_") or "").rpartition(".")[2]
    parts = [
        "" if math.isnan(run.window) else f"window of {run.window:,.0f} samples",
        ranks if "rank" in ranks else "",
        optimizer,
        str(run.configured("precision.name") or ""),
        str(run.configured("strategy.name") or ""),
        f"seed {run.configured('seed')}" if run.config else "",
    ]
    return " · ".join(part for part in parts if part)


def how_it_went(run: Run) -> str:
    """Returns one paragraph on a run."""
    sentences = [_extent(run), _loss(run), _evaluation(run), _speed(run)]
    return " ".join(sentence for sentence in sentences if sentence)


def _extent(run: Run) -> str:
    epochs = int(number_or_nan(run.last.get("epoch"))) + 1 if "epoch" in run.last else None
    amount = f"{run.num_updates:,} update{'s' * (run.num_updates > 1)}"
    if not math.isnan(run.samples):
        amount += f", {run.samples:,.0f} samples"
    if epochs is not None:
        amount += f", {epochs} epoch{'s' * (epochs > 1)}"
    if run.outcome is None:
        state = f"{amount}; it is not known how it ended"
    elif run.is_finished or run.has_failed:
        state = f"{run.outcome} after {amount}"
    elif run.outcome is Outcome.stopped:
        state = f"{run.state} after {amount}; started again, it goes on"
    else:
        state = f"not finished, or still going on: {amount} so far"
    if run.resumed_after:
        times = len(run.resumed_after)
        state += f" (went on {'once' if times == 1 else f'{times} times'} from a checkpoint)"
    return f"{run.subject}, {state}."


def _loss(run: Run) -> str:
    losses = run.metrics.finite("loss")
    if not losses:
        return "No update has a finite loss."
    few = max(1, min(20, len(losses) // 20))
    first, last = statistics.fmean(losses[:few]), statistics.fmean(losses[-few:])
    if last == first:
        return f"The training loss was {number(last)}."
    return f"The training loss {'fell' if last < first else 'rose'} from {number(first)} to {number(last)}."


def _evaluation(run: Run) -> str:
    if not run.metrics.evaluations:
        return "There was no evaluation."
    texts = []
    for name in run.metrics.evaluation_metrics():
        points = run.metrics.evaluated(name)
        best = run.best(name)
        text = f"{words(name)} {number(points[-1][1])}"
        if best is not None and best[0] != points[-1][0]:
            text += f" (best {number(best[1])} after update {best[0]:,})"
        texts.append(text)
    return f"The last evaluation, after update {int(run.metrics.evaluations[-1]['update']):,}: {', '.join(texts)}."


def _speed(run: Run) -> str:
    texts = []
    if not math.isnan(run.samples_per_second):
        texts.append(f"{rate(run.samples_per_second)} samples/s")
    if not math.isnan(run.train_seconds):
        texts.append(f"{duration(run.train_seconds)} in updates")
    if run.shares is not None:
        shown = [f"{share:.0%} {TIME_PARTS[part]}" for part, share in run.shares.items() if share >= 0.005]
        texts.append(", ".join(shown))
    if run.peak_memory is not None:
        texts.append(f"at most {byte_size(run.peak_memory)} of memory on rank 0")
    return f"It made {'; '.join(texts)}." if texts else ""


def what_to_look_at(run: Run) -> list[str]:
    """Returns a sentence for whatever is out of the ordinary, most important first; empty if nothing is."""
    texts = [
        _failure(run),
        _nonfinite(run),
        _skipped(run),
        _overfitting(run),
        _noise(run),
        _clipping(run),
        *_waits(run),
        _slowing(run),
        _growing_memory(run),
        _still_falling(run),
        *(f"{problem}." for problem in run.problems),
    ]
    return [text for text in texts if text]


def _failure(run: Run) -> str:
    reason = (run.record and run.record.reason) or "the log of the rank that failed says which."
    return f"It ended with an error: {reason}" if run.has_failed else ""


def _nonfinite(run: Run) -> str:
    skipped = set(run.skipped)
    bad = [int(u) for u, v in run.metrics.values("loss") if not math.isfinite(v) and int(u) not in skipped]
    return f"The loss was not finite in {_listed(bad)}." if bad else ""


def _skipped(run: Run) -> str:
    if not run.skipped:
        return ""
    share = len(run.skipped) / len(run.metrics.updates)
    verb = "was" if len(run.skipped) == 1 else "were"
    return f"{_listed(run.skipped).capitalize()} {verb} skipped ({share:.1%}): loss or gradient was not finite."


def _overfitting(run: Run) -> str:
    best, evaluated = run.best("loss"), run.metrics.evaluated("loss")
    if best is None or len(evaluated) < 3 or not evaluated[-1][1] > best[1] * _WORSE or best[1] <= 0:
        return ""
    after = [v for u, v in run.metrics.values("loss") if u > best[0] and math.isfinite(v)]
    if len(after) < 4 or statistics.fmean(after[len(after) // 2 :]) >= statistics.fmean(after[: len(after) // 2]):
        return ""
    return (
        f"Over-fitting: the evaluation's loss was lowest after update {best[0]:,} ({number(best[1])}) and has risen by "
        f"{evaluated[-1][1] / best[1] - 1:.0%} since, while the training loss went on falling. checkpoint.keep_best "
        "keeps the best one; train.early_stopping.metric=loss ends the run there."
    )


def _noise(run: Run) -> str:
    scale = run.metrics.values("noise_scale")
    late = [v for _, v in scale[-max(1, len(scale) // 4) :] if math.isfinite(v) and v > 0]
    if not late or math.isnan(run.window):
        return ""
    scale_at_end = statistics.median(late)
    ratio = scale_at_end / run.window
    if ratio > 2:
        meaning = "a larger one would still pay: twice the batch makes nearly twice the progress per update"
    elif ratio < 0.5:
        meaning = "a smaller one would learn nearly as much per update from fewer samples"
    else:
        meaning = "it is about where time and samples are in balance"
    return (
        f"The gradient noise scale was about {scale_at_end:,.0f} samples in the last quarter of its measurements, and "
        f"the window has {run.window:,.0f}: {meaning}."
    )


def _clipping(run: Run) -> str:
    limit = number_or_nan(run.configured("train.clip_norm"))
    norms = run.metrics.finite("grad_norm")
    if math.isnan(limit) or len(norms) < _FEWEST:
        return ""
    share = sum(norm > limit for norm in norms) / len(norms)
    if share <= 0.5:
        return ""
    return (
        f"{share:.0%} of the updates were clipped: train.clip_norm={limit:g} is below the usual gradient norm "
        f"({number(statistics.median(norms))}), so that it sets the step as much as the learning rate does."
    )


def _waits(run: Run) -> list[str]:
    shares = run.shares or {"data": 0.0, "sync": 0.0}
    texts = []
    if shares["data"] >= _MUCH_DATA:
        texts.append(f"{shares['data']:.0%} of the time went into waiting for data: data.num_workers=auto may help.")
    if shares["sync"] >= _MUCH_SYNC:
        texts.append(
            f"{shares['sync']:.0%} of the time went into the sync, or into waiting for slower ranks there: a larger "
            "window, strategy.compression or batch.balance=speed may help."
        )
    return texts


def _slowing(run: Run) -> str:
    rates = run.metrics.finite("samples_per_second")
    quarter = len(rates) // 4
    if quarter < _FEWEST // 4:
        return ""
    early, late = statistics.median(rates[:quarter]), statistics.median(rates[-quarter:])
    if late >= early * _SLOWER:
        return ""
    return f"It became slower: {rate(early)} samples/s in the first quarter, {rate(late)} in the last."


def _growing_memory(run: Run) -> str:
    points = run.metrics.values("peak_memory_bytes")
    settled = [v for u, v in points if math.isfinite(v) and u >= min(100, run.num_updates / 4)]
    if len(settled) < 3 or settled[-1] < settled[0] * _GROWN:
        return ""
    return (
        f"The peak of memory went on growing after the start, from {byte_size(int(settled[0]))} to "
        f"{byte_size(int(settled[-1]))}: something may be kept that should not be."
    )


def _still_falling(run: Run) -> str:
    losses = [v for _, v in run.metrics.evaluated("loss") if math.isfinite(v)]
    if not run.is_finished or len(losses) < 5:
        return ""
    before, last = losses[-1 - len(losses) // 4], losses[-1]
    if last <= 0 or last > before * 0.9 or last > min(losses):
        return ""
    return (
        f"The evaluation's loss was still falling at the end, by {1 - last / before:.0%} over the last quarter: a "
        "longer training would go further."
    )


def _listed(updates: Sequence[int]) -> str:
    """`update 3`, `updates 3, 7 and 9`, `12 updates (3, 7, 9, …)`"""
    if len(updates) == 1:
        return f"update {updates[0]:,}"
    if len(updates) <= 5:
        return f"updates {joined([f'{u:,}' for u in updates])}"
    return f"{len(updates):,} updates ({', '.join(f'{u:,}' for u in updates[:3])}, …)"


def comparison(runs: Sequence[Run]) -> str:
    """Returns one paragraph on several runs."""
    texts = [f"{len(runs)} runs."]
    metrics = [set(run.metrics.evaluation_metrics()) for run in runs]
    shared = sorted(set.intersection(*metrics), key=lambda name: name != "loss")
    for name in shared[:2]:
        bests = [(best, run) for run in runs if (best := run.best(name)) is not None]
        if len(bests) < 2:
            continue
        sign = 1 if is_better_low(name) else -1
        bests.sort(key=lambda entry: sign * entry[0][1])
        (first, winner), (_, loser) = bests[0], bests[-1]
        texts.append(
            f"The best {words(name)} of an evaluation: {number(first[1])} by {winner.name} after update {first[0]:,}; "
            f"the worst of the runs' bests is {number(bests[-1][0][1])} by {loser.name}."
        )
    rates = [(run.samples_per_second, run.name) for run in runs if not math.isnan(run.samples_per_second)]
    if len(rates) > 1:
        (slow, slow_name), (fast, fast_name) = min(rates), max(rates)
        if fast > slow * 1.1:
            texts.append(f"Fastest is {fast_name} with {rate(fast)} samples/s, slowest {slow_name} with {rate(slow)}.")
    unfinished = [run.name for run in runs if run.outcome is not None and not run.is_finished]
    if unfinished:
        texts.append(f"Not finished: {', '.join(unfinished)}.")
    return " ".join(texts)
