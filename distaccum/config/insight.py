"""What is measured of the training itself."""

from __future__ import annotations

from dataclasses import dataclass

from distaccum.errors import require, require_at_least


@dataclass(kw_only=True, slots=True)
class InsightConfig:
    """What a run tells of its gradients, besides training: no bit of the training changes, unless said."""

    noise_scale: bool = False
    """Measure the gradient noise scale (McCandlish et al. 2018), with its error, and the coherence of the
    micro-gradients. Where a window is one micro-batch on one rank, those that are measured are cut in two, which
    changes rounding."""
    every_updates: int = 64
    """Measure in each so-many-th update. What it costs is in those updates alone."""
    smoothing: float = 0.9
    """What the weight of a measurement is multiplied by at each later one: the noise scale is a mean over about
    1 / (1 - smoothing) measurements."""

    def __post_init__(self) -> None:
        require_at_least(1, insight__every_updates=self.every_updates)
        require(
            0 <= self.smoothing < 1,
            f"insight.smoothing={self.smoothing} is impossible: it must be at least 0 and below 1.",
        )
