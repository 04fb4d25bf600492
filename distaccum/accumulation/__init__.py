"""Gradients accumulated over a window's micro-steps, synchronised once, scaled, clipped and stepped."""

from __future__ import annotations

from distaccum.accumulation.accumulator import Accumulator
from distaccum.accumulation.gradient_caching import accumulate_coupled
from distaccum.accumulation.noise_scale import NoiseScale
from distaccum.accumulation.recovery import Recovery
from distaccum.accumulation.result import LossTerm, UpdateResult

__all__ = ["Accumulator", "LossTerm", "NoiseScale", "Recovery", "UpdateResult", "accumulate_coupled"]
