"""Measurements of a machine or a dataset, kept for the next start in the user's cache folder.

It is `$XDG_CACHE_HOME/distaccum`, or `~/.cache/distaccum`; all in it can be removed at any time, and is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distaccum.runtime.files import locked, write_text

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache folder; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "distaccum"
    except RuntimeError:
        return Path(os.devnull)  # without a home nothing can be kept


def fingerprint(of: Any) -> str:
    """Returns a hash of everything that a measurement depends on, given as JSON values."""
    return hashlib.blake2b(json.dumps(of, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


class Remembered:
    """One JSON value in the cache.

    With a folder that can't be written to, or a damaged file, it is measured again; nothing else happens.

    Args:
        name: name of the file, without its ending.
    """

    def __init__(self, name: str) -> None:
        self.path = cache_folder() / f"{name}.json"

    def read(self) -> Any:
        """The value; None if there is none."""
        try:
            return json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, value: Any) -> None:
        """Replaces the value."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(value))
        except OSError as error:
            logger.debug("%s can't be written: %s", self.path, error)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes other processes that hold the same value wait, as far as the cache's file system can."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.debug("%s can't be made: %s", self.path.parent, error)
        with locked(self.path.with_suffix(".lock")):
            yield
