"""Running checks on real ranks: many in one launch, each reported on its own.

A module of checks holds functions `check_*(world)`, which every rank calls in the order of the file. `cases(module,
world_sizes)` makes a pytest parameter of each, and `outcome` starts the ranks when the first of them is asked for.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import forking
import pytest

HERE = Path(__file__).parent
ROOT = forking.ROOT
_IMPORTED = dict.fromkeys(("checks_four_bit", "checks_language", "checks_lora"), ("with_transformers",))
"""What checks import that takes long."""


def names_of_checks(module: str) -> list[str]:
    tree = ast.parse((HERE / f"{module}.py").read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


def cases(module: str, world_sizes: tuple[int, ...] = (2, 4)) -> Any:
    return pytest.mark.parametrize(
        ("module", "world_size", "check"),
        [
            pytest.param(module, world_size, check, id=f"{check.removeprefix('check_')}-{world_size}-ranks")
            for world_size in world_sizes
            for check in names_of_checks(module)
        ],
    )


def torchrun(
    world_size: int, *command: str, cold: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command line under torchrun; returns the finished process with its output.

    Args:
        cold: as users start it, so that each process imports all it needs. Otherwise all are forked from one that has.
    """
    options = ("--standalone", f"--nproc_per_node={world_size}", *command)
    if not cold:
        ended = forking.run(*forking.torchrun(*options), **environment)
        return subprocess.CompletedProcess(options, ended.status, ended.out, ended.err)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=forking.environment(**environment),
    )


def forked(
    world_size: int, *command: str, launched: bool = True, imported: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Does what `torchrun` does, without torchrun. For whatever is not about the launcher: here rank 0 holds the store.

    Args:
        launched: tell the ranks which ones they are; False for a process that nobody launches.
        imported: as for `forking.start`.
    """
    ended = forking.run(*command, ranks=world_size, launched=launched, imported=imported, **environment)
    return subprocess.CompletedProcess(command, ended.status, ended.out, ended.err)


@functools.cache
def outcomes(module: str, world_size: int) -> dict[str, list[str]]:
    """What each check said on each rank: an empty string, or a traceback."""
    with tempfile.TemporaryDirectory() as folder:
        done = forked(world_size, str(HERE / "launching.py"), module, folder, imported=_IMPORTED.get(module, ()))
        reports = [Path(folder, f"rank{rank}.jsonl") for rank in range(world_size)]
        found: dict[str, list[str]] = {}
        for report in reports:
            for line in report.read_text().splitlines() if report.exists() else ():
                entry = json.loads(line)
                found.setdefault(entry["check"], []).append(entry["failure"])
    for name in names_of_checks(module):
        if len(found.get(name, [])) != world_size:
            found[name] = [*found.get(name, []), f"did not finish on all ranks:\n{done.stdout}{done.stderr}"]
    return found


def assert_passed(module: str, world_size: int, check: str) -> None:
    failures = [f"rank {rank}: {said}" for rank, said in enumerate(outcomes(module, world_size)[check]) if said]
    assert not failures, "\n".join(failures)


def _run_checks(module: str, folder: str) -> None:
    import torch

    from distaccum.runtime.world import joined_world

    torch.set_num_threads(1)
    checks = importlib.import_module(module)
    with joined_world() as world, open(Path(folder, f"rank{world.rank}.jsonl"), "a") as report:
        world.init_process_group(torch.device("cpu"))
        for name in names_of_checks(module):
            failure = ""
            try:
                torch.manual_seed(0)
                getattr(checks, name)(world)
            except Exception:
                failure = traceback.format_exc()
            report.write(json.dumps({"check": name, "failure": failure}) + "\n")
            report.flush()
            # A check that failed on one rank only would leave the others out of step: stop there.
            if any(world.gather(failure)):
                break


if __name__ == "__main__":
    _run_checks(*sys.argv[1:])
