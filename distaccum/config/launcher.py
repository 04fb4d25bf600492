"""Reads and checks the environment variables of a launcher."""

from __future__ import annotations

import os
from dataclasses import dataclass

from distaccum.errors import UserError

_STARTED_BY = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Launchers that don't set torchrun's variables, by the variable that counts their processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Values of torchrun's variables; the defaults are those of one process without a launcher."""

    is_launched: bool = False
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def launch() -> Launch:
    """Returns the rank of this process and the numbers of ranks.

    Raises:
        UserError: torchrun's variables are no ranks; or srun or mpirun has started several processes without them, each
            of which would train alone.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        for name, starter in _STARTED_BY.items():
            if (count := os.environ.get(name, "1")) != "1":
                raise UserError(
                    f"{starter} has started {count} processes ({name}) without ranks: each would train a model of "
                    f"its own. Have {starter} start one torchrun on each node, as launch/slurm does, "
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
