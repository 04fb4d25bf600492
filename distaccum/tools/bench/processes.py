"""Starts the processes of a tool, one for each rank, each with a job file, and waits for their end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start_worker(
    module: str,
    job: dict[str, Any],
    folder: Path,
    *,
    num_processes: int,
    threads: int,
    log: Path,
    is_apart: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts `python -m MODULE JOB`, under torchrun if there are several processes.

    Args:
        job: what the file JOB holds, as JSON, beside `threads`.
        folder: the folder of that file.
        threads: CPU threads of each process.
        log: the file for all output of the processes.
        is_apart: the processes get neither Ctrl-C nor the variables of Slurm.
    """
    file = folder / "job.json"
    file.write_text(json.dumps({**job, "threads": threads}), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = {
        **{name: value for name, value in os.environ.items() if not (is_apart and name.startswith("SLURM_"))},
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # What this process finds, its children find too: the package in a checkout, the user's own modules.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *(launcher if num_processes > 1 else ()), "-m", module, str(file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=is_apart,
            env=environment,
        )


def has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Returns whether a process has ended, after some seconds at most."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def log_of(path: Path) -> str:
    """Returns what processes have written; empty if there is nothing."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
