"""Messages go to the console of rank 0 and to one file per rank. A failure to write them does not end a run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, cast

from rich.console import Console
from rich.text import Text

from distaccum.config.redaction import redacted_text
from distaccum.errors import UserError, one_line, printable
from distaccum.runtime.files import ends_within_line, opened, write_whole

LOGGER_NAME = "distaccum"


class _Descriptor(io.FileIO):
    """An open file that takes all that is written, and drops what it can't write: a batch job's output is often on the
    disk that the run fills; who reads it may have gone; its terminal may be closed."""

    lost: ClassVar[OSError | None] = None
    """The error for which output was dropped, unless its reader was gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                _Descriptor.lost = error
            return memoryview(data).nbytes


class _ErrorOutput(io.TextIOWrapper):
    def write(self, text: str) -> int:
        return super().write(redacted_text(text))


def make_output_safe() -> None:
    """Replaces standard output and error by streams that never fail: not on a full disk, without a reader, for a
    character outside their encoding, or because they were closed. Secrets are removed from standard error.

    Called first in a program. Streams that have been replaced before stay as they are.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # in the place of one that was closed, where the next file would get what is printed
    os.close(descriptor)
    for number, name, kind in ((1, "stdout", io.TextIOWrapper), (2, "stderr", _ErrorOutput)):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):
            with contextlib.suppress(AttributeError, OSError):  # None has nothing to flush
                before.flush()
            raw = _Descriptor(os.open(os.devnull, os.O_WRONLY) if before is None else number, "w", closefd=False)
            encoding = getattr(before, "encoding", "utf-8")
            setattr(sys, name, kind(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True))


class _StandardOutput:
    """Standard output, whatever it is at the time, without secrets."""

    def write(self, text: str) -> int:
        self._stream.write(redacted_text(text))
        return len(text)

    @property
    def _stream(self) -> Any:
        # While there is a progress bar, rich has put something before it that prints above the bar.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__()
        self._file = open(path, "ab+", buffering=0, opener=opened)  # noqa: SIM115 - closed by close()
        now, where = time.strftime("%Y-%m-%d %H:%M:%S"), f"process {os.getpid()} on {platform.node()}"
        self._head = f"==== {now} rank {rank} starts ({where}) ====\n"
        if ends_within_line(self._file):
            self._head = f"\n{self._head}"
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{printable(redacted_text(self.format(record)))}\n"
        except Exception:
            self.handleError(record)  # a message whose arguments don't fit it
            return
        if self._dropped:
            text = f"==== missing here, as they could not be written: {self._dropped} messages ====\n{text}"
        try:
            write_whole(self._file, (self._head + text).encode("utf-8", "backslashreplace"))
        except OSError:
            self._dropped += 1
        else:
            self._head, self._dropped = "", 0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        super().close()


@contextmanager
def logging_to(run_dir: Path, rank: int) -> Iterator[logging.Logger]:
    """Sends the package's messages to `run_dir/logs/rank<rank>.log`, and to the console.

    Rank 0's console shows everything from INFO up; the other ranks' only warnings, with their rank in front. Files hold
    details too (DEBUG), and the traceback of an error that ends the run; a run that goes on from another one in the
    same folder goes on with its files. While the disk is full, files miss messages; the run and its console go on.

    Raises:
        UserError: the file can't be written.
    """
    logger = logging.getLogger(LOGGER_NAME)
    path = run_dir / "logs" / f"rank{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = _FileHandler(path, rank)
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
    """Writes a user's error to standard error, as one line, alone and at once; torchrun's report gets it too."""
    message = one_line(redacted_text(message))
    tell_launcher(message)
    flush_output()
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()


def tell_launcher(reason: str) -> None:
    """Writes why this rank has failed into torchrun's report, which is printed last."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = redacted_text(reason).strip()
        about = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": reason, "extraInfo": about}}), encoding="utf-8")


def flush_output() -> None:
    """Writes out what is left for standard output and error, as far as there is room."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def check_printed() -> None:
    """Checks, at the end of a program, that all of its output was written.

    Raises:
        UserError: not all of it could be written.
    """
    flush_output()
    if _Descriptor.lost is not None:
        raise UserError(f"standard output can't be written: {_Descriptor.lost.strerror}.")
