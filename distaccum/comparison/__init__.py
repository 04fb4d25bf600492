"""The comparison of placements: one training, several ways to place it, measured in processes of their own."""

from __future__ import annotations

from distaccum.comparison.runner import compare

__all__ = ["compare"]
