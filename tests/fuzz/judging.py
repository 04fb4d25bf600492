"""Runs random command lines, and says of each what is wrong with how it ended."""

from __future__ import annotations

import atexit
import collections
import functools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import forking  # noqa: E402
from command_line import TINY  # noqa: E402
from command_lines import Case, case  # noqa: E402

from distaccum.errors import one_line  # noqa: E402

LIMIT_SECONDS = 8.0
"""What a command may take before it is ended; one that is at work until then is right."""
_MAY_END_WITH = {"check": {0, 1, 2}, "memory": {0, 1, 2}}
"""Statuses; 1 says that updates are not equal, or that a model doesn't fit."""
_IMPORTED = ("with_transformers", "distaccum.data.tokenize", "distaccum.models", "distaccum.tasks")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a case ended.

    Attributes:
        status: None if it was ended at the limit.
        fault: what is wrong; None if nothing is.
    """

    seed: int
    case: Case
    status: int | None
    seconds: float
    fault: str | None
    out: str
    err: str

    def __str__(self) -> str:
        words = " ".join(word if len(word) < 200 else f"{word[:100]}…" for word in self.case.given)
        end = self.err if len(self.err) < 3000 else self.err[-3000:]
        return f"=== seed {self.seed}: {self.fault}\n{self.case.tool} {words}\nstatus {self.status}\n{end}\n"


def judged(seed: int, fixture: Path) -> Verdict:
    """Runs the case of a seed in a folder of its own, a copy of a prepared one."""
    found = case(seed)
    with tempfile.TemporaryDirectory(prefix="case-") as folder:
        place = Path(folder, "here")
        shutil.copytree(fixture, place)
        home = Path(folder, "home")
        home.mkdir()
        words = [word.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for word in found.words]
        begin = time.monotonic()
        running = started(found.tool, words, place, home)
        statuses = forking.Ended([-1], "", "")
        fault = None
        while running.poll() is None and time.monotonic() < begin + LIMIT_SECONDS:
            time.sleep(0.005)
        if running.poll() is None:
            fault = _idleness(place)
            for process in _working_in(place):
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            statuses = running.ended()
            return Verdict(seed, found, None, time.monotonic() - begin, fault, statuses.out, statuses.err)
        ended = running.ended()
        outside = sorted(path.name for path in Path(folder).iterdir() if path.name not in ("here", "home"))
        fault = f"wrote outside: {outside}" if outside else fault_of(found, ended.status, ended.out, ended.err)
        return Verdict(seed, found, ended.status, time.monotonic() - begin, fault, ended.out, ended.err)


def started(tool: str, words: list[str], folder: Path, home: Path) -> Any:
    variables = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TMPDIR": str(home),
    }
    return forking.start("-m", f"distaccum.{tool}", *words, folder=folder, imported=_IMPORTED, **variables)


def fault_of(found: Case, status: int, out: str, err: str) -> str | None:
    """What is wrong with an end; None if nothing is."""
    if "Traceback" in out + err:
        return "traceback"
    if status not in _MAY_END_WITH.get(found.tool, {0, 2}):
        return f"status {status}"
    if status != 2:
        return None
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    if len(said) != 1 or not err.endswith(f"{said[0]}\n"):
        return "not one message"
    if not any(_names(said[0], one_line(name)) for name in found.names):
        return "names no key"
    return None


def _names(message: str, name: str) -> bool:
    """Whether a message names a key: as a whole, or by its section and its last part, as `data: Coins: patch_size=-1`;
    of a component (`….  _target_`) by its section."""
    section, _, last = name.rpartition(".")
    if name in message or "out of memory" in message:
        return True
    if last == "_target_":
        return section in message
    return bool(section) and f"{section.partition('.')[0]}" in message and last in message


def _idleness(folder: Path) -> str | None:
    """What is wrong with a command that has not ended: it hangs. None if it, or what it has started, computes."""
    looks = [_is_at_work(folder) for _ in range(20) if not time.sleep(0.05)]
    return None if sum(looks) > 3 else "hangs"


def _is_at_work(folder: Path) -> bool:
    """Whether a process in a folder has, or waits for, a CPU."""
    for process in _working_in(folder):
        with suppress(OSError):
            for stat in Path(f"/proc/{process}/task").glob("*/stat"):
                if stat.read_text().rpartition(")")[2].split()[0] in "RD":
                    return True
    return False


def _working_in(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if Path(os.readlink(path)).is_relative_to(folder):
                found.append(int(path.parent.name))
    return found


@functools.cache
def fixture() -> Path:
    """A folder with what the commands on runs and texts need; it is removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="prepared-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):  # which is read where it is imported
        forking.run("-c", "", imported=_IMPORTED)
    making = "import tiny_language_model; tiny_language_model.tokenizer().save_pretrained('tokenizer')"
    saved = forking.start("-c", making, folder=folder, imported=_IMPORTED)
    words = [*TINY, "run_dir=run", "checkpoint.keep_best=1", "train.eval_every=1"]
    for ended in (started("train", words, folder, folder).ended(), saved.ended()):
        assert ended.status == 0, ended
    (folder / "empty").mkdir()
    (folder / "texts.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    return folder


def run(seeds: range, at_once: int = 2, echo: bool = False) -> list[Verdict]:
    """Runs the cases of seeds; returns what was found of each, in order."""
    place = fixture()
    verdicts = []
    with ThreadPoolExecutor(at_once) as pool:
        for verdict in pool.map(lambda seed: judged(seed, place), seeds):
            verdicts.append(verdict)
            if echo and verdict.fault:
                print(verdict, flush=True)
    return verdicts


def summary(verdicts: list[Verdict]) -> str:
    ends = collections.Counter(str(verdict.status) for verdict in verdicts)
    faults = sum(verdict.fault is not None for verdict in verdicts)
    counts = ", ".join(f"{count} with status {status}" for status, count in sorted(ends.items()))
    return (
        f"{len(verdicts)} command lines: {faults} faults; ended {counts.replace('status None', 'no end at the limit')}"
    )


def message_of(verdict: Verdict) -> str:
    """The message of a refusal."""
    return re.sub("^error: ", "", verdict.err.strip())


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="also what is right")
    given = parser.parse_args()
    verdicts = run(range(given.first, given.first + given.count), at_once=given.at_once, echo=True)
    if given.show:
        for verdict in verdicts:
            if verdict.fault is None:
                print(
                    f"{verdict.seed} {verdict.status} {verdict.seconds:.2f} {verdict.case.tool} "
                    f"{' '.join(word[:80] for word in verdict.case.given)!r} -> {message_of(verdict)[:300]!r}"
                )
    print(summary(verdicts))
    sys.exit(any(verdict.fault for verdict in verdicts))


if __name__ == "__main__":
    main()
