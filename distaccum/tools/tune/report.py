"""The results of tuning, as in `tune.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from distaccum.tools.bench.environment import Circumstances
from distaccum.tools.tune.network_model import ComputeTime, Link


@dataclass(kw_only=True, slots=True)
class TuneRow:
    """A candidate and its times."""

    knob: str
    title: str
    overrides: list[str]
    """All that it changes, as words of distaccum.train's command line."""
    is_inexact: bool = False
    samples_per_second: float | None = None
    ratio: float | None = None
    """Its time divided by the best's before it: the median over turns."""
    low_ratio: float | None = None
    high_ratio: float | None = None
    memory: int | None = None
    verdict: str = ""
    """`faster`, `slower`, `no clear difference`, or why it can't run."""
    is_taken: bool = False


@dataclass(kw_only=True, slots=True)
class Confirmation:
    """The suggestion and the configuration as it was, timed once more."""

    default_seconds: float
    seconds: float
    ratio: float
    """The suggestion's time divided by the default's: the median over the turns."""
    low_ratio: float
    high_ratio: float
    is_faster: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFit(Link):
    """A link to predict updates for and, if it was measured, the times that it is fitted to."""

    name: str
    measured: dict[int, float] = field(default_factory=dict)
    """Seconds of bare all-reduces by their bytes."""
    fitted: dict[int, float] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Prediction:
    """Seconds per update for a number of ranks and of micro-steps."""

    world_size: int
    micro_steps: int
    window: int
    is_own_window: bool
    """Whether the window, and so the update, is the configuration's."""
    seconds: dict[str, float]
    """By link."""


@dataclass(kw_only=True, slots=True)
class Forecast:
    """Predictions, and the measurements behind them."""

    fixed_seconds: float
    micro_step_seconds: float
    micro_batch: float
    """Mean number of samples of the measured micro-batches."""
    compute_measured: dict[int, float]
    """Seconds of an update by its micro-steps, each rank for itself."""
    sync_calls: int
    sync_bytes: int
    links: list[LinkFit]
    predictions: list[Prediction]
    measured_seconds: float | None = None
    """Seconds of an update of the suggestion on this machine's ranks, for comparison with the prediction."""
    predicted_seconds: float | None = None

    @property
    def compute(self) -> ComputeTime:
        return ComputeTime(self.fixed_seconds, self.micro_step_seconds)


@dataclass(kw_only=True, slots=True)
class TuneReport(Circumstances):
    """All results of tuning."""

    world_size: int
    rows: list[TuneRow]
    suggestion: list[str] = field(default_factory=list)
    """Overrides; empty: the configuration as it is."""
    train_command: str = ""
    confirmation: Confirmation | None = None
    forecast: Forecast | None = None
    no_forecast: str | None = None
    """Why nothing is predicted, or None."""
    not_tried: list[str] = field(default_factory=list)
    memory_kind: str = ""
    seconds: float = 0.0
