"""One rank of one placement, in a process of its own: does what the tool says, and answers.

Started by `distaccum.tools.bench.sessions` as `python -m distaccum.tools.bench.worker JOB`, under torchrun if there are
several ranks. Every rank has a line of its own to the tool, so waiting for the next command costs nothing, on the
GPU neither.
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
    """Returns the kind of a failure (`user`, `memory`, `bug`, `died` of another rank), and one line that tells it."""
    line = redacted_text(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return "user", line
    is_full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line
    if is_full:
        return "memory", f"out of memory: {line.partition('. ')[0]}" if line else "out of memory"
    return "died" if is_broken_collective(error) else "bug", f"{type(error).__name__}: {line}"[:400]


def _obey(world: World, job: dict[str, Any], line: socket.socket) -> None:
    """Answers commands until there are no more."""
    measuring: Measuring | None = None
    with line.makefile("rw", encoding="utf-8", newline="\n") as talk:

        def say(**answer: Any) -> None:
            talk.write(json.dumps(answer) + "\n")
            talk.flush()

        say(rank=world.rank, pid=os.getpid())
        for text in talk:
            command = json.loads(text)
            name = command.pop("do")
            if name == "end":
                return
            try:
                if measuring is None:
                    measuring = _measuring(world, job)
                say(ok=True, **getattr(measuring, name)(**command))
            except Exception as error:
                traceback.print_exc()
                kind, reason = explain_failure(error)
                say(ok=False, kind=kind, reason=reason)


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
    """Works through one job, whose file says where the tool is to be found."""
    make_output_safe()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    hide(job["config"])
    torch.set_num_threads(job["threads"])
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(job["socket"])
        with joined_world() as world:
            _obey(world, job, line)


if __name__ == "__main__":
    main(sys.argv[1])
