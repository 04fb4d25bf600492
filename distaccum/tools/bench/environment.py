"""Records how a tool's figures came about: date, command, machine and versions."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distaccum.config.basics import finite
from distaccum.config.redaction import redacted_arguments
from distaccum.errors import UserError
from distaccum.runtime.version import __version__


@dataclass(kw_only=True, slots=True)
class Circumstances:
    """The first part of every tool's results."""

    date: str
    command: str
    machine: str
    versions: dict[str, str]
    config: dict[str, Any]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Everything but the configuration, for a page."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [("command", self.command), ("date", self.date), ("machine", self.machine), ("versions", versions)]


def environment(module: str = "distaccum.compare") -> dict[str, Any]:
    """Returns date, command line of a tool, machine and versions."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *redacted_arguments(sys.argv[1:])]),
        "machine": _machine(),
        "versions": {
            "distaccum": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def refuse_other_results(run_dir: str | None, name: str, what: str) -> None:
    """Keeps a tool from overwriting earlier results.

    Raises:
        UserError: the folder has a file of that name, from another run of the tool (`what`: "tuning").
    """
    if run_dir is not None and os.path.exists(Path(run_dir) / name):
        raise UserError(
            f"run_dir={run_dir} holds the results of another {what}, which would be overwritten. Choose another "
            "folder, or remove that one."
        )


def as_json(found: Circumstances) -> str:
    """Returns results as JSON, which has no numbers that are not finite: they become null."""
    return json.dumps(finite(dataclasses.asdict(found)), indent=1, allow_nan=False) + "\n"


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
