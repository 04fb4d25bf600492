"""The version of this package."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path


def _version() -> str:
    try:
        return importlib.metadata.version("distaccum")
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
        return str(project["project"]["version"])


__version__ = _version()
