"""What tuning has found, as `tune.json` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from distaccum.tools.bench.environment import Circumstances


@dataclass(kw_only=True, slots=True)
class TuneRow:
    """One thing that was tried."""

    knob: str
    title: str
    overrides: list[str]
    """What it changes, all of it, on the command line of distaccum.train."""
    is_inexact: bool = False
    samples_per_second: float | None = None
    ratio: float | None = None
    """Its time by the best's before it, median over turns that they took by turns."""
    low_ratio: float | None = None
    high_ratio: float | None = None
    memory: int | None = None
    verdict: str = ""
    """`faster`, `slower`, `no clear difference`, or why it can't run."""
    is_taken: bool = False


@dataclass(kw_only=True, slots=True)
class Confirmation:
    """The suggestion against the configuration as it was, once more."""

    default_seconds: float
    seconds: float
    ratio: float
    """The suggestion's time by the default's, median over the turns."""
    low_ratio: float
    high_ratio: float
    is_faster: bool


@dataclass(kw_only=True, slots=True)
class LinkFit:
    """A link that updates are predicted for; where it was measured, with what its line is fitted to."""

    name: str
    latency_seconds: float
    bytes_per_second: float
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
    """The window is that of the configuration, so the update is too."""
    seconds: dict[str, float]
    """By link."""


@dataclass(kw_only=True, slots=True)
class Forecast:
    """Measured without a network, computed for others."""

    fixed_seconds: float
    micro_step_seconds: float
    micro_batch: float
    """Samples of the micro-batches that were measured, on average."""
    compute_measured: dict[int, float]
    """Seconds of an update by its micro-steps, each rank for itself."""
    sync_calls: int
    sync_bytes: int
    links: list[LinkFit]
    predictions: list[Prediction]
    measured_seconds: float | None = None
    """Of the suggestion on this machine's ranks, to compare the prediction with."""
    predicted_seconds: float | None = None


@dataclass(kw_only=True, slots=True)
class TuneReport(Circumstances):
    """What `tune.json` holds."""

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
