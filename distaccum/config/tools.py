"""The typed configuration of the tools beside training: `compare`, `check`, `memory`, `study` and `tune`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from distaccum.config import BatchConfig, TrainConfig
from distaccum.config.enums import BatchSchedule, Compression, Goal, LrRule
from distaccum.errors import require, require_at_least, require_positive


class PlacementName(Enum):
    """What `python -m distaccum.compare` can compare."""

    one_shot = "one_shot"
    single = "single"
    dp = "dp"
    ddp_sync_every_step = "ddp_sync_every_step"
    ddp = "ddp"
    ddp_bf16 = "ddp_bf16"
    ddp_fp16 = "ddp_fp16"
    ddp_powersgd = "ddp_powersgd"
    zero1 = "zero1"
    fsdp = "fsdp"
    fsdp_gathered = "fsdp_gathered"


@dataclass(kw_only=True, slots=True)
class CompareSection:
    """What `python -m distaccum.compare` runs, and how long it measures."""

    placements: list[PlacementName] | None = None
    """Which placements, of `one_shot`, `single`, `dp`, `ddp_sync_every_step`, `ddp`, `ddp_bf16`, `ddp_fp16`,
    `ddp_powersgd`, `zero1`, `fsdp` and `fsdp_gathered` (`strategy.reshard_in_window=false`). `null`: all of them."""
    world_sizes: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of ranks, or of replicas under DP. Placements of one process run if 1 is among them."""
    accumulation_steps: list[int] = field(default_factory=lambda: [4])
    """Micro-steps per window and rank, each of which is a row of its own for each placement and world size."""
    updates: int = 8
    """Timed updates per round. Only windows of the full size are timed."""
    warmup_updates: int = 2
    """Updates before the timed ones of each round."""
    rounds: int = 5
    """How often each placement takes its turn to be timed."""
    curve_updates: int = 30
    """Updates of the loss curve, from the start of the training, at most as many as the training has."""
    exact_updates: int = 3
    """Updates after which the parameters are compared with those of the float64 one-shot run."""
    tolerance: float = 1e-12
    """Largest error, in float64, of what is called exact."""
    threads_per_rank: int = 1
    """CPU threads of each rank."""
    keep_alive: bool | None = None
    """Keep the processes of a placement while the others take their turn, instead of starting them anew in each round.
    `null`: on a CPU, as long as they take up little memory."""
    timeout_seconds: float = 300.0
    """How long a placement may stay silent before it is stopped and becomes a row that says so."""

    def __post_init__(self) -> None:
        for key in ("world_sizes", "accumulation_steps", "placements"):
            values = getattr(self, key)
            require(values is None or len(values) > 0, f"compare.{key} is empty: give at least one.")
            if values is not None:
                setattr(self, key, list(dict.fromkeys(values)))
        for key in ("world_sizes", "accumulation_steps"):
            for value in getattr(self, key):
                require(value >= 1, f"compare.{key}={getattr(self, key)} is impossible: each must be at least 1.")
        require_at_least(1, compare__updates=self.updates, compare__rounds=self.rounds)
        require_at_least(0, compare__warmup_updates=self.warmup_updates)
        require_at_least(1, compare__curve_updates=self.curve_updates, compare__exact_updates=self.exact_updates)
        require_at_least(1, compare__threads_per_rank=self.threads_per_rank)
        require_positive(compare__timeout_seconds=self.timeout_seconds, compare__tolerance=self.tolerance)


def require_constant_size(batch: BatchConfig, why: str) -> None:
    require(
        batch.schedule is BatchSchedule.constant,
        f"{why}, and batch.schedule={batch.schedule.name} changes them: set batch.schedule=constant and leave out its "
        "other keys.",
    )


@dataclass(kw_only=True, slots=True)
class CompareConfig(TrainConfig):
    """A training, and the placements that it is to be compared under."""

    compare: CompareSection = field(default_factory=CompareSection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(
            self.batch.global_batch_size is not None,
            "compare gives every placement the same windows, so it needs their size, and batch.global_batch_size is "
            "null: give a number.",
        )
        require_constant_size(self.batch, "compare times windows of one size")
        require(
            getattr(self.batch, "max_tokens", None) is None,
            "compare sets how much a micro-batch may hold by compare.accumulation_steps, so batch.max_tokens would be "
            "overruled: leave it out.",
        )


@dataclass(kw_only=True, slots=True)
class CheckSection:
    """What `python -m distaccum.check` measures, and how far apart equal results may be."""

    windows: int = 2
    """Windows to measure: the first ones of an epoch, the last of them being the epoch's last window, ragged or not."""
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
    """A training whose updates are to be proved independent of the cut."""

    check: CheckSection = field(default_factory=CheckSection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(
            not self.compile, "compile=true has no part in a check, which looks at the model as it is: leave it out."
        )
        require(
            not self.batch.is_auto,
            "check compares cuts of known sizes, and batch.micro_batch_size=auto is found only where a training "
            "starts: give a number here, as in batch.micro_batch_size=4. It changes nothing that check looks at.",
        )


@dataclass(kw_only=True, slots=True)
class MemorySection:
    """What `python -m distaccum.memory` measures, in one process, and what it is to fit into."""

    world_size: int | None = None
    """Ranks to measure `ddp` and `fsdp` for; they need not be there. `null`: one per GPU of this host, at least 2."""
    limit_gb: float | None = None
    """Memory that one rank may use, in GiB. `null`: the device's."""
    headroom: float = 0.1
    """Part of the limit to leave free, for fragmentation, and on a GPU for what CUDA itself takes."""
    alternatives: bool = True
    """Measure what other settings would need too. `false`: the configured one only."""
    json: bool = False
    """Print one JSON object and nothing else. `--json` is short for `memory.json=true`."""

    def __post_init__(self) -> None:
        require_at_least(1, memory__world_size=self.world_size)
        require_positive(memory__limit_gb=self.limit_gb)
        require(self.limit_gb != math.inf, f"memory.limit_gb={self.limit_gb} is impossible: it must be finite.")
        require(0 <= self.headroom < 1, f"memory.headroom={self.headroom} is impossible: it must lie in [0, 1).")


@dataclass(kw_only=True, slots=True)
class MemoryConfig(TrainConfig):
    """A training whose memory is to be measured and predicted."""

    memory: MemorySection = field(default_factory=MemorySection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require_constant_size(self.batch, "memory measures windows of one size")
        require(
            not self.compile,
            "memory measures the model as it is, and compile=true has another peak: leave it out.",
        )
        require(
            not self.batch.is_auto,
            "memory says by itself what fits, and batch.micro_batch_size=auto leaves open what to measure: give a "
            "number here, as in batch.micro_batch_size=4.",
        )


@dataclass(kw_only=True, slots=True)
class StudySection:
    """What `python -m distaccum.study` trains, until when, and what it concludes from it."""

    batch_sizes: list[int] | None = None
    """Global batch sizes to try. `null`: a sixteenth, a quarter, once and four times `batch.global_batch_size`, as far
    as the data have a window of them."""
    lr_rules: list[LrRule] = field(default_factory=lambda: [LrRule.linear, LrRule.sqrt])
    """How the learning rate follows the batch size, from `optim.lr` at `batch.global_batch_size`: `linear`, `sqrt` or
    `none` (it does not). Each is tried at each batch size; the one that got to the target in fewest updates counts."""
    metric: str | None = None
    """What the target is a value of: `train/loss`, or an evaluation's metric (`eval/loss`, `eval/accuracy`). `null`:
    `eval/loss` where there is an evaluation, else `train/loss`."""
    goal: Goal | None = None
    """Whether less or more of it is better. `null`: `min` for a loss, `max` for everything else."""
    target: float | None = None
    """The value to reach; a run that has reached it is stopped. `null`: chosen afterwards, so that one run at least of
    each batch size has reached it; all runs then go on to `study.max_samples`."""
    max_samples: int | None = None
    """Samples after which a run ends in any case. `null`: as many as the configured training has."""
    evaluations: int = 60
    """Evaluations of a run that goes on to `study.max_samples`, equal numbers of samples apart."""
    smoothing: int = 3
    """Evaluations that are averaged; for `train/loss`, the samples between so many of them."""
    noise_scale: bool | None = None
    """Measure the gradient noise scale in the runs, to stand beside the critical batch size. `null`: where it can be
    had (see `insight.noise_scale`)."""
    ranks: int = 1
    """Ranks of each run, which are started by torchrun."""
    threads_per_rank: int = 1
    """CPU threads of each rank."""
    point: int | None = None
    """Run this point alone (from 0), as a job of an array does. `null`: all that are not finished, in turn."""

    def __post_init__(self) -> None:
        for key in ("batch_sizes", "lr_rules"):
            values = getattr(self, key)
            require(values is None or len(values) > 0, f"study.{key} is empty: give at least one.")
            if values is not None:
                setattr(self, key, list(dict.fromkeys(values)))
        for size in self.batch_sizes or []:
            require(size >= 1, f"study.batch_sizes={self.batch_sizes} is impossible: each must be at least 1.")
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
    """A training, of which the best batch size is sought."""

    study: StudySection = field(default_factory=StudySection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(
            self.batch.global_batch_size is not None,
            "study scales the learning rate from that of batch.global_batch_size, which is null: give a number.",
        )
        require_constant_size(self.batch, "study tries batch sizes that stay the same in a run")
        require(
            self.batch.accumulation_steps is None,
            f"study tries several batch sizes, and with batch.accumulation_steps={self.batch.accumulation_steps} the "
            "micro-batch would grow with them: give batch.micro_batch_size instead.",
        )
        require(
            not self.batch.is_auto,
            "study can't be had with batch.micro_batch_size=auto, which finds another size for each of its runs: give "
            "a number.",
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
    """What `python -m distaccum.tune` tries, how long it takes, and what it predicts."""

    world_size: int | None = None
    """Ranks to tune for, on this machine. `null`: as many as it has GPUs; 1 without any."""
    minutes: float = 5.0
    """How long to try candidates. Those that are not reached are named; the suggestion is confirmed against the
    configuration as it is in any case."""
    rounds: int = 3
    """Turns that a candidate and the best so far take to be timed."""
    confirm_rounds: int = 5
    """Turns that the suggestion and the default take at the end."""
    round_seconds: float = 1.0
    """Length of a turn, about."""
    min_gain: float = 0.03
    """A candidate takes the place of the best if it is faster by more than this part, and in the middle half of the
    turns faster at all."""
    memory_gb: float | None = None
    """Most memory of a process, in GiB: on a GPU what is allocated, on a CPU the resident set, Python and torch
    included. `null`: what the device has."""
    compressions: list[Compression] = field(default_factory=list)
    """Gradient compressions to measure (`bf16`, `fp16`, `powersgd`) with `strategy=ddp`. Their updates are not exact,
    so they are reported and not suggested."""
    accept_inexact: bool = False
    """Suggest a compression if it is the fastest."""
    write: str | None = None
    """File to write the suggestion to, for `experiment=`: `conf/experiment/tuned.yaml` in a checkout, or
    `DIR/experiment/NAME.yaml` for `--config-dir DIR`."""
    predict_world_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Ranks to predict the seconds per update for."""
    predict_accumulation_steps: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Micro-steps to predict them for, besides those of the configuration's own window."""
    link_mbits: list[float] = field(default_factory=lambda: [1000.0, 10000.0])
    """Mbit/s of each rank's link to predict them for, besides what this machine's own ranks are joined by."""
    link_latency_ms: float = 0.1
    """Latency of those links, of one step of a ring all-reduce."""
    threads_per_rank: int | None = None
    """CPU threads of each rank. `null`: 1 with several ranks, as under torchrun; all cores in a single process."""
    timeout_seconds: float = 300.0
    """How long a candidate may stay silent before it is stopped."""

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
            for value in getattr(self, key):
                require(value > 0, f"tune.{key}={getattr(self, key)} is impossible: each must be above 0.")
        require(
            Compression.none not in self.compressions,
            "tune.compressions holds none, which is what all others are compared with: leave it out.",
        )
        require(
            self.write is None or self.write.endswith((".yaml", ".yml")),
            f"tune.write={self.write} must be the path of a .yaml file, as in tune.write=conf/experiment/tuned.yaml.",
        )


@dataclass(kw_only=True, slots=True)
class TuneConfig(TrainConfig):
    """A training whose settings for speed are to be found."""

    tune: TuneSection = field(default_factory=TuneSection)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(
            self.batch.global_batch_size is not None,
            "tune keeps the window as it is and cuts it in other ways, so it needs its size, and "
            "batch.global_batch_size is null: give a number.",
        )
        require_constant_size(self.batch, "tune times windows of one size")
        require(
            not self.batch.is_auto,
            "tune tries micro-batches itself, beginning with the one that is configured, and batch.micro_batch_size="
            "auto is found only where a training starts: give a number to begin with, as in batch.micro_batch_size=4.",
        )
