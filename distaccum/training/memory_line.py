"""Logs where the memory of a run goes, in one line after its first update."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from distaccum.runtime.memory import KeptForBackward, held_bytes, peak_memory
from distaccum.runtime.sharded import is_sharded
from distaccum.strategies import Strategy
from distaccum.strategies.optimizers import own_optimizer
from distaccum.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class MemoryLine:
    """Measures what the first micro-step of a run keeps for its backward; afterwards it costs nothing.

    Attributes:
        is_compiled: leave the activations out: compiled code chooses what it keeps, and would be compiled once more to
            be measured.
    """

    strategy: Strategy
    optimizer: torch.optim.Optimizer
    averages: Sequence[WeightAverage] = ()
    is_compiled: bool = False
    _kept: KeptForBackward | None = None
    _samples: int = 0
    _is_logged: bool = False

    def watching(self, samples: int) -> AbstractContextManager[Any]:
        """Encloses a forward of so many samples. Only the first one is measured."""
        if self._kept is not None or self.is_compiled:
            return nullcontext()
        self._samples = samples
        self._kept = KeptForBackward([*self.strategy.model.parameters(), *self.strategy.model.buffers()])
        return self._kept

    def measure_again(self) -> None:
        """Has the next micro-step measured too, and a line logged after its update: what is trained has changed."""
        self._kept, self._is_logged = None, False

    def log_once(self) -> None:
        """Logs the line at the first call."""
        if self._is_logged:
            return
        self._is_logged = True
        module = self.strategy.module
        parts = {
            "parameters": held_bytes(module.parameters()),
            "gradients": sum(self._gradient_bytes(p) for p in module.parameters() if p.requires_grad),
            "optimizer": held_bytes(tree_iter(list(own_optimizer(self.optimizer).state.values()))),
        }
        if self.averages:
            parts["averages"] = sum(held_bytes(average.tensors().values()) for average in self.averages)
        text = " + ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.items())
        peak, what = peak_memory(self.strategy.device)
        if self._kept is not None:
            samples = max(1, self._samples)
            text += f" + activations {samples} × {self._kept.bytes / samples / 1e6:.3g} MB"
        logger.info("memory: %s; peak so far %.0f MB %s", text, peak / 1e6, what)

    def _gradient_bytes(self, parameter: torch.Tensor) -> int:
        """Bytes of a parameter's gradient, which does not exist between windows and may be wider (`grad_dtype`)."""
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
        if is_sharded(parameter) and not self.strategy.in_shards:  # whole until the window's last backward
            return parameter.numel() * dtype.itemsize
        return held_bytes([parameter]) * dtype.itemsize // parameter.dtype.itemsize
