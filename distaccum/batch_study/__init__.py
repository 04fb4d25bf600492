"""The batch-size study: the same training with several batch sizes, and what batch size it should have."""

from __future__ import annotations

from distaccum.batch_study.runner import study

__all__ = ["study"]
