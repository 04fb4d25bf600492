"""torchruns and launchers that are killed, or whose ranks are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import forking
from zygote import free_port

PATIENCE_SECONDS = 240.0


class Agent:
    """A torchrun with its ranks.

    Args:
        command: options of torchrun and what it is to run.
        folder: the current one.
        name: of the file in the folder that gets all output.
        launcher: `distaccum.launch` in torchrun's place.
        variables: of the environment.
    """

    def __init__(
        self,
        *command: str,
        folder: Path,
        name: str = "output",
        launcher: bool = False,
        **variables: str,
    ) -> None:
        self._said = folder / name
        self._has_server = launcher
        self.process = forking.start(
            *(("-m", "distaccum.launch", *command) if launcher else forking.torchrun(*command)),
            folder=folder,
            said=self._said,
            **variables,
        )

    @property
    def output(self) -> str:
        return self._said.read_text(errors="replace")

    def workers(self) -> dict[int, int]:
        """Process numbers of this agent's ranks, by rank."""
        found = {}
        children = _children(self.process.pid)
        if self._has_server:
            children = [grandchild for child in children for grandchild in _children(child)]
        for pid in children:
            with suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if name.startswith("rank"):
                    found[int(name.removeprefix("rank"))] = pid
        return found

    def kill_all(self) -> None:
        """Kills the agent with its ranks, as the loss of their host does. Nothing to do if they have ended."""
        for pid in [self.process.pid, *self.workers().values()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _children(parent: int) -> list[int]:
    """Those that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, its_parent, *_ = status.read_text().rpartition(")")[2].split()
            if int(its_parent) == parent and state != "Z":
                found.append(int(status.parent.name))
    return found


def elastic_options(agents: int, nodes: str) -> list[list[str]]:
    """Options of torchrun for several agents on this host with one rank each.

    Args:
        nodes: the number of agents, or the fewest and the most.
    """
    endpoint = f"127.0.0.1:{free_port()}"
    return [
        [
            f"--nnodes={nodes}",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            "--rdzv-id=elastic",
            # Who is left waits so long for others before it goes on alone; torchrun's own keep-alive comes to 15 s.
            f"--rdzv-conf=is_host={int(agent == 0)},last_call_timeout=5",
            "--local-addr=127.0.0.1",
        ]
        for agent in range(agents)
    ]


def wait_for(condition: Callable[[], bool], agents: Sequence[Agent], *, may_end: bool = False) -> None:
    """Waits until something has come about; fails with what the agents have said if it doesn't, or if one ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        said = "\n".join(agent.output for agent in agents)
        assert time.monotonic() < deadline, said
        assert may_end or all(agent.process.poll() is None for agent in agents), said
        time.sleep(0.01)
