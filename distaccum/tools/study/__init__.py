"""The batch-size study: the same training with several batch sizes, and which one to use."""

from __future__ import annotations

from distaccum.tools.study.run import study

__all__ = ["study"]
