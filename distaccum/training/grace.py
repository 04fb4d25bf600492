"""The seconds between a signal to stop and the end of the process: finish the window in them, or drop it in time."""

from __future__ import annotations

import time

import torch.distributed as dist
from torch import Tensor

from distaccum.checkpoints import random_state, set_random_state
from distaccum.runtime.buffers import KeptBuffers
from distaccum.runtime.stop_signals import Interruption
from distaccum.strategies import Strategy

_SAVING_SHARE = 0.3
"""Part of the grace that is left for saving."""

_LONG_SHARE = 0.1
"""A window longer than this part of the grace may have to be dropped, so the next one is prepared for that."""


class WindowDroppedError(Exception):
    """The window was given up, on all ranks, and nothing of it remains."""


class EvaluationDroppedError(Exception):
    """The evaluation was given up, on all ranks."""


class Grace:
    """Watches one window after another. Dropping one puts buffers and generators back to where it began.

    Strategies whose micro-steps hold collectives finish every window: their ranks can't leave one at different places.
    """

    def __init__(self, interruption: Interruption, strategy: Strategy, grace_seconds: float) -> None:
        self._interruption = interruption
        self._strategy = strategy
        self._seconds = grace_seconds * (1 - _SAVING_SHARE)
        # All ranks must be prepared alike. Nothing is known of the first window, so it may be long.
        self._next_is_long = not strategy.equal_micro_steps
        self._update = 0
        self._micro_steps = 0
        self._started = 0.0
        self._random: dict[str, Tensor] | None = None
        self._buffers = KeptBuffers()
        self._remembered: dict[str, Tensor] = {}

    def is_long(self) -> bool:
        """Whether the window has taken so long that the next one may have to be dropped: a flag of the accumulator."""
        too_long = time.perf_counter() - self._started > _LONG_SHARE * self._seconds
        return too_long and not self._strategy.equal_micro_steps

    def begin(self, update: int, micro_steps: int) -> None:
        """Before the window of an update, of which this rank has so many micro-steps."""
        self._update, self._micro_steps, self._started = update, micro_steps, time.perf_counter()
        self._random, self._buffers, self._remembered = None, KeptBuffers(), {}
        if self._next_is_long:
            self._random = random_state(self._strategy.device)
            self._buffers = KeptBuffers(self._strategy.module)
            # Leaving a window drops what a strategy remembers of the windows before.
            self._remembered = {name: value.clone() for name, value in self._strategy.state_tensors().items()}

    def check(self, micro_step: int, *, is_last: bool | None = None, to_come: int = 0) -> None:
        """Before each micro-step (from 1), once a signal has come.

        Args:
            is_last: whether it is the window's last one. None: if it is the last that was planned.
            to_come: what the window takes after the last of these, in as many of them.

        Raises:
            WindowDroppedError: there is not enough time left, and the ranks have settled to drop the window.
        """
        if self._strategy.equal_micro_steps:
            return
        spent = time.perf_counter() - self._started
        # There may be more of them than planned, if memory has run out.
        left = max(1, self._micro_steps - micro_step + 1) + to_come
        needed = spent / max(1, micro_step - 1) * left
        is_too_slow = self._interruption.seconds_since() + needed > self._seconds
        window = f"window/{self._update}"
        fate = self._interruption.settle(window, "drop" if self._random is not None and is_too_slow else None)
        if fate is None and (micro_step == self._micro_steps if is_last is None else is_last):
            # A wish to drop comes to nothing as long as not all ranks have got the signal; from here on nobody may.
            fate = self._interruption.settle(window, "finish")
        if fate == "drop":
            raise WindowDroppedError

    def check_evaluation(self, update: int, *, is_over: bool) -> None:
        """Before each batch of the evaluation after an update, and before ranks meet at its end (`is_over`).

        An evaluation can be made at any time, so it is not waited for once a signal has come.

        Raises:
            EvaluationDroppedError: the ranks have settled to drop it.
        """
        if self._strategy.equal_micro_steps or not self._interruption.is_requested():
            return
        if self._interruption.settle(f"evaluation/{update}", "finish" if is_over else "drop") == "drop":
            raise EvaluationDroppedError

    def agreed_signal(self) -> str:
        """The signal that came to the first rank that got one. All ranks call it once one has."""
        names = [self._interruption.signal_name]
        if self._strategy.process_group is not None:
            names = [None] * self._strategy.world_size
            dist.all_gather_object(names, self._interruption.signal_name, group=self._strategy.process_group)
        return next(name for name in names if name is not None)

    def end(self, flags: frozenset[str]) -> None:
        """After the update, with its flags."""
        self._next_is_long = "long" in flags

    def put_back(self) -> None:
        """Undoes what the forwards of a dropped window have left behind."""
        assert self._random is not None
        set_random_state(self._random, self._strategy.device)
        self._strategy.load_state_tensors(self._remembered)
        self._buffers.put_back()
