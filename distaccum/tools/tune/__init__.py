"""Finding the settings that train a configuration fastest on this machine, and predicting how it scales."""

from __future__ import annotations

from distaccum.tools.tune.run import tune

__all__ = ["tune"]
