"""The typed configuration of the tools beside training: `compare`, `check`, `memory`, `study` and `tune`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from distaccum.config import BatchConfig, TrainConfig
from distaccum.config.enums import BatchSchedule, Compression, Goal, LrRule
from distaccum.errors import require, require_at_least, require_positive

PlacementName = StrEnum(
    "PlacementName",
    "one_shot single dp ddp_sync_every_step ddp ddp_bf16 ddp_fp16 ddp_powersgd zero1 fsdp fsdp_gathered fsdp_sharded "
    "fsdp_node",
)
"""The placements that `python -m distaccum.compare` can compare."""


def _require_distinct(tool: str, section: Any, *keys: str) -> None:
    """Refuses empty lists, and takes out what a list holds twice."""
    for key in keys:
        if (values := getattr(section, key)) is not None:
            require(len(values) > 0, f"{tool}.{key} is empty: give at least one.")
            setattr(section, key, list(dict.fromkeys(values)))


def _require_each_positive(key: str, values: Iterable[int]) -> None:
    shown = list(values)
    require(all(value >= 1 for value in shown), f"{key}={shown} is impossible: each must be at least 1.")


def _require_size(tool: str, batch: BatchConfig) -> None:
    require(
        batch.global_batch_size is not None,
        f"{tool} needs the size of a window, and batch.global_batch_size is null: give a number.",
    )


def _require_constant_size(tool: str, batch: BatchConfig) -> None:
    require(
        batch.schedule is BatchSchedule.constant,
        f"{tool} measures windows of one size, and batch.schedule={batch.schedule.name} changes it: set "
        "batch.schedule=constant and leave out its other keys.",
    )


def _require_given_micro_batch(tool: str, batch: BatchConfig) -> None:
    require(
        not batch.is_auto,
        f"{tool} needs a given size of micro-batches, and batch.micro_batch_size=auto is found only where a training "
        "starts: give a number, as in batch.micro_batch_size=4.",
    )


@dataclass(kw_only=True, slots=True)
class CompareSection:
    """Settings of `python -m distaccum.compare`: what it runs, and how long it measures."""

    placements: list[PlacementName] | None = None
    """Which placements, of `one_shot`, `single`, `dp`, `ddp_sync_every_step`, `ddp`, `ddp_bf16`, `ddp_fp16`,
    `ddp_powersgd`, `zero1`, `fsdp`, `fsdp_gathered` (`strategy.reshard_in_window=false`), `fsdp_sharded` and
    `fsdp_node` (`strategy.accumulate`). `null`: all of them."""
    world_sizes: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of ranks, or of replicas under DP. Placements of one process run if 1 is among them."""
    accumulation_steps: list[int] = field(default_factory=lambda: [4])
    """Micro-steps per window and rank, each of which is a row of its own for each placement and world size."""
    updates: int = 8
    """Timed updates per round. Only windows of the full size are timed."""
    warmup_updates: int = 2
    """Updates before the timed ones of each round."""
    rounds: int = 5
    """Rounds, in each of which every placement is timed once."""
    curve_updates: int = 30
    """Updates of the loss curve, from the start of the training, at most as many as the training has."""
    exact_updates: int = 3
    """Updates after which the parameters are compared with those of the float64 one-shot run."""
    tolerance: float = 1e-12
    """Largest error, in float64, of a placement that the report calls exact."""
    threads_per_rank: int = 1
    """CPU threads of each rank."""
    keep_alive: bool | None = None
    """Keep the processes of a placement while the others take their turn, instead of starting them anew in each round.
    `null`: on a CPU, as long as they take up little memory."""
    timeout_seconds: float = 300.0
    """Seconds without a sign of life after which a placement is stopped; its row then says so."""

    def __post_init__(self) -> None:
        _require_distinct("compare", self, "world_sizes", "accumulation_steps", "placements")
        _require_each_positive("compare.world_sizes", self.world_sizes)
        _require_each_positive("compare.accumulation_steps", self.accumulation_steps)
        require_at_least(1, compare__updates=self.updates, compare__rounds=self.rounds)
        require_at_least(0, compare__warmup_updates=self.warmup_updates)
        require_at_least(1, compare__curve_updates=self.curve_updates, compare__exact_updates=self.exact_updates)
        require_at_least(1, compare__threads_per_rank=self.threads_per_rank)
        require_positive(compare__timeout_seconds=self.timeout_seconds, compare__tolerance=self.tolerance)


@dataclass(kw_only=True, slots=True)
class CompareConfig(TrainConfig):
    """A training and the placements under which to compare it."""

    compare: CompareSection = field(default_factory=CompareSection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _require_size("compare", self.batch)
        _require_constant_size("compare", self.batch)
        require(
            getattr(self.batch, "max_tokens", None) is None,
            "compare sets how much a micro-batch may hold by compare.accumulation_steps, so batch.max_tokens would be "
            "overruled: leave it out.",
        )


@dataclass(kw_only=True, slots=True)
class CheckSection:
    """Settings of `python -m distaccum.check`: what it measures, and how far equal results may differ."""

    windows: int = 2
    """Windows to measure: the first ones of an epoch, and as the last of them the epoch's last window, ragged or
    not."""
    samples: int | None = 32
    """Samples of each window that are measured, so that they fit into one micro-batch. `null`: all of them."""
    tolerance_fp64: float = 1e-10
    """In float64: largest ‖difference‖ / ‖gradient‖ of any one parameter."""
    tolerance: float | None = None
    """In the configured precision: largest ‖difference‖ / ‖gradient‖ over all parameters together. `null`: 1e-4, or
    what float16 (1e-2) and bfloat16 (5e-2) can hold."""
    worst: int = 5
    """Parameters to show, those that differ most first."""
    json: bool = False
    """Print one JSON object and nothing else. `--json` is short for `check.json=true`."""

    def __post_init__(self) -> None:
        require_at_least(1, check__windows=self.windows, check__samples=self.samples, check__worst=self.worst)
        require_positive(check__tolerance_fp64=self.tolerance_fp64, check__tolerance=self.tolerance)


@dataclass(kw_only=True, slots=True)
class CheckConfig(TrainConfig):
    """A training, and how to prove that its updates don't depend on the cut."""

    check: CheckSection = field(default_factory=CheckSection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(not self.compile, "check examines the model as it is, without compile=true: leave it out.")
        _require_given_micro_batch("check", self.batch)


@dataclass(kw_only=True, slots=True)
class MemorySection:
    """Settings of `python -m distaccum.memory`: what it measures, in one process, and the memory to compare it with."""

    world_size: int | None = None
    """Ranks to measure `ddp` and `fsdp` for; the host needs no device for them. `null`: one per GPU, at least 2."""
    limit_gb: float | None = None
    """Memory that one rank may use, in GiB. `null`: all of the device's."""
    headroom: float = 0.1
    """Fraction of the limit to leave free, for fragmentation and, on a GPU, for CUDA itself."""
    alternatives: bool = True
    """Measure other settings too. `false`: the configured one only."""
    json: bool = False
    """Print one JSON object and nothing else. `--json` is short for `memory.json=true`."""

    def __post_init__(self) -> None:
        require_at_least(1, memory__world_size=self.world_size)
        require_positive(memory__limit_gb=self.limit_gb)
        require(self.limit_gb != math.inf, f"memory.limit_gb={self.limit_gb} is impossible: it must be finite.")
        require(0 <= self.headroom < 1, f"memory.headroom={self.headroom} is impossible: it must lie in [0, 1).")


@dataclass(kw_only=True, slots=True)
class MemoryConfig(TrainConfig):
    """A training, and how to measure and predict its memory."""

    memory: MemorySection = field(default_factory=MemorySection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _require_constant_size("memory", self.batch)
        _require_given_micro_batch("memory", self.batch)
        require(
            not self.compile, "memory measures the model as it is, and compile=true has another peak: leave it out."
        )


@dataclass(kw_only=True, slots=True)
class StudySection:
    """Settings of `python -m distaccum.study`: what it trains, and when its runs end."""

    batch_sizes: list[int] | None = None
    """Global batch sizes to try. `null`: 1/16, 1/4, 1 and 4 times `batch.global_batch_size`, up to the size of the
    training data."""
    lr_rules: list[LrRule] = field(default_factory=lambda: [LrRule.linear, LrRule.sqrt])
    """How the learning rate follows the batch size, from `optim.lr` at `batch.global_batch_size`: `linear`, `sqrt` or
    `none` (it stays). Each is tried at each batch size; the one that reached the target in fewest updates counts."""
    metric: str | None = None
    """The metric of the target: `train/loss`, or an evaluation's (`eval/loss`, `eval/accuracy`). `null`: `eval/loss` if
    there is an evaluation, else `train/loss`."""
    goal: Goal | None = None
    """`min` or `max`: whether less or more of the metric is better. `null`: `min` for a loss, `max` for all others."""
    target: float | None = None
    """The value to reach; a run stops when it has reached it. `null`: all runs go on to `study.max_samples`, and the
    target is chosen afterwards so that at least one run of each batch size has reached it."""
    max_samples: int | None = None
    """Samples after which a run ends in any case. `null`: those of the configured training."""
    evaluations: int = 60
    """Evaluations of a run that goes on to `study.max_samples`, evenly spaced in samples."""
    smoothing: int = 3
    """Evaluations that are averaged; for `train/loss`, the samples between so many of them."""
    noise_scale: bool | None = None
    """Measure the gradient noise scale in the runs, for comparison with the critical batch size. `null`: wherever
    `insight.noise_scale` is supported."""
    ranks: int = 1
    """Ranks of each run."""
    threads_per_rank: int = 1
    """CPU threads of each rank."""
    point: int | None = None
    """Run only the point of this number (from 0), as a job of an array does. `null`: all unfinished points in turn."""

    def __post_init__(self) -> None:
        _require_distinct("study", self, "batch_sizes", "lr_rules")
        _require_each_positive("study.batch_sizes", self.batch_sizes or [])
        require(
            self.metric is None or self.metric == "train/loss" or self.metric.startswith("eval/"),
            f"study.metric={self.metric} is unknown: it must be train/loss, or eval/ and a metric of the evaluation.",
        )
        require_at_least(1, study__max_samples=self.max_samples, study__ranks=self.ranks)
        require_at_least(1, study__threads_per_rank=self.threads_per_rank, study__smoothing=self.smoothing)
        require_at_least(2, study__evaluations=self.evaluations)
        require_at_least(0, study__point=self.point)


@dataclass(kw_only=True, slots=True)
class StudyConfig(TrainConfig):
    """A training, and how to find its best batch size."""

    study: StudySection = field(default_factory=StudySection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _require_size("study", self.batch)
        _require_constant_size("study", self.batch)
        _require_given_micro_batch("study", self.batch)
        require(
            self.batch.accumulation_steps is None,
            f"study tries several batch sizes, and with batch.accumulation_steps={self.batch.accumulation_steps} the "
            "micro-batch would grow with them: give batch.micro_batch_size instead.",
        )
        require(
            self.train.early_stopping.metric is None,
            f"study runs until its target or study.max_samples, and train.early_stopping.metric="
            f"{self.train.early_stopping.metric} would end its runs before: leave it out.",
        )
        if self.study.metric is None:
            self.study.metric = "eval/loss" if self.data.evaluation is not None else "train/loss"
        require(
            self.data.evaluation is not None or not self.study.metric.startswith("eval/"),
            f"study.metric={self.study.metric} needs evaluations, and data.evaluation is null: set study.metric="
            "train/loss, or data.evaluation.",
        )


@dataclass(kw_only=True, slots=True)
class TuneSection:
    """Settings of `python -m distaccum.tune`: what it tries, how long it takes, and what it predicts."""

    world_size: int | None = None
    """Ranks to tune for, on this machine. `null`: one per GPU; 1 without any."""
    minutes: float = 5.0
    """Minutes in which candidates are started, counted from when the configuration as it is has been timed; candidates
    left over are named. The last candidate, the confirmation and the forecast take time of their own."""
    rounds: int = 3
    """Turns in which a candidate and the best so far are timed."""
    confirm_rounds: int = 5
    """Turns in which the suggestion and the configuration as it is are timed at the end."""
    round_seconds: float = 1.0
    """Approximate length of a turn."""
    min_gain: float = 0.03
    """A candidate becomes the best if its median time is shorter by more than this fraction, and its time is shorter in
    all turns of the middle half."""
    memory_gb: float | None = None
    """Most memory of a process, in GiB: on a GPU what is allocated, on a CPU the resident set, Python and torch
    included. `null`: what the device has."""
    compressions: list[Compression] = field(default_factory=list)
    """Gradient compressions to measure (`bf16`, `fp16`, `powersgd`) with `strategy=ddp`. Their updates are not exact,
    so they are reported and not suggested."""
    accept_inexact: bool = False
    """Suggest a compression too, if it is the fastest."""
    write: str | None = None
    """File to write the suggestion to, for `experiment=`: `conf/experiment/tuned.yaml` in a checkout, or
    `DIR/experiment/NAME.yaml` for `--config-dir DIR`."""
    predict_world_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Ranks to predict the seconds per update for."""
    predict_accumulation_steps: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Micro-steps to predict the seconds per update for, besides those of the configured window."""
    link_mbits: list[float] = field(default_factory=lambda: [1000.0, 10000.0])
    """Bandwidths in Mbit/s of each rank's link to predict for, besides the measured one between this machine's
    ranks."""
    link_latency_ms: float = 0.1
    """Latency of those links in milliseconds: of one step of a ring all-reduce."""
    threads_per_rank: int | None = None
    """CPU threads of each rank. `null`: 1 with several ranks, as under torchrun; all cores in a single process."""
    timeout_seconds: float = 300.0
    """Seconds without a sign of life after which a candidate is stopped."""

    def __post_init__(self) -> None:
        require_at_least(1, tune__world_size=self.world_size, tune__rounds=self.rounds)
        require_at_least(1, tune__confirm_rounds=self.confirm_rounds, tune__threads_per_rank=self.threads_per_rank)
        require_at_least(0, tune__min_gain=self.min_gain, tune__link_latency_ms=self.link_latency_ms)
        require_positive(
            tune__minutes=self.minutes,
            tune__round_seconds=self.round_seconds,
            tune__memory_gb=self.memory_gb,
            tune__timeout_seconds=self.timeout_seconds,
        )
        for key in ("predict_world_sizes", "predict_accumulation_steps", "link_mbits"):
            values = getattr(self, key)
            require(all(value > 0 for value in values), f"tune.{key}={values} is impossible: each must be above 0.")
        require(
            Compression.none not in self.compressions,
            "tune.compressions holds none, with which all others are compared: leave it out.",
        )
        require(
            self.write is None or self.write.endswith((".yaml", ".yml")),
            f"tune.write={self.write} must be the path of a .yaml file, as in tune.write=conf/experiment/tuned.yaml.",
        )


@dataclass(kw_only=True, slots=True)
class TuneConfig(TrainConfig):
    """A training, and how to find its fastest settings."""

    tune: TuneSection = field(default_factory=TuneSection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _require_size("tune", self.batch)
        _require_constant_size("tune", self.batch)
        _require_given_micro_batch("tune", self.batch)
