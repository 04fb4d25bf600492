"""A comparison, whole: its rows, and under what circumstances they came about."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import distaccum
from distaccum.comparison.results import Row
from distaccum.redaction import redacted_arguments


@dataclass(kw_only=True, slots=True)
class Reference:
    """The float64 run whose update the others are compared with."""

    accumulation_steps: int = 1
    """1: one shot."""
    parameters: int = 0
    """Numbers in the model's parameters."""
    problem: str | None = None
    """Why there is none, or None."""


@dataclass(kw_only=True, slots=True)
class Report:
    """What `compare.json` holds."""

    date: str
    command: str
    machine: str
    versions: dict[str, str]
    config: dict[str, Any]
    reference: Reference
    rows: list[Row]
    on_cuda: bool = False
    advice: list[str] = field(default_factory=list)
    """What to use here and why, a paragraph each."""
    seconds: float = 0.0
    """How long the comparison took."""

    @property
    def measured(self) -> list[Row]:
        """Rows that have been timed."""
        return [row for row in self.rows if row.is_measured]


def environment(module: str = "distaccum.compare") -> dict[str, Any]:
    """Date, command line (of a tool), machine and versions."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *redacted_arguments(sys.argv[1:])]),
        "machine": _machine(),
        "versions": {
            "distaccum": distaccum.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _machine() -> str:
    names = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    processor = names[0] if names else platform.processor() or platform.machine()
    cpu = f"{os.cpu_count()} × {processor}"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, {cpu}"
    return cpu
