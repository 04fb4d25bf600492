"""Says which batch size to use, and what that costs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from distaccum.config import flat
from distaccum.observers.formatting import duration, number, words
from distaccum.tools.study.points import scaled_settings
from distaccum.tools.study.results import DIVERGED, FAILED, LIMIT, MISSING, Result, Study

_ALIKE = 1.15
"""Two times that differ by less than this factor are called equal: there is one run of each."""
_OWN = (
    "batch.global_batch_size", "optim.lr", "run_dir", "train.epochs", "train.max_updates", "batch.drop_last"
)  # fmt: skip


def advise(study: Study, overrides: Sequence[str] = ()) -> list[str]:
    """Returns paragraphs, the most important first, and sets which run is recommended.

    Args:
        overrides: the study's command line, of which what belongs to the training is kept.
    """
    study.recommended = None
    missing = [result.title for result in study.results if result.outcome == MISSING]
    paragraphs = []
    if missing:
        paragraphs.append(
            f"Not finished: {len(missing)} of {len(study.results)} runs are still to be made ({'; '.join(missing[:4])}"
            f"{'; …' if len(missing) > 4 else ''}). What follows is of the others."
        )
    if not study.chosen or study.target is None:
        target = "any value of it" if study.target is None else number(study.target)
        return [*paragraphs, f"No run reached {target} ({what_metric(study)}), so there is nothing to conclude."]
    best = _recommended(study)
    study.recommended = best.name
    paragraphs += [_use(study, best), _seconds(study, best), _rule(study), _noise(study), _caveats(study)]
    paragraphs.append(f"Train with: {command(study, best, overrides)}")
    return [paragraph for paragraph in paragraphs if paragraph]


def what_metric(study: Study) -> str:
    """The metric in words: `the evaluation's loss`."""
    if study.metric == "train/loss":
        return "the training loss"
    return f"the evaluation's {words(study.metric.removeprefix('eval/'))}"


def _recommended(study: Study) -> Result:
    """The run whose batch size lies nearest to the critical one."""
    chosen = study.chosen
    if study.fit is None:
        return min(chosen, key=lambda result: result.reached.samples if result.reached else math.inf)
    critical = study.fit.critical_batch_size
    return min(chosen, key=lambda result: abs(math.log(result.batch_size / critical)))


def _use(study: Study, best: Result) -> str:
    spot = best.reached
    assert spot is not None
    assert study.target is not None
    took = (
        f"{spot.updates:,.0f} updates and {spot.samples:,.0f} samples to bring {what_metric(study)} to "
        f"{number(study.target)}"
    )
    if study.fit is None:
        return (
            f"{best.batch_size} is the only batch size that got there: it takes {took}. Two at least are needed to say "
            "what another would cost."
        )
    fitted = study.fit
    critical = f"about {round_number(fitted.critical_batch_size)}{_range(study)}"
    if fitted.critical_batch_size > study.chosen[-1].batch_size * 1.5:
        return (
            f"Use {best.batch_size}, or more: it takes {took}, and the critical batch size lies above all that were "
            f"tried ({critical}). So far each doubling of the batch has nearly halved the updates, at little cost in "
            "samples."
        )
    if fitted.critical_batch_size < study.chosen[0].batch_size / 1.5:
        return (
            f"Use {best.batch_size}, or less: it takes {took}, and the critical batch size lies below all that were "
            f"tried ({critical}). A larger batch saves hardly any updates and costs samples in proportion."
        )
    return (
        f"Use a batch of about {best.batch_size}. It takes {took}: {spot.updates / fitted.min_updates:.1f} times the "
        f"fewest updates that any batch could do with ({fitted.min_updates:,.0f}), and "
        f"{spot.samples / fitted.min_samples:.1f} times the fewest samples ({round_number(fitted.min_samples)}). The "
        f"critical batch size is {critical}: well below it, twice the batch halves the updates for nearly the same "
        "samples; well above it, twice the batch takes twice the samples for nearly the same updates."
    )


def _range(study: Study) -> str:
    fitted = study.fit
    assert fitted is not None
    if fitted.num_points < 3:
        return ", without a range, since two points fit any curve"
    low, high = round_number(fitted.low), round_number(fitted.high)
    if fitted.low == 0.0 and math.isinf(fitted.high):
        return ", but these points would fit any value"
    if fitted.low == 0.0:
        return f", at most {high}"
    if math.isinf(fitted.high):
        return f", at least {low}"
    return f", likely between {low} and {high}"


def round_number(value: float) -> str:
    """Returns a number with two significant digits.

    >>> round_number(1234.5), round_number(87.6), round_number(3.21)
    ('1,200', '88', '3.2')
    """
    if not math.isfinite(value) or value <= 0:
        return "∞" if value > 0 else "0"
    digits = 1 - math.floor(math.log10(value))
    rounded = round(value, digits)
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.2g}"


def _seconds(study: Study, best: Result) -> str:
    timed = [
        (result.reached.seconds, result) for result in study.chosen if result.reached and result.reached.seconds > 0
    ]
    if not timed:
        return ""
    seconds, fastest = min(timed, key=lambda entry: entry[0])
    ranks = study.config["study"]["ranks"]
    here = f"Here, with {'one process' if ranks == 1 else f'{ranks} ranks'},"
    own = next((value for value, result in timed if result is best), None)
    if fastest is best or own is None or own <= seconds * _ALIKE:
        return f"{here} it is {'the fastest' if fastest is best else 'as fast as any'} too: {duration(own or seconds)}."
    size = fastest.batch_size
    why = (
        "it takes fewer samples, and there is nothing here to spread a larger batch over; with more ranks, or a device "
        "that it does not fill, the larger one gains"
        if size < best.batch_size
        else "an update of a larger batch takes hardly more time here, so fewer updates count for more than samples do"
    )
    return f"{here} {size} was faster: {duration(seconds)} against {duration(own)}; {why}."


def _rule(study: Study) -> str:
    """Says which rule for the learning rate did better, where there was more than one."""
    base = study.config["batch"]["global_batch_size"]
    wins: dict[str, list[str]] = {}
    for size in dict.fromkeys(result.batch_size for result in study.results):
        rivals = [result for result in study.results if result.batch_size == size and result.reached is not None]
        started = [result for result in study.results if result.batch_size == size and result.outcome != MISSING]
        if size == base or len(started) < 2 or not rivals:
            continue
        rivals.sort(key=lambda result: result.reached.updates if result.reached else math.inf)
        if len(rivals) > 1 and rivals[0].reached and rivals[1].reached:
            ratio = rivals[1].reached.updates / rivals[0].reached.updates
            how = f"{1 - 1 / ratio:.0%} fewer updates" if ratio > _ALIKE else "about the same"
        else:
            how = "the only one to get there"
        wins.setdefault(rivals[0].rules[0], []).append(f"{size} ({how})")
    if not wins:
        return ""
    shown = "; ".join(f"{rule} at {', '.join(sizes)}" for rule, sizes in wins.items())
    return f"The better rule for the learning rate, from {study.config['optim']['lr']:g} at {base}: {shown}."


def _noise(study: Study) -> str:
    if study.noise_scale is None or study.fit is None:
        return ""
    ratio = study.noise_scale / study.fit.critical_batch_size
    near = f"{ratio:.1f} times the critical batch size" if ratio >= 0.1 else f"{ratio:.2g} of the critical batch size"
    agrees = "which is as near as can be expected" if 1 / 4 <= ratio <= 4 else "which does not agree"
    return (
        f"The gradient noise scale measured in these runs is about {round_number(study.noise_scale)} samples, {near}, "
        f"{agrees}: it is meant to predict it from a single run, to within a small factor (McCandlish et al. 2018)."
    )


def _caveats(study: Study) -> str:
    """Says how far the result can be relied on."""
    texts = []
    if study.is_target_chosen:
        texts.append(
            "The target is the hardest one that every batch size reached; for a harder one, the critical batch size is "
            "usually larger."
        )
    for outcome, said in ((LIMIT, "did not get there"), (DIVERGED, "diverged"), (FAILED, "failed")):
        found = [result.title for result in study.results if result.outcome == outcome]
        if found:
            texts.append(f"{len(found)} {said}: {'; '.join(found)}.")
    if study.fit is not None:
        texts.append(
            f"One run of each, one seed; the points lie within about {study.fit.relative_error:.0%} of the curve."
            if study.fit.num_points > 2
            else "One run of each, one seed."
        )
    return " ".join(texts)


def command(study: Study, result: Result, overrides: Sequence[str]) -> str:
    """Returns the command that trains as a run did, with all that followed from its batch size."""
    configured = flat(study.config)
    scaled = scaled_settings(configured, result.batch_size)
    followed = {key: value for key, value in scaled.items() if value != configured.get(key)}
    kept = [entry for entry in overrides if not _is_own(entry) and entry.partition("=")[0] not in followed]
    is_plain = study.config["schedule"].get("name") == "constant"
    if is_plain and not any(entry.startswith(("schedule=", "experiment=")) for entry in kept):
        kept.append("schedule=constant")  # what a study has by default, and a training has not
    kept += [f"{key}={value:.6g}" if key == "train.ema.decay" else f"{key}={value}" for key, value in followed.items()]
    own = f"{shlex.join(kept)} " if kept else ""
    ranks = study.config["study"]["ranks"]
    launcher = f"torchrun --nproc_per_node={ranks}" if ranks > 1 else "python"
    return f"{launcher} -m distaccum.train {own}batch.global_batch_size={result.batch_size} optim.lr={result.lr:.4g}"


def _is_own(override: str) -> bool:
    key = override.partition("=")[0].lstrip("+~")
    return key in _OWN or key.startswith("study.")
