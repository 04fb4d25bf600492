"""Where the memory of a run goes, in one line after its first update."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from distaccum.runtime.memory import KeptForBackward, held_bytes, peak_memory
from distaccum.strategies import Strategy
from distaccum.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()


class MemoryLine:
    """Looks at what the first micro-step of a run keeps for its backward; afterwards it costs nothing.

    Args:
        strategy: of the placed model.
        optimizer: over its parameters.
        averages: of the weights.
        is_compiled: compiled code keeps what it likes, and would be compiled once more to be looked at.
    """

    def __init__(
        self,
        strategy: Strategy,
        optimizer: torch.optim.Optimizer,
        averages: Sequence[WeightAverage] = (),
        *,
        is_compiled: bool = False,
    ) -> None:
        self._is_compiled = is_compiled
        self._strategy = strategy
        self._optimizer = optimizer
        self._averages = averages
        self._kept: KeptForBackward | None = None
        self._samples = 0
        self._has_told = False

    def watching(self, samples: int) -> AbstractContextManager[Any]:
        """Encloses a forward of so many samples. Only the first one is looked at."""
        if self._kept is not None or self._is_compiled:
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
            "gradients": sum(_gradient_bytes(p) for p in module.parameters() if p.requires_grad),
            "optimizer": held_bytes(tree_iter(list(inner.state.values()))),
        }
        if self._averages:
            parts["averages"] = sum(held_bytes(average.tensors().values()) for average in self._averages)
        told = " + ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.items())
        peak, what = peak_memory(self._strategy.device)
        logger.info(
            "memory: %s%s; peak so far %.0f MB %s",
            told,
            self._activations(),
            peak / 1e6,
            what,
        )

    def _activations(self) -> str:
        if self._kept is None:
            return ""
        samples = max(1, self._samples)
        return f" + activations {samples} × {self._kept.bytes / samples / 1e6:.3g} MB"


def _gradient_bytes(parameter: torch.Tensor) -> int:
    """What its gradient takes, which is not there between windows; accumulated in float32, it is wider than it."""
    dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
    return held_bytes([parameter]) * dtype.itemsize // parameter.dtype.itemsize
