"""Where the memory of a run goes, in one line after its first update."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from distaccum.devices import peak_memory
from distaccum.live_memory import KeptForBackward, held_bytes
from distaccum.strategies import Strategy

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()


class MemoryLine:
    """Looks at what the first micro-step of a run keeps for its backward; afterwards it costs nothing.

    Args:
        strategy: of the placed model.
        optimizer: over its parameters.
    """

    def __init__(self, strategy: Strategy, optimizer: torch.optim.Optimizer) -> None:
        self._strategy = strategy
        self._optimizer = optimizer
        self._kept: KeptForBackward | None = None
        self._samples = 0
        self._has_told = False

    def watching(self, samples: int) -> AbstractContextManager[Any]:
        """Encloses a forward of so many samples. Only the first one is looked at."""
        if self._kept is not None:
            return _NOTHING
        self._samples = samples
        self._kept = KeptForBackward([*self._strategy.model.parameters(), *self._strategy.model.buffers()])
        return self._kept

    def tell(self) -> None:
        """Logs the line, once."""
        if self._has_told:
            return
        self._has_told = True
        module = self._strategy.module
        inner = getattr(self._optimizer, "optim", self._optimizer)
        parts = {
            "parameters": held_bytes(module.parameters()),
            "gradients": held_bytes(p.grad for p in module.parameters() if p.grad is not None),
            "optimizer": held_bytes(value for values in inner.state.values() for value in values.values()),
        }
        told = " + ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.items())
        kept = self._kept.bytes if self._kept is not None else 0
        peak, what = peak_memory(self._strategy.device)
        logger.info(
            "memory: %s + activations %d × %.3g MB; peak so far %.0f MB %s",
            told,
            max(1, self._samples),
            kept / max(1, self._samples) / 1e6,
            peak / 1e6,
            what,
        )
