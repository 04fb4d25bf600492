"""The error type for everything that a user can mend."""

from __future__ import annotations

EXIT_STATUS = 2
"""Exit status of a run that ended with a `UserError`."""


class UserError(Exception):
    """Something the user asked for cannot be done: the message says what, what was given, and how to mend it.

    The entry points print the message alone and exit with status 2. Any other exception is a bug and keeps its
    traceback.
    """


class OtherRankFailedError(UserError):
    """This rank stops because another one did; that one has said why, so there is nothing to print."""
