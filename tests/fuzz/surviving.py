"""Runs commands on what has been tampered with, and says of each what is wrong with how it ended."""

from __future__ import annotations

import atexit
import collections
import functools
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import forking  # noqa: E402
from tampering import READINGS, prepare, tamper  # noqa: E402

LIMIT_SECONDS = 5.0
"""What a command may take of its own: while it waits for a CPU that others have, the clock stands still."""
_MOST_SECONDS = 60.0
_IMPORTED = ("with_transformers", "distaccum.data.tokenize", "distaccum.models", "distaccum.tasks")
_SECRET = "of nobody's concern 4711"
OLD = 946684800
"""A time (2000) at which what lies outside was last read; reading it sets another one."""


@dataclass(frozen=True, slots=True)
class Survival:
    """How a command ended.

    Attributes:
        done: what was done to the files.
        fault: what is wrong; None if nothing is.
    """

    seed: int
    name: str
    done: str
    status: int
    fault: str | None
    out: str
    err: str

    def __str__(self) -> str:
        return (
            f"=== seed {self.seed}: {self.fault}\n{self.name}: {self.done}\nstatus {self.status}\n{self.err[-6000:]}\n"
        )


def survived(seed: int, name: str | None = None) -> Survival:
    """Tampers, as the seed says, with a copy of what a command reads, and runs the command."""
    name = name or random.Random(f"reading {seed}").choice(sorted(READINGS))
    reading = READINGS[name]
    with tempfile.TemporaryDirectory(prefix="tampered-") as folder:
        here, outside = Path(folder, "here"), Path(folder, "outside")
        shutil.copytree(fixture(), here, symlinks=True)
        outside.mkdir()
        (outside / "secret.json").write_text(f'{{"secret": "{_SECRET}"}}')
        done = tamper(here, reading, seed)
        for path in outside.iterdir():
            os.utime(path, (OLD, path.lstat().st_mtime)) if path.is_file() else None
        before = state(outside, reading.is_own)
        status, seconds, out, err = _run(here, reading.words)
        fault = _fault(status, out, err)
        if seconds > LIMIT_SECONDS:
            fault = f"took {seconds:.1f} s"
        if list(Path(folder).rglob("PWNED")):
            fault = "something ran"
        after = state(outside, reading.is_own)
        if after != before or {path.name for path in Path(folder).iterdir()} != {"here", "outside"}:
            fault = f"outside was read or written: {before} {after}"
        if _SECRET in out + err:
            fault = "a secret was shown"
        for path in here.rglob("*"):  # what has lost its permissions could not be removed
            with suppress(OSError):
                path.chmod(0o700) if not path.is_symlink() else None
        return Survival(seed, name, done, status, fault, out, err)


def state(folder: Path, may_be_read: bool) -> list[tuple[str, float, float, int]]:
    """Names, and when what they stand for was last read and written."""
    found = []
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        if not stat.S_ISDIR(about.st_mode):
            found.append((path.name, 0.0 if may_be_read else about.st_atime, about.st_mtime, about.st_size))
    return found


def _run(folder: Path, words: tuple[str, ...]) -> tuple[int, float, str, str]:
    command, *arguments = words
    running = start("-m", f"distaccum.{command}", *arguments, folder=folder)
    begin, worked = time.monotonic(), 0.0
    while running.poll() is None and worked < LIMIT_SECONDS + 1 and time.monotonic() < begin + _MOST_SECONDS:
        time.sleep(0.01)
        worked += 0.01 if not _waits_for_a_cpu(running.pid) else 0.0
    if running.poll() is None:
        with suppress(OSError):
            os.killpg(running.pid, signal.SIGKILL)
    ended = running.ended()
    return ended.status, worked, ended.out, ended.err


def _waits_for_a_cpu(pid: int) -> bool:
    """Whether other processes keep it from going on, or may do so: it sleeps for nothing."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R" and os.getloadavg()[0] > 3
    return False


def _fault(status: int, out: str, err: str) -> str | None:
    if "Traceback" in out + err:
        return "traceback"
    if status not in (0, 2):
        return f"status {status}"
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    if status == 2 and (len(said) != 1 or not err.endswith(f"{said[0]}\n")):
        return "not one message"
    return "too long a message" if any(len(line) > 5000 for line in (*said, *out.splitlines())) else None


def start(*words: str, folder: Path) -> forking.Running:
    path = os.pathsep.join([forking.environment()["PYTHONPATH"], str(HERE)])
    here = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    return forking.start(*words, folder=folder, imported=_IMPORTED, PYTHONPATH=path, HF_HUB_OFFLINE="1", **here)


@functools.cache
def fixture() -> Path:
    """A folder with what the commands read; it is removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="prepared-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):  # which is read where it is imported
        forking.run("-c", "", imported=_IMPORTED)
    prepare(folder, start)
    return folder


def run(seeds: Iterable[int], name: str | None = None) -> Iterator[Survival]:
    """Yields what becomes of seeds, in order."""
    for seed in seeds:
        yield survived(seed, name)


def summary(found: list[Survival]) -> str:
    ends = collections.Counter(entry.status for entry in found)
    faults = sum(entry.fault is not None for entry in found)
    return (
        f"{len(found)} tampered: {faults} faults; {', '.join(f'{n} with status {s}' for s, n in sorted(ends.items()))}"
    )


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--name", choices=sorted(READINGS), help="what alone is tampered with")
    parser.add_argument("--show", action="store_true", help="also what is right")
    given = parser.parse_args()
    found = []
    for entry in run(range(given.first, given.first + given.count), name=given.name):
        found.append(entry)
        if entry.fault:
            print(entry, flush=True)
        elif given.show:
            print(
                f"{entry.seed} {entry.status} {entry.name}: {entry.done} -> {(entry.err or entry.out[-200:])[:400]!r}",
                flush=True,
            )
    print(summary(found))
    sys.exit(any(entry.fault for entry in found))


if __name__ == "__main__":
    main()
