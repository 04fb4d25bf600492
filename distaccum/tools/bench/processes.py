"""The processes that a tool starts: one for each rank, told what to do by a file, and ended without fail."""

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
    told: dict[str, Any],
    folder: Path,
    *,
    num_processes: int,
    threads: int,
    log: Path,
    is_apart: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts `python -m MODULE JOB`, under torchrun if there are several processes.

    Args:
        told: what the file JOB holds, as JSON; `threads` too.
        folder: for that file.
        threads: on the CPU, of each process.
        log: where everything goes that the processes write.
        is_apart: Ctrl-C, and what Slurm says, is for the tool alone.
    """
    file = folder / "job.json"
    file.write_text(json.dumps({**told, "threads": threads}), encoding="utf-8")
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
    """Whether a process is gone, after some seconds at most."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def log_of(path: Path) -> str:
    """What processes have written; empty if there is nothing."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
