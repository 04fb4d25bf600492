"""Runs a function in processes of its own, one for each rank."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

KILLED = "killed by signal 9: out of memory, most likely"


class Ranks:
    """Processes that run a function, under torchrun if there are several.

    They get neither Ctrl-C nor the variables of Slurm: whoever has started them has to stop them.

    Args:
        run: returns the exit status. A function of a module, or a `partial` of one: it is pickled.
        threads: CPU threads of each process.
        log: the file for all output of the processes; what it holds already stays.
    """

    def __init__(self, run: Callable[[], int], *, num_processes: int, threads: int, log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="distaccum-")
        job = Path(self._folder.name) / "job.pickle"
        job.write_bytes(pickle.dumps((threads, run)))
        command = ["-m", "distaccum.tools.bench.rank", str(job)]
        if num_processes > 1:
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", *command]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "OMP_NUM_THREADS": str(threads),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            # What this process finds, its children find too: the package in a checkout, the user's own modules.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Returns whether all have ended, after some seconds at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def stop(self, seconds: float) -> None:
        """Sends SIGTERM to those that have not ended, and kills them if that takes longer than some seconds."""
        if not self.has_ended():
            self._process.terminate()
        if not self.has_ended(seconds):
            self._process.kill()  # ranks get SIGTERM from the kernel when torchrun is killed
            self._process.wait()
        self._folder.cleanup()

    def failure(self) -> str | None:
        """Returns why they have ended with an error, from their output; None if they have not."""
        status = self._process.returncode
        if status == 0:
            return None
        text = self._log.read_bytes()[self._log_start :].decode(errors="replace")
        if status == -signal.SIGKILL or "Signal 9" in text or "exitcode  : -9" in text:
            return KILLED
        lines = [line for line in text.splitlines() if "rror: " in line and not line[0].isspace()]
        # torchrun's own report comes last and holds less.
        said = [line for line in lines if "ChildFailedError" not in line]
        own = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        return (own or said or [f"it ended with status {status}; its output is in {self._log}"])[0][:400]
