"""The comparison of placements: one training, several ways to place it, measured in processes of their own."""

from __future__ import annotations

from distaccum.tools.compare.run import compare

__all__ = ["compare"]
