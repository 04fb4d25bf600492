"""A candidate: the configuration with a setting, in processes of its own, and its times compared with another's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from distaccum.tools.bench.rounds import Round, middle_half, round_of
from distaccum.tools.bench.sessions import PlacementFailedError, Session
from distaccum.tools.tune.settings import TuneSetting

_UPDATES_BEFORE = 3
"""Updates before the first timed one, in which buckets are laid out and the optimizer's state is made."""
_MOST_UPDATES = 500


class Verdict(Enum):
    """A candidate's speed compared with the best's before it."""

    faster = "faster"
    slower = "slower"
    alike = "no clear difference"


@dataclass(slots=True)
class Contender:
    """The configuration with a setting.

    Attributes:
        memory: peak in bytes of the process that used most.
        prepared: the answer of its rank 0 to the command `prepare`.
        rounds: its turns, in order.
    """

    title: str
    setting: TuneSetting
    start: Callable[[], Session]
    memory: int = 0
    prepared: dict[str, Any] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    session: Session | None = None

    def prepare(self, most_memory: float | None) -> None:
        """Starts the processes and makes the first updates.

        Raises:
            PlacementFailedError: it can't run, or needs more memory than it may.
        """
        answers = self.ask("prepare", curve_updates=_UPDATES_BEFORE)
        self.memory = max(answer["peak_memory"] for answer in answers)
        self.prepared = answers[0]
        if most_memory is not None and self.memory > most_memory:
            raise PlacementFailedError(
                f"needs {self.memory / 2**30:.2f} GiB, more than tune.memory_gb={most_memory / 2**30:g}", "memory"
            )

    def time(self, updates: int) -> float:
        """Takes a turn of some updates; returns the seconds of one.

        Raises:
            PlacementFailedError: it can't go on.
        """
        self.rounds.append(round_of(self.ask("round", updates=updates, warmup_updates=1)))
        return self.rounds[-1].seconds

    def updates_for(self, seconds: float) -> int:
        """Returns the number of updates that take about this time."""
        if self.rounds:
            one = self.seconds
        else:
            self.time(1)
            one = self.time(2)
            self.rounds.clear()
        return max(2, min(_MOST_UPDATES, round(seconds / one)))

    @property
    def seconds(self) -> float:
        """Seconds of an update: the median over the turns."""
        return statistics.median(turn.seconds for turn in self.rounds)

    @property
    def samples_per_second(self) -> float:
        return self.rounds[0].samples / self.seconds

    @property
    def data_share(self) -> float:
        return statistics.median(turn.data_share for turn in self.rounds)

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Returns all ranks' answers to a request; ranks that are started for it are warmed up first."""
        if self.session is None:
            self.session = self.start()
            if do != "prepare":
                self.session.ask("prepare", curve_updates=_UPDATES_BEFORE)
        return self.session.ask(do, **arguments)

    def stop(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()


def spread_of(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, the first and the third quartile."""
    return statistics.median(ratios), *middle_half(ratios)


def verdict_of(ratios: Sequence[float], min_gain: float) -> Verdict:
    """Judges a candidate by the ratios of its times to the best's, turn by turn.

    It is faster if the median gain is above `min_gain` and the middle half of the turns agree that there is one.

    >>> verdict_of([0.80, 0.85, 0.99], 0.03).value, verdict_of([0.90, 1.10, 0.95], 0.03).value
    ('faster', 'no clear difference')
    """
    middle, low, high = spread_of(ratios)
    if middle < 1 - min_gain and high < 1:
        return Verdict.faster
    return Verdict.slower if middle > 1 and low > 1 else Verdict.alike
