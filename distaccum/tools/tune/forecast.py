"""Predicts the seconds per update on other numbers of ranks from measurements on these."""

from __future__ import annotations

import dataclasses
import statistics

from distaccum.config import DDPConfig, SingleConfig, TrainConfig
from distaccum.config.tools import TuneSection
from distaccum.tools.bench.network import SIZES
from distaccum.tools.bench.rounds import round_of
from distaccum.tools.tune.contenders import Contender
from distaccum.tools.tune.network_model import Link, buckets_of, fit_compute, fit_link, update_seconds
from distaccum.tools.tune.report import Forecast, LinkFit, Prediction

_STEPS = (1, 2, 4, 8)
_TURNS = 5
_SECONDS_PER_ROUND = 4.0
"""Longest round of computing; with slower updates, fewer micro-steps are measured."""


def why_not(config: TrainConfig) -> str | None:
    """Returns why nothing can be predicted for a configuration, or None."""
    if isinstance(config.strategy, DDPConfig | SingleConfig):
        return None
    return f"strategy={config.strategy.name} sends more than gradients, and the model is of strategy=ddp"


def forecast_of(
    best: Contender, config: TrainConfig, world_size: int, section: TuneSection, gradient_bytes: int
) -> Forecast:
    """Measures the computing of a rank and the link between the ranks, and predicts.

    Raises:
        PlacementFailedError: the processes of the best can't go on.
    """
    window = config.batch.global_batch_size
    assert window is not None
    turn = best.rounds[-1]
    micro_step = best.seconds / len(best.prepared["micro_batch_sizes"])
    steps = [count for count in _STEPS if count == 1 or count * micro_step < _SECONDS_PER_ROUND / 4]
    measured, samples, seconds = _in_turns(best, steps)
    compute = fit_compute(measured)
    links = [] if world_size == 1 else [_measured_link(best, world_size)]
    links += [
        LinkFit(
            latency_seconds=section.link_latency_ms / 1e3,
            bytes_per_second=mbits * 1e6 / 8,
            name=f"{mbits:g} Mbit/s" if mbits < 1000 else f"{mbits / 1000:g} Gbit/s",
        )
        for mbits in section.link_mbits
    ]
    bucket_bytes = (config.strategy.bucket_cap_mb if isinstance(config.strategy, DDPConfig) else 25.0) * 2**20
    calls = turn.sync_calls or max(1, round(0.5 + gradient_bytes / bucket_bytes))
    forecast = Forecast(
        fixed_seconds=compute.fixed_seconds,
        micro_step_seconds=compute.micro_step_seconds,
        micro_batch=samples,
        compute_measured=measured,
        sync_calls=calls,
        sync_bytes=turn.sync_bytes or gradient_bytes,
        links=links,
        predictions=[],
    )
    for ranks in sorted({*section.predict_world_sizes, world_size}):
        if ranks <= window:
            forecast.predictions += _predictions(forecast, ranks, window, section.predict_accumulation_steps)
    if world_size > 1:
        forecast.measured_seconds = seconds
        forecast.predicted_seconds = predicted_seconds(forecast, world_size, window, links[0])
    return forecast


def _in_turns(best: Contender, steps: list[int]) -> tuple[dict[int, float], float, float]:
    """Measures computing alone and training in turns, as the speed of a shared machine changes within seconds.

    Returns:
        Seconds of an update by its micro-steps, each rank for itself; samples of a micro-batch; seconds of an update.
    """
    computing: dict[int, list[float]] = {count: [] for count in steps}
    training: list[float] = []
    samples = 0.0
    for _ in range(_TURNS):
        answers = best.ask("compute", steps=steps, rounds=1)
        samples = statistics.fmean(answer["samples"] for answer in answers)
        for count in steps:
            # An update takes as long as on its slowest rank.
            computing[count].append(max(answer["seconds"][str(count)] for answer in answers))
        updates = max(2, min(20, round(1.0 / best.seconds)))
        # The training begins anew after each look at computing.
        training.append(round_of(best.ask("round", updates=updates, warmup_updates=3)).seconds)
    return {count: statistics.median(taken) for count, taken in computing.items()}, samples, statistics.median(training)


def _measured_link(best: Contender, world_size: int) -> LinkFit:
    answers = best.ask("link", sizes=list(SIZES), rounds=5)
    measured = {size: max(answer["seconds"][str(size)] for answer in answers) for size in SIZES}
    link = fit_link(measured, world_size)
    fitted = {size: link.all_reduce_seconds(size, world_size) for size in SIZES}
    return LinkFit(**dataclasses.asdict(link), name="here", measured=measured, fitted=fitted)


def _predictions(forecast: Forecast, ranks: int, window: int, steps: list[int]) -> list[Prediction]:
    own_steps = max(1, -(-window // round(ranks * forecast.micro_batch)))
    windows = {own_steps: window}
    for count in steps:
        windows.setdefault(count, round(ranks * count * forecast.micro_batch))
    return [
        Prediction(
            world_size=ranks,
            micro_steps=count,
            window=samples,
            is_own_window=samples == window,
            seconds={link.name: predicted_seconds(forecast, ranks, samples, link) for link in forecast.links}
            or {"": forecast.compute.seconds(samples / ranks / forecast.micro_batch)},
        )
        for count, samples in sorted(windows.items())
    ]


def predicted_seconds(forecast: Forecast, ranks: int, window: float, link: Link) -> float:
    """Returns the seconds of an update of a window's samples on a number of ranks.

    A rank's share that is no whole number of micro-batches counts in proportion to its samples.
    """
    steps = window / ranks / forecast.micro_batch
    own = forecast.compute.seconds(steps)
    if ranks == 1:
        return own
    buckets = buckets_of(forecast.sync_bytes, forecast.sync_calls)
    return update_seconds(own, min(1.0, steps) * forecast.micro_step_seconds, buckets, link, ranks)
