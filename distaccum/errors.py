"""Errors that a user can mend, and exit statuses."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence

EXIT_STATUS = 2
"""Exit status of a run that ended with a `UserError`."""

EXIT_UNFINISHED = 75
"""Exit status of a run that was stopped by a signal, has saved, and can be started again (`EX_TEMPFAIL` of
sysexits)."""

EXIT_INTERRUPTED = 130
"""Exit status of a run that was stopped by Ctrl-C, as in shells."""


class UserError(Exception):
    """Something that the user asked for is impossible: the message says what, what was given, and how to mend it.

    The entry points print the message alone and exit with status 2. Any other exception is a bug and keeps its
    traceback.
    """


class NonfiniteError(UserError):
    """A loss, a weight or a gradient is NaN or infinite: the run has diverged."""


class OtherRankFailedError(UserError):
    """This rank stops because another one did, which has printed the reason."""


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Returns a text for a terminal, with control characters and those that turn the direction of writing escaped.

    File names, values of a checkpoint and texts of exceptions may be a stranger's.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Returns a message as `printable` does, in one line: names of files may have line breaks."""
    return printable(text.strip()).replace("\n", "\\n")


def listed(names: Sequence[object], most: int = 8) -> str:
    """Returns names with commas between them; of many, the first ones and the number of the others."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def joined(names: Sequence[str]) -> str:
    """Returns names with commas between them and `and` before the last one."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def asked_to_exit(error: SystemExit) -> UserError:
    """Returns the error to raise when a user's own code has called for an exit."""
    *_, place = traceback.extract_tb(error.__traceback__)
    return UserError(
        f"{place.filename}:{place.lineno} has called sys.exit({error.code!r}) before the run was done. "
        'Remove that; in a module that is a script too, put it under `if __name__ == "__main__":`.'
    )


def not_importable(who: str, package: str, error: BaseException) -> UserError:
    """Returns the error to raise where an example's package is missing, or is installed and can't be loaded."""
    mend = " Install it: pip install 'distaccum[examples]'" if isinstance(error, ModuleNotFoundError) else ""
    return UserError(f"{who} needs {package}, which cannot be imported ({type(error).__name__}: {error}).{mend}")


def is_one_value_per_channel(error: BaseException) -> bool:
    """Returns whether this is BatchNorm's refusal of a micro-batch that has one value per channel, as one sample
    has."""
    return isinstance(error, ValueError) and str(error).startswith("Expected more than 1 value per channel")


def require(condition: bool, message: str) -> None:
    """Raises a `UserError` with this message unless a condition holds."""
    if not condition:
        raise UserError(message)


def require_at_least(minimum: float, **values: float | None) -> None:
    """Raises a `UserError` unless each value is None or at least `minimum`; `__` in a name is the dot of its key."""
    for name, value in values.items():
        key = name.replace("__", ".")
        require(value is None or value >= minimum, f"{key}={value} is impossible: it must be at least {minimum:g}.")


def require_positive(**values: float | None) -> None:
    """Raises a `UserError` unless each value is None or above 0; `__` in a name is the dot of its key."""
    for name, value in values.items():
        key = name.replace("__", ".")
        require(value is None or value > 0, f"{key}={value} is impossible: it must be greater than 0.")


def require_one_clipping(**values: float | None) -> None:
    """Refuses `clip_norm` beside `clip_value`, and either if it is not above 0; named like `require_positive`'s."""
    require_positive(**values)
    given = [f"{name.replace('__', '.')}={value}" for name, value in values.items() if value is not None]
    require(
        len(given) < 2,
        f"{' and '.join(given)} would clip the gradient twice, and the result depend on their order. Set one of them "
        "to null.",
    )
