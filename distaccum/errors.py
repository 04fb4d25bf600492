"""The error type for everything that a user can mend."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence

EXIT_STATUS = 2
"""Exit status of a run that ended with a `UserError`."""

EXIT_UNFINISHED = 75
"""Exit status of a run that was asked to stop, has saved, and wants to be started again (`EX_TEMPFAIL` of sysexits)."""

EXIT_INTERRUPTED = 130
"""Exit status of a run that was stopped by Ctrl-C, as shells have it."""


class UserError(Exception):
    """Something the user asked for cannot be done: the message says what, what was given, and how to mend it.

    The entry points print the message alone and exit with status 2. Any other exception is a bug and keeps its
    traceback.
    """


class OtherRankFailedError(UserError):
    """This rank stops because another one did; that one has said why, so there is nothing to print."""


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text for a terminal: what would steer it, or turn the direction of writing, is spelt out.

    File names, what a checkpoint says and the texts of exceptions may be a stranger's.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def listed(names: Sequence[object], most: int = 8) -> str:
    """Names with commas between them, the first ones of many."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def asked_to_exit(error: SystemExit) -> UserError:
    """What to raise in place of an exit that a user's own code has asked for, and nobody else."""
    *_, place = traceback.extract_tb(error.__traceback__)
    return UserError(
        f"{place.filename}:{place.lineno} has asked to end the process, by sys.exit({error.code!r}), and the run is "
        'not done. Take that out; in a module that is a script too, put it under `if __name__ == "__main__":`.'
    )


def not_importable(who: str, package: str, error: BaseException) -> UserError:
    """What to raise where an example's package is missing, or can't be loaded although it is there."""
    mend = " Install it: pip install 'distaccum[examples]'" if isinstance(error, ModuleNotFoundError) else ""
    return UserError(f"{who} needs {package}, which cannot be imported ({type(error).__name__}: {error}).{mend}")


def is_one_value_per_channel(error: BaseException) -> bool:
    """Whether this is BatchNorm's refusal of a micro-batch that has one value per channel, as one sample has."""
    return isinstance(error, ValueError) and str(error).startswith("Expected more than 1 value per channel")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_at_least(minimum: float, **values: float | None) -> None:
    """Each value must be at least `minimum` or absent; `__` in a name stands for the dot of its key."""
    for name, value in values.items():
        key = name.replace("__", ".")
        require(value is None or value >= minimum, f"{key}={value} is impossible: it must be at least {minimum:g}.")


def require_positive(**values: float | None) -> None:
    for name, value in values.items():
        key = name.replace("__", ".")
        require(value is None or value > 0, f"{key}={value} is impossible: it must be greater than 0.")
