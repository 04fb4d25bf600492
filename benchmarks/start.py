"""How long does a run take to start, and where does the time go?

    python benchmarks/start.py

The main command of the README on 4 ranks, and where the time of its ranks goes, of rank 0 and of the mean of the
others: functions of the package are timed from outside (`start_phases.py`), and time counts for the innermost of them.
CPU seconds are those of all threads of a rank. The time of the launcher is what passes before ranks are started and
after they have ended; its CPU seconds are in those of the commands alone. Medians over rounds.

Then the commands as a user types them, from the prompt to the prompt, and the CPU seconds of all their processes. The
first update of the main command is timed from the launcher's start to the end of the slowest rank's first update.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).resolve().parent
RANKS = 4
LAUNCHER = "launcher"
SMALL = ("model=mlp", "train.max_updates=3", "wandb.mode=disabled")
COMMANDS = (
    ("train", "--help"),
    ("train", "--cfg", "job"),
    ("train", "no_such_key=1"),
    ("check", "model=mlp"),
    ("memory", "model=mlp"),
    ("compare", "model=mlp", "compare.world_sizes=[1]"),
)
"""And `report`, of the run that was made before."""
_MISSED = 0.02
"""Part of a command's time that may be in no phase."""
_BY_LAUNCH = "the main command by distaccum.launch"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the main command."""

    first_update: float
    """Seconds from the start to the end of the first update, on the slowest rank."""
    before: float
    after: float
    """Seconds before ranks were started, and after the last one had ended."""
    ranks: list[dict[str, Any]]


def timed(command: Sequence[str], folder: Path, status: int = 0) -> tuple[float, float, float]:
    """Runs a command in a folder; returns when it was started, its seconds, and the CPU seconds of its processes.

    Raises:
        SystemExit: it ended with another status than expected.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds, after = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        raise SystemExit(f"exit status {done.returncode} of: {' '.join(command)}\n{done.stderr}")
    return started, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(ranks: int, folder: Path, *overrides: str) -> Run:
    """Runs the main command in a folder that is made for it.

    Raises:
        SystemExit: it failed, or its phases don't add up to its time.
    """
    folder.mkdir()
    words = [str(HERE / "start_phases.py"), str(folder), f"run_dir={folder / 'run'}", *overrides]
    command = common.torchrun(ranks, *words) if ranks > 1 else [sys.executable, *words]
    started, seconds, _ = timed(command, folder)
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    before = max(0.0, min(rank["started"] for rank in found) - started)
    after = started + seconds - max(rank["ended"] for rank in found)
    in_phases = before + sum(phase for phase, _ in found[0]["seconds"].values()) + after
    if abs(in_phases - seconds) > _MISSED * seconds:
        raise SystemExit(f"the phases are {in_phases:.2f} s, and the command took {seconds:.2f} s")
    return Run(
        first_update=max(rank["ends"]["rest of first update"] for rank in found) - started,
        before=before,
        after=after,
        ranks=found,
    )


def phases(runs: Sequence[Run]) -> Iterator[common.Row]:
    """Yields the seconds of each phase, in order."""
    yield _row(f"{LAUNCHER}, before", statistics.median(run.before for run in runs))
    for name in runs[0].ranks[0]["seconds"]:
        of_main = [run.ranks[0]["seconds"].get(name, (0.0, 0.0)) for run in runs]
        of_others = [rank["seconds"].get(name, (0.0, 0.0)) for run in runs for rank in run.ranks[1:]]
        yield _row(name, *_medians(of_main), *_medians(of_others))
    yield _row(f"{LAUNCHER}, after", statistics.median(run.after for run in runs))


def _medians(pairs: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    if not pairs:
        return None, None
    seconds, cpu_seconds = zip(*pairs, strict=True)
    return statistics.median(seconds), statistics.median(cpu_seconds)


def _row(
    phase: str,
    seconds: float | None,
    cpu: float | None = None,
    others: float | None = None,
    others_cpu: float | None = None,
) -> common.Row:
    return {"phase": phase, "rank 0 s": seconds, "rank 0 CPU s": cpu, "others s": others, "others CPU s": others_cpu}


def commands(
    runs: Sequence[Run], train: Sequence[str], folder: Path, *, rounds: int, is_quick: bool
) -> Iterator[common.Row]:
    """Yields what commands take.

    Args:
        train: the main command.
    """

    def row(command: str, seconds: float, cpu_seconds: float | None) -> common.Row:
        return {"command": command, "s": seconds, "CPU s": cpu_seconds}

    yield row("the main command, first update", statistics.median(run.first_update for run in runs), None)
    wanted = {"the main command, to the end": train}
    if not is_quick:
        wanted[_BY_LAUNCH] = _module("launch", f"--nproc_per_node={RANKS}")
    wanted |= {" ".join(words): _module(*words) for words in (COMMANDS[:1] if is_quick else COMMANDS)}
    if not is_quick:
        wanted["report RUN"] = _module("report", str(folder / "0" / "run"))
    for shown, command in wanted.items():
        status = 2 if "no_such_key=1" in command else 0
        took = [timed(command, folder, status)[1:] for _ in common.rounds(rounds, shown)]
        seconds, cpu_seconds = (statistics.median(values) for values in zip(*took, strict=True))
        # Nobody waits for the ranks of the fork server, so their CPU seconds can't be asked for.
        yield row(shown, seconds, None if shown == _BY_LAUNCH else cpu_seconds)


def _module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"distaccum.{name}", *words]


def main() -> None:
    parser = common.arguments(__doc__, quick="10 seconds", full="5 minutes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each command runs (default: %(default)s)")
    options = common.begin(parser)
    ranks, overrides = (1, SMALL) if options.quick else (RANKS, ())
    count = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        what = f"the main command on {ranks} ranks: run"
        runs = [run(ranks, folder / str(number), *overrides) for number in common.rounds(count, what)]
        rows = common.show("Where the time goes", phases(runs))
        train = _module("train", *overrides) if ranks == 1 else common.torchrun(ranks, "-m", "distaccum.train")
        rows += common.show("Commands", commands(runs, train, folder, rounds=count, is_quick=options.quick))
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()
