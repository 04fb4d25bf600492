"""Do memory, threads and open files stay flat over a long training?

    python benchmarks/soak.py

  training   a CNN on the digits with two loader workers, an average of its weights, observers, an evaluation and a
             checkpoint every few updates
  streams    the same of lines of files, which two workers read forwards, pass after pass
  restarts   trainings in one process, each of which goes on from the last one's checkpoint for a few updates

A third of the time each, in a process of its own, which is watched from outside: a row is the least of each measure
within its interval, so that what comes and goes doesn't count.

  MiB, threads, files  of the process: resident memory, threads, open descriptors
  processes            it and its descendants
  MiB of workers       resident memory of its descendants

The second table is about what comes after the first third, in which caches fill. `growth` of memory is its trend by
least squares, over the whole time; that of a number, which moves by one or two all the time, is how far the least of
the second half is above the least of the first. Flat is memory that grows by less than 2 %, and a number that doesn't.
The exit status is 1 if something is not.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import common
import torch

MEASURES = ("MiB", "MiB of workers", "processes", "threads", "files")
PHASES = ("training", "streams", "restarts")
_FLAT = 0.02
"""Growth of memory, relative to what it was at first, that is flat."""
_OFTEN_SECONDS = 0.2
"""Between two looks."""

_ALL = [
    *("wandb.mode=disabled", "run_dir=run", "observers=[csv,tensorboard]", "train.ema.decay=0.99", "optim.lr=1e-4"),
    *("batch.global_batch_size=32", "batch.micro_batch_size=16", "data.num_workers=2", "train.eval_every=20"),
    *("checkpoint.every_updates=20", "checkpoint.keep_best=1", "schedule=constant", "train.epochs=1000000"),
]
_OF_PHASE = {
    "training": ["data=digits", "model=cnn"],
    "streams": [
        *(
            "data=stream",
            "data.files=lines-*.jsonl",
            "data.evaluation_samples=64",
            "data.buffer=50",
            "data.endless=true",
        ),
        *("data.transform={_target_: soak.sample, _partial_: true}", "model=mlp", "model.hidden_sizes=[32]"),
        *("model.input_shape=[16]", "model.num_classes=4"),
    ],
    "restarts": ["data=digits", "model=mlp", "data.num_workers=1"],
}


def sample(line: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Makes a sample of a line of the streams."""
    return torch.tensor(line["values"]), line["label"]


def write_lines(folder: Path) -> None:
    """Writes what the streams are read from."""
    for shard in range(4):
        generator = torch.Generator().manual_seed(shard)
        values = torch.randn(300, 16, generator=generator).tolist()
        lines = (json.dumps({"values": row, "label": number % 4}) for number, row in enumerate(values))
        (folder / f"lines-{shard}.jsonl").write_text("\n".join(lines) + "\n")


def work(phase: str) -> int:
    """Trains, in the current folder, until it is asked to stop."""
    from distaccum.config.compose import compose
    from distaccum.runtime.processes import signal_when_parent_ends
    from distaccum.training.run import train

    signal_when_parent_ends(signal.SIGTERM)
    print(json.dumps({"pid": os.getpid()}), flush=True)
    updates, step = (20, 20) if phase == "restarts" else (10**9, 0)
    while True:
        config = compose([*_ALL, *_OF_PHASE[phase], f"train.max_updates={updates}"])
        if train(config).interrupted is not None:
            return 0
        updates += step


def watched(phase: str, folder: Path, seconds: float, every: float) -> Iterator[common.Row]:
    """Runs a phase for a time; yields what was the least of each measure in each interval."""
    with (folder / "output").open("wb") as output:
        command = [sys.executable, str(Path(__file__).resolve()), "work", phase]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=output, cwd=folder, env=common.ENVIRONMENT, text=True
        )
    assert process.stdout is not None
    try:
        pid = json.loads(process.stdout.readline())["pid"]
        with open(os.devnull, "wb") as nowhere:
            drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=nowhere)
        begin = time.monotonic()
        end_of_interval = begin
        while end_of_interval < begin + seconds:
            end_of_interval += every
            looks = []
            while time.monotonic() < end_of_interval:
                time.sleep(_OFTEN_SECONDS)
                looks.append(_look(pid))
                if process.poll() is not None:
                    raise SystemExit(f"{phase} has ended:\n{(folder / 'output').read_text(errors='replace')}")
            least = {name: min(look[name] for look in looks) for name in MEASURES}
            yield {"phase": phase, "minutes": round((time.monotonic() - begin) / 60, 2), **least}
        _end(process, pid)
        drain.wait(60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _end(process: subprocess.Popen[str], pid: int) -> None:
    for _ in range(6):
        # A training that has made its last update ends as it would anyway, and the next one knows nothing of a signal.
        os.kill(pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return
    raise SystemExit("the training goes on after SIGTERM")


def _look(pid: int) -> common.Row:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while below := {child for child, parent in parents.items() if parent in family} - family:
        family |= below
    return {
        "MiB": _resident(pid),
        "MiB of workers": sum(_resident(child) for child in family - {pid}),
        "processes": len(family),
        "threads": _entries(pid, "task"),
        "files": _entries(pid, "fd"),
    }


def _resident(pid: int) -> float:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return 0.0


def _entries(pid: int, folder: str) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/{folder}"))
    return 0


def trends(rows: list[common.Row]) -> Iterator[common.Row]:
    """Yields how each measure of each phase goes on after the first third."""
    for phase in dict.fromkeys(row["phase"] for row in rows):
        fitted = [row for row in rows if row["phase"] == phase]
        fitted = fitted[len(fitted) // 3 :]
        minutes = [row["minutes"] for row in fitted]
        for measure in MEASURES:
            values = [float(row[measure]) for row in fitted]
            if "MiB" in measure:
                slope, intercept = statistics.linear_regression(minutes, values)
                first, growth = slope * minutes[0] + intercept, slope * (minutes[-1] - minutes[0])
                is_flat = growth <= first * _FLAT
            else:
                first = min(values[: len(values) // 2])
                growth = min(values[len(values) // 2 :]) - first
                is_flat = growth <= 0
            yield {
                "phase": phase,
                "measure": measure,
                "first": first,
                "growth": growth,
                "flat": "yes" if is_flat else "NO",
            }


def main() -> None:
    """Runs the phases one after another."""
    if sys.argv[1:2] == ["work"]:
        sys.exit(work(sys.argv[2]))
    parser = common.arguments(__doc__, quick="20 seconds", full="20 minutes")
    parser.add_argument("--minutes", type=float, default=20.0, help="in all, without --quick (default: 20)")
    options = common.begin(parser)
    seconds, every = (3.0, 1.0) if options.quick else (60 * options.minutes / len(PHASES), 1.2 * options.minutes)

    def rows() -> Iterator[common.Row]:
        for phase in PHASES:
            with tempfile.TemporaryDirectory() as name:
                write_lines(Path(name))
                yield from watched(phase, Path(name), seconds, every)

    found = common.show("Least of each interval", rows())
    ends = common.show("Trends", trends(found))
    if options.write:
        common.write(__doc__, [*found, *ends])
    if not options.quick and any(row["flat"] != "yes" for row in ends):
        sys.exit(1)


if __name__ == "__main__":
    main()
