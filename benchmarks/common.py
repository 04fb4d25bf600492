"""What all benchmarks share: their options, rows that are printed as they come, and one dated JSON file.

A benchmark of several ranks starts itself on them (`on_ranks`), and rank 0 sends its rows back (`send`).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distaccum.tools.bench.processes import Forked

RESULTS = Path(__file__).resolve().parent / "results"
NUMBER_WIDTH, TEXT_WIDTH = 9, 21
"""Columns are at least as wide: rows are printed before the next one is known. "-1.23e-16" has 9 characters."""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Of the processes that a benchmark starts."""

Row = dict[str, Any]


def arguments(description: str | None, *, quick: str, full: str) -> argparse.ArgumentParser:
    """Returns the parser of the options that all benchmarks have.

    Args:
        description: the benchmark's docstring.
        quick: how long it takes with --quick on two cores, as in "20 seconds".
        full: how long it takes without.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"small and few rounds: to see that it runs, in {quick}")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/NAME.json")
    parser.set_defaults(takes={True: quick, False: full})
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line, and says how long the benchmark takes."""
    options = parser.parse_args()
    print(f"This takes about {options.takes[options.quick]} on 2 cores with nothing else to do.", flush=True)
    return options


def show(title: str, rows: Iterable[Row]) -> list[Row]:
    """Prints rows as they come, whole columns however wide the terminal is; returns all rows."""
    found: list[Row] = []
    widths: list[int] = []
    print(f"\n{title}", flush=True)
    for row in rows:
        cells = list(map(_cell, row.values()))
        is_text = [isinstance(value, str) for value in row.values()]
        if not found:
            least = [TEXT_WIDTH if text else NUMBER_WIDTH for text in is_text]
            widths = [max(map(len, names)) for names in zip(row, cells, strict=True)]
            widths = [max(pair) for pair in zip(widths, least, strict=True)]
            _print_line(row, is_text, widths)
        _print_line(cells, is_text, widths)
        found.append(row)
    return found


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _print_line(cells: Iterable[str], is_text: list[bool], widths: list[int]) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # the line of `progress`
    padded = (
        f"{cell:<{width}}" if text else f"{cell:>{width}}"
        for cell, text, width in zip(cells, is_text, widths, strict=True)
    )
    print(" │ ".join(padded).rstrip(), flush=True)


def rounds(count: int, what: str) -> Iterator[int]:
    """Counts from 0, and shows each number as progress."""
    for number in range(count):
        progress(f"{what}: {number + 1} of {count}")
        yield number


def progress(what: str) -> None:
    """Shows on stderr what runs now; on a terminal in one line, which the next row takes the place of."""
    if _is_rank_0():
        line = f"\r\x1b[K{what}" if sys.stderr.isatty() else f"{what}\n"
        print(line, end="", file=sys.stderr, flush=True)


def write(description: str | None, rows: list[Row]) -> None:
    """Writes the rows to results/, with the question that the benchmark's docstring begins with."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "question": (description or "").splitlines()[0],
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }
    (RESULTS / f"{Path(sys.argv[0]).stem}.json").write_text(json.dumps(record, indent=2) + "\n")


def _command() -> str:
    """Returns the command that was given, as in the repository's folder."""
    script = Path(sys.argv[0]).resolve().relative_to(RESULTS.parent.parent)
    return " ".join(["python", str(script), *sys.argv[1:]])


def machine() -> str:
    """Returns the number and the name of the GPUs and their driver's version, or those of the CPU's cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, driver {driver()}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{os.cpu_count()} × {model}"


def driver() -> str:
    """Returns the version of NVIDIA's driver; "unknown" where its program `nvidia-smi` doesn't say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.splitlines()[0].strip() if said.strip() else "unknown"


def torchrun(world_size: int, *command: str) -> list[str]:
    """Returns the command that runs a script, or `-m MODULE`, on several ranks."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"),
        *command,
    ]


def on_ranks(world_size: int, script: str, *words: str, imports: Sequence[str] = ()) -> Iterator[Row]:
    """Runs `script rank WORDS…` on several ranks, or in one process without a launcher; returns the rows it sends.

    Ranks are forked from a process that has imported the script.

    Args:
        imports: modules that the script imports later: forked ranks have them from the start.

    Raises:
        SystemExit: a rank failed.
    """
    command = [script, "rank", *words]
    read, write = os.pipe()
    with open(read, encoding="utf-8") as lines:
        try:
            ranks = Forked(
                partial(_run_script, command),
                num_processes=world_size,
                threads=1,
                output=write,
                errors=sys.stderr.fileno(),
                imports=(Path(script).stem, *imports),
            )
        finally:
            os.close(write)
        try:
            yield from _rows(lines)
            while not ranks.has_ended(1.0):
                pass
        finally:
            ranks.stop(10.0)
    if ranks.status:
        raise SystemExit(f"exit status {ranks.status} of: {' '.join(command)}")


def _run_script(command: list[str]) -> int:
    sys.argv = command
    importlib.import_module(Path(command[0]).stem).main()
    return 0


def rank_words() -> list[str] | None:
    """Returns the words that `on_ranks` or `on_hosts` gave this process; None in one that a person has started."""
    return sys.argv[2:] if sys.argv[1:2] == ["rank"] else None


def send(row: Row) -> None:
    """Sends a row to the process that has started the ranks; from rank 0 alone."""
    if _is_rank_0():
        print(json.dumps(row), flush=True)


def rows_of(*commands: Sequence[str]) -> Iterator[Row]:
    """Runs commands at the same time; returns the rows that the first one sends, as they come.

    Raises:
        SystemExit: one of them failed.
    """
    with ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []
        for command in commands:
            output = subprocess.DEVNULL if processes else subprocess.PIPE
            process = subprocess.Popen(command, stdout=output, text=True, env=ENVIRONMENT)
            processes.append(stack.enter_context(process))
        try:
            yield from _rows(processes[0].stdout or ())
        except BaseException:
            for process in processes:
                process.terminate()
            raise
    for command, process in zip(commands, processes, strict=True):
        if process.returncode:
            raise SystemExit(f"exit status {process.returncode} of: {' '.join(command)}")


def _rows(lines: Iterable[str]) -> Iterator[Row]:
    """Returns what `send` has written; other lines are what libraries print."""
    return (json.loads(line) for line in lines if line.startswith('{"'))


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"
