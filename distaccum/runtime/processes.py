"""Processes that end with those that started them."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_PDEATHSIG = 1


def signal_when_parent_ends(number: int) -> None:
    """Makes the kernel send this process a signal when the thread that started it ends. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
