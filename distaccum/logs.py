"""Where messages go: one console, on rank 0; one file per rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from distaccum.errors import UserError

LOGGER_NAME = "distaccum"

console = Console(file=None, highlight=False, soft_wrap=True)
"""Standard output, shared by messages and the progress bar so that they don't write over each other."""


class _ConsoleHandler(logging.Handler):
    """Prints messages as they are, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        style = (
            "yellow" if record.levelno == logging.WARNING else "bold red" if record.levelno > logging.WARNING else ""
        )
        console.print(Text(self.format(record), style=style))


@contextmanager
def logging_to(run_dir: Path, rank: int) -> Iterator[logging.Logger]:
    """Sends the package's messages to `run_dir/logs/rank<rank>.log`, and to the console.

    Rank 0's console shows everything from INFO up; the other ranks' only warnings, with their rank in front. Files hold
    details too (DEBUG), and the traceback of an error that ends the run.

    Raises:
        UserError: the file can't be written.
    """
    logger = logging.getLogger(LOGGER_NAME)
    path = run_dir / "logs" / f"rank{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(path, encoding="utf-8")
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
    sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
