"""Starting `python -m distaccum.train` from a test, and judging how it ended."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forking

TESTS = Path(__file__).parent

TINY = [
    "data=synthetic",
    "data.input_shape=[4]",
    "data.num_samples=64",
    "model=mlp",
    "model.hidden_sizes=[8]",
    "batch.global_batch_size=16",
    "train.max_updates=3",
    "wandb.mode=disabled",
]
"""A run of 3 updates of 16 samples, 4 updates an epoch, that takes next to no time."""


@dataclass(frozen=True)
class Ended:
    """How a command line ended, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one message of a run that was refused: alone on standard error, with status 2 and no traceback."""
        assert self.status == 2, f"status {self.status}\n{self.out}{self.err}"
        assert "Traceback" not in self.out + self.err
        assert re.fullmatch("error: .+\n", self.err), self.err
        return self.err.removeprefix("error: ").removesuffix("\n")


def start(*arguments: str, tool: str = "train", folder: Path | None = None, **variables: str) -> Ended:
    """Runs `python -m distaccum.TOOL` in a process of its own, forked from one that has imported everything.

    Args:
        folder: the current one, unless it is the caller's.
        variables: of the environment, beside the caller's.
    """
    done = forking.run("-m", f"distaccum.{tool}", *arguments, folder=folder, **variables)
    return Ended(done.status, done.out, done.err)


def message_of_ranks(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of ranks that were refused, said once by all of them, with torchrun's own report set aside."""
    assert done.returncode != 0, done.stdout
    said = re.findall("^.*error: (.+)$", done.stdout + done.stderr, re.MULTILINE)
    assert len(said) == 1, f"{len(said)} messages\n{done.stdout}{done.stderr}"
    # A traceback is its head, indented lines, and the exception; torchrun writes one of its own.
    ends = re.findall(r"^Traceback .*\n(?:[ ].*\n)+(.*)$", done.stdout + done.stderr, re.MULTILINE)
    assert len(ends) == (done.stdout + done.stderr).count("Traceback (most recent call last)")
    assert all(end.startswith("torch.distributed.elastic.") for end in ends), done.stderr
    # What torchrun prints last, when it was the one that started them, has it again.
    assert f"traceback : {said[0]}\n====" in done.stderr or "Root Cause" not in done.stderr
    return str(said[0])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_measurements(line: dict[str, Any]) -> dict[str, Any]:
    """What of a line is the same whenever and wherever the run is made: all but times, waits and memory."""
    return {key: value for key, value in line.items() if not any(word in key for word in ("second", "memory", "wait"))}


def updates(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if "eval" not in line]


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if "eval" in line]


def files_below(folder: Path) -> set[str]:
    """Paths of all files, relative to the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
