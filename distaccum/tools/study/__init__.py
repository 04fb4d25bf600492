"""The batch-size study: the same training with several batch sizes, and what batch size it should have."""

from __future__ import annotations

from distaccum.tools.study.run import study

__all__ = ["study"]
