"""Points at which a training process is killed: in the training of `victims.py`, and around calls to the system."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One kill.

    Attributes:
        point: a place that a rank passes: `forward`, `backward`, `before all_reduce`, `half of manifest.json`, …
            Numbers in the names of files are written as `#`, and so are fingerprints.
        nth: which pass of the start counts.
        rank: the rank whose passes count, and that is killed. None: each by its own passes.
        delay: seconds from there to the kill, which comes from outside, wherever the rank is by then; None to kill it
            right there.
        all_ranks: kill the other ranks at the same moment.
        leave_others: let the other ranks find out by themselves. Otherwise they are killed a moment later, as by a
            launcher that is killed too.
    """

    point: str
    nth: int = 1
    rank: int | None = 0
    delay: float | None = None
    all_ranks: bool = False
    leave_others: bool = False


_write = os.write
_order: Order | None = None
_report = -1
_passes = 0


def passing(point: str) -> None:
    """To be called where a rank passes a point."""
    global _passes
    if _order is None or point != _order.point:
        return
    _passes += 1
    if _passes == _order.nth:
        _write(_report, b"!")
        if _order.delay is None:
            os.kill(os.getpid(), signal.SIGKILL)


def arm(order: Order, report: int) -> None:
    """Makes this process follow an order.

    Args:
        report: file descriptor that gets a byte when the point has been passed.
    """
    global _order, _report
    _order, _report = order, report
    os.fsync = _around(os.fsync, "fsync", _name_of_open)
    os.rename = _around(os.rename, "rename", _name)
    os.truncate = _around(os.truncate, "truncate", _name)
    os.unlink = _around(os.unlink, "unlink", _name)
    os.write = _write_in_halves  # type: ignore[assignment]
    Path.open = _open  # type: ignore[method-assign,assignment]
    dist.all_reduce = _around(dist.all_reduce, "all_reduce")
    torch.set_rng_state = _around(torch.set_rng_state, "set_rng_state")


def _around(call: Callable[..., Any], what: str, name: Callable[[Any], str] | None = None) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        point = f"{what} {name(args[0])}" if name is not None else what
        passing(f"before {point}")
        value = call(*args, **kwargs)
        passing(f"after {point}")
        return value

    return wrapped


def _name(path: Any) -> str:
    return re.sub(r"\b[0-9a-f]{8,20}\b|\d+", "#", os.path.basename(os.fspath(path)))


def _name_of_open(descriptor: int) -> str:
    return _name(os.readlink(f"/proc/self/fd/{descriptor}"))


def _write_in_halves(descriptor: int, data: Any) -> int:
    name = _name_of_open(descriptor)
    if name != "metrics.jsonl":
        return _write(descriptor, data)
    half = _write(descriptor, data[: len(data) // 2])
    passing(f"half of {name}")
    return half + _write(descriptor, data[half:])


class _FileInHalves(io.FileIO):
    def write(self, data: Any) -> int:
        half = super().write(data[: len(data) // 2])
        passing(f"half of {_name(self.name)}")
        return half + super().write(data[half:])


_open_path = Path.open


def _open(self: Path, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
    return _FileInHalves(self, mode) if buffering == 0 else _open_path(self, mode, buffering, **kwargs)
