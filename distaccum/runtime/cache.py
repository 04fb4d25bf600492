"""What was found out about a machine or a dataset, kept for the next start in the user's cache folder.

`$XDG_CACHE_HOME/distaccum`, or `~/.cache/distaccum`. All in it can be removed at any time, and is found out again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from distaccum.runtime.files import write_text

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where things are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "distaccum"
    except RuntimeError:
        return Path(os.devnull)  # without a home nothing can be kept


def fingerprint(of: Any) -> str:
    """A short name for everything that something depends on, which must be made of what JSON has."""
    return hashlib.blake2b(json.dumps(of, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


class Remembered:
    """One thing that is remembered: anything that JSON can hold.

    A folder that can't be written to, or a file that is damaged, costs the time to find it out again and nothing else.

    Args:
        name: of the file, without its ending.
    """

    def __init__(self, name: str) -> None:
        self.path = cache_folder() / f"{name}.json"

    def read(self) -> Any:
        """What is remembered; None if nothing is."""
        try:
            return json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, value: Any) -> None:
        """Remembers a value in place of the one before."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(value))
        except OSError as error:
            logger.debug("%s can't be written: %s", self.path, error)
