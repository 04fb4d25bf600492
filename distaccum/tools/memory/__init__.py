"""Measuring what a rank's memory holds under any placement, and saying what fits."""

from distaccum.tools.memory.run import memory

__all__ = ["memory"]
