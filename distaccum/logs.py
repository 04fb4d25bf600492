"""Where messages go: one console, on rank 0; one file per rank. What they can't be written to does not end a run."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from distaccum.errors import UserError, printable
from distaccum.redaction import redacted_text

LOGGER_NAME = "distaccum"


class _StandardOutput:
    """Standard output, whatever it is at the time, without the errors of a full disk.

    A batch job's output is a file, often on the disk that the run fills.
    """

    def write(self, text: str) -> int:
        with _no_disk_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _no_disk_errors():
            self._stream.flush()

    @property
    def _stream(self) -> Any:
        # While there is a progress bar, rich has put something before it that prints above the bar.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _no_disk_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has gone, and ends the run that way
    except OSError:
        pass


console = Console(file=cast(IO[str], _StandardOutput()), highlight=False, soft_wrap=True)
"""Standard output, shared by messages and the progress bar so that they don't write over each other."""


class _ConsoleHandler(logging.Handler):
    """Prints messages as they are, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        style = (
            "yellow" if record.levelno == logging.WARNING else "bold red" if record.levelno > logging.WARNING else ""
        )
        console.print(Text(printable(self.format(record)), style=style))


class _FileHandler(logging.Handler):
    """Appends messages to a file, without secrets (an exception may hold one); messages that it can't be given are
    dropped, and counted once it can be written again.

    A line tells where a process begins: the runs of a folder that go on from one another share the file.
    """

    def __init__(self, path: Path, rank: int, hidden: Sequence[str]) -> None:
        super().__init__()
        self._rank = rank
        self._hidden = list(hidden)
        self._file = path.open("ab+", buffering=0)
        self._dropped = 0
        self._begun = False
        self._in_line = self._ends_in_line()

    def _ends_in_line(self) -> bool:
        """Whether the last process that wrote was killed in the middle of a line."""
        if not self._file.seek(0, io.SEEK_END):
            return False
        self._file.seek(-1, io.SEEK_END)
        return self._file.read(1) != b"\n"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            lines = [printable(redacted_text(self.format(record), self._hidden))]
        except Exception:
            self.handleError(record)  # a message whose arguments don't fit it
            return
        if not self._begun:
            now, where = time.strftime("%Y-%m-%d %H:%M:%S"), f"process {os.getpid()} on {platform.node()}"
            lines.insert(0, f"==== {now} rank {self._rank} starts ({where}) ====")
        if self._dropped:
            lines.insert(0, f"==== missing here, as they could not be written: {self._dropped} messages ====")
        try:
            self._write("".join(f"{line}\n" for line in lines))
        except OSError:
            self._dropped += 1
        else:
            self._begun, self._dropped = True, 0

    def _write(self, text: str) -> None:
        rest = memoryview((("\n" if self._in_line else "") + text).encode("utf-8", "backslashreplace"))
        while rest:
            written = self._file.write(rest)
            self._in_line = rest[written - 1] != ord("\n")
            rest = rest[written:]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        super().close()


@contextmanager
def logging_to(run_dir: Path, rank: int, hidden: Sequence[str] = ()) -> Iterator[logging.Logger]:
    """Sends the package's messages to `run_dir/logs/rank<rank>.log`, and to the console.

    Rank 0's console shows everything from INFO up; the other ranks' only warnings, with their rank in front. Files hold
    details too (DEBUG), and the traceback of an error that ends the run; a run that goes on from another one in the
    same folder goes on with its files. While the disk is full, files miss messages; the run and its console go on.

    Args:
        hidden: secrets besides those in the environment, which files are not to show.

    Raises:
        UserError: the file can't be written.
    """
    logger = logging.getLogger(LOGGER_NAME)
    path = run_dir / "logs" / f"rank{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = _FileHandler(path, rank, hidden)
    except OSError as error:
        raise UserError(
            f"the log {path} can't be written: {error.strerror or error}. Choose another folder with run_dir=…"
        ) from error
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_console = _ConsoleHandler()
    to_console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    to_console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(to_file)
    logger.addHandler(to_console)
    try:
        yield logger
    except Exception:
        # The console gets one message, from one rank; each rank's file says where it came from.
        logger.debug("the run ended with an error", exc_info=True)
        raise
    finally:
        for handler in (to_file, to_console):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


def print_error(message: str) -> None:
    """Writes a user's error to standard error, alone and at once."""
    flush_output()
    with _no_disk_errors():
        sys.stderr.write(f"error: {printable(message)}\n")
        sys.stderr.flush()


def flush_output() -> None:
    """Writes out what is left for standard output and error, or lets go of it where there is no room.

    To be called before a process ends: Python's own flush would turn its exit status into 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
