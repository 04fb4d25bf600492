"""What the launcher tells this process in its environment, read and checked in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass

from distaccum.errors import UserError

_STARTED_BY = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Who starts several processes without telling them what torchrun tells: the number of them → its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The names are those of torchrun's variables; one process alone without a launcher."""

    is_launched: bool = False
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def launch() -> Launch:
    """Says which rank of how many this process is.

    Raises:
        UserError: variables of torchrun's are no ranks; or srun or mpirun has started several processes, each of which
            would take itself for the only one.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        for name, starter in _STARTED_BY.items():
            if (count := os.environ.get(name, "1")) != "1":
                raise UserError(
                    f"{starter} has started {count} processes ({name}), which know nothing of each other: each would "
                    f"train a model of its own. Have {starter} start one torchrun on each node, as launch/slurm does, "
                    f"or unset {name} if that is what you want."
                )
        return Launch()
    world_size = _number("WORLD_SIZE", least=1)
    rank, local_rank = _number("RANK", below=world_size), _number("LOCAL_RANK", "0", below=world_size)
    here = _number("LOCAL_WORLD_SIZE", "1", least=1)
    return Launch(is_launched=True, rank=rank, local_rank=local_rank, world_size=world_size, local_world_size=here)


def _number(name: str, default: str = "", *, least: int = 0, below: int | None = None) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
        wanted = f"a whole number from {least} on" if below is None else f"a rank of WORLD_SIZE={below}"
        raise UserError(f"{name}={text!r} in the environment is not {wanted}: start with torchrun, or unset {name}.")
    return int(text)
