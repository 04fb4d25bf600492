"""Imports of a command, without the garbage collector's work on what they bring."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pauses the garbage collector while torch and what a command needs besides are imported.

    Imports make half a million objects and hardly any garbage, and the collector looks through all of them again and
    again: a third of the time. Afterwards it takes them for permanent, so that no later collection looks through them
    either.
    Where torch has been imported already, the process is somebody else's, and nothing is changed.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
