"""One rank of one placement: measures what the tool asks for, and answers.

Every rank has its own connection to the tool, so that waiting for a command takes no time of CPU or GPU.
"""

from __future__ import annotations

import contextlib
import traceback
from multiprocessing.connection import Client
from pathlib import Path

from distaccum.config import TrainConfig, as_plain
from distaccum.config.redaction import hide, redacted_text
from distaccum.errors import UserError
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.diagnosis import is_broken_collective
from distaccum.runtime.memory import is_out_of_memory
from distaccum.runtime.world import World, joined_world
from distaccum.tools.bench.measurements import Measuring


def serve(address: str, config: TrainConfig, *, sync_every_step: bool, reference: Path) -> int:
    """Answers commands until the tool closes the connection: pairs of a method of `Measuring` and its arguments.

    An answer is what the method returns, or the `kind` of a failure and its `reason`. The first message is the rank.
    """
    hide(as_plain(config))
    measuring: Measuring | None = None
    with joined_world() as world, Client(address, "AF_UNIX") as connection:
        connection.send(world.rank)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                name, arguments = connection.recv()
                try:
                    if measuring is None:
                        measuring = _measuring(world, config, sync_every_step, reference)
                    answer = getattr(measuring, name)(**arguments)
                except Exception as error:
                    traceback.print_exc()
                    answer = _explain_failure(error)
                connection.send(answer)
    return 0


def _measuring(world: World, config: TrainConfig, sync_every_step: bool, reference: Path) -> Measuring:
    device = resolve_device(config.device, world.local_rank)
    world.init_process_group(device)
    return Measuring(
        config=config,
        device=device,
        rank=world.rank,
        world_size=world.world_size,
        sync_every_step=sync_every_step,
        reference=reference,
    )


def _explain_failure(error: BaseException) -> dict[str, str]:
    """Returns the kind of a failure (`user`, `memory`, `bug`, `died` of another rank), and a line that describes it."""
    line = redacted_text(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return {"kind": "user", "reason": line}
    if is_out_of_memory(error):
        return {"kind": "memory", "reason": f"out of memory: {line.partition('. ')[0]}" if line else "out of memory"}
    kind = "died" if is_broken_collective(error) else "bug"
    return {"kind": kind, "reason": f"{type(error).__name__}: {line}"[:400]}
