"""One rank of one placement, in a process of its own: measures what the tool asks for, and answers.

Started by `distaccum.tools.bench.sessions` as `python -m distaccum.tools.bench.worker JOB`, under torchrun if there are
several ranks. Every rank has its own connection to the tool, so that waiting for a command takes no time of CPU or GPU.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from distaccum.config.redaction import hide, redacted_text
from distaccum.errors import UserError
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.diagnosis import is_broken_collective
from distaccum.runtime.logs import make_output_safe
from distaccum.runtime.world import World, joined_world
from distaccum.tools.bench.measurements import Measuring
from distaccum.tools.bench.portable import from_portable


def explain_failure(error: BaseException) -> tuple[str, str]:
    """Returns the kind of a failure (`user`, `memory`, `bug`, `died` of another rank), and a line that describes it."""
    line = redacted_text(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return "user", line
    is_full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line
    if is_full:
        return "memory", f"out of memory: {line.partition('. ')[0]}" if line else "out of memory"
    return "died" if is_broken_collective(error) else "bug", f"{type(error).__name__}: {line}"[:400]


def _serve(world: World, job: dict[str, Any], connection: socket.socket) -> None:
    """Answers commands until the last one."""
    measuring: Measuring | None = None
    with connection.makefile("rw", encoding="utf-8", newline="\n") as stream:

        def send(**answer: Any) -> None:
            stream.write(json.dumps(answer) + "\n")
            stream.flush()

        send(rank=world.rank, pid=os.getpid())
        for text in stream:
            command = json.loads(text)
            name = command.pop("do")
            if name == "end":
                return
            try:
                if measuring is None:
                    measuring = _measuring(world, job)
                send(ok=True, **getattr(measuring, name)(**command))
            except Exception as error:
                traceback.print_exc()
                kind, reason = explain_failure(error)
                send(ok=False, kind=kind, reason=reason)


def _measuring(world: World, job: dict[str, Any]) -> Measuring:
    config = from_portable(job["config"])
    device = resolve_device(config.device, world.local_rank)
    world.init_process_group(device)
    return Measuring(
        config=config,
        device=device,
        rank=world.rank,
        world_size=world.world_size,
        sync_every_step=job["sync_every_step"],
        reference=Path(job["reference"]),
    )


def main(job_file: str) -> None:
    """Works through one job, whose file names the socket of the tool."""
    make_output_safe()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    hide(job["config"])
    torch.set_num_threads(job["threads"])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(job["socket"])
        with joined_world() as world:
            _serve(world, job, connection)


if __name__ == "__main__":
    main(sys.argv[1])
