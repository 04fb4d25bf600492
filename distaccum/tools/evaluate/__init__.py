"""Several trained models as one, and how each of them and all together do."""

from __future__ import annotations

from distaccum.models.ensemble import Ensemble
from distaccum.tools.evaluate.run import Wishes, evaluate

__all__ = ["Ensemble", "Wishes", "evaluate"]
