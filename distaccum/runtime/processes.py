"""Processes that end with those that started them, and their names."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def signal_when_parent_ends(number: int) -> None:
    """Makes the kernel send this process a signal when the thread that started it ends. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def name_process(name: str) -> None:
    """Sets the name, of at most 15 characters, under which `top` and `ps` show this process. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
