"""`python -m torch.distributed.run …`, with ranks that it forks instead of starting Python for each: started by
`forking.start`, none of them imports anything. All else is torchrun's own.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
import traceback
from typing import Any

from forking import run_in_this_process
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.run import main

from distaccum.runtime.processes import name_process


class _Forked(subprocess.Popen):  # type: ignore[type-arg]
    """What `Popen` is to its caller, for a Python command and its environment."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        self.args = command
        self.stdin = self.stdout = self.stderr = None
        self.returncode = None
        self._waitpid_lock = threading.Lock()
        self._sigint_wait_secs = 0.25
        self._communication_started = False
        self._child_created = True
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become(command, variables)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(70)


def _become(command: list[str], variables: dict[str, str]) -> None:
    """Leaves of this process what another program would find that it starts, and runs the command."""
    gc.freeze()  # torchrun's own objects, whose files are closed here
    os.setsid()
    os.closerange(3, 1024)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # What the environment that /proc shows would tell.
    name_process(f"rank{variables['RANK']}")
    run_in_this_process(command, variables)


def _popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> _Forked:
    _, unbuffered, *command = args
    assert unbuffered == "-u", args
    return _Forked(command, env)


if __name__ == "__main__":
    SubprocessHandler._popen = _popen
    main()
