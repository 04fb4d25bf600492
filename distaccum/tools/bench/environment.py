"""Where a tool's figures were taken: date, command, machine and versions."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import distaccum
from distaccum.config.redaction import redacted_arguments


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
