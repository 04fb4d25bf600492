"""Windows of tensors on the device, and evaluation data."""

from __future__ import annotations

from distaccum.loaders.collate import Stacked
from distaccum.loaders.evaluation_loader import EvaluationLoader
from distaccum.loaders.options import LoaderOptions
from distaccum.loaders.pack import PackCollate
from distaccum.loaders.window import Window
from distaccum.loaders.window_loader import WindowLoader

__all__ = ["EvaluationLoader", "LoaderOptions", "PackCollate", "Stacked", "Window", "WindowLoader"]
