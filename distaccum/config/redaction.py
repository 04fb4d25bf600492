"""Finds secrets, and keeps them out of everything that a run writes."""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "<redacted>"

_OF_A_TOKENIZER = "".join(
    f"(?<!{kind}[_-])" for kind in ("pad", "eos", "bos", "unk", "mask", "sep", "cls", "start", "end", "image")
)
_NAME = (
    rf"(?:(?:api|access|secret|private|auth|signing)[_-]?keys?|{_OF_A_TOKENIZER}token|secrets?|passwords?|passwd|"
    r"passphrase|credentials?|authorization|signature|pwd|(?<![a-z])(?:auth|pat|sig))"
)
_SECRET_NAME = re.compile(f"{_NAME}$", re.IGNORECASE)
_VALUE = r"""(?:"[^"\n]*"|'[^'\n]*'|(?:(?:basic|bearer|digest|token) +)?[^\s"'&,;})\]…]+)"""
_CREDENTIALS = re.compile(
    rf"""(?<=://)[^\s"'/?#]+(?=@)|"""  # of a URL
    rf"""(?P<name>{_NAME}["']?(?:=|: ?)){_VALUE}|(?P<kind>\bbearer +)[\w.~+/=-]{{8,}}""",
    re.IGNORECASE,
)

_READ = "DISTACCUM_SECRET_VARIABLES"
"""Environment variable with the names of the variables that `hide_variable` has hidden."""

_known: set[str] = set()


def hide_variable(name: str) -> None:
    """Makes the value of an environment variable a secret, here and in processes that this one starts."""
    os.environ[_READ] = ",".join(sorted({*os.environ.get(_READ, "").split(","), name} - {""}))


def hide(value: Any, key: str = "") -> None:
    """Makes values of a configuration secrets whose keys name one."""
    if isinstance(value, dict):
        for name, entry in value.items():
            hide(entry, key if _SECRET_NAME.search(key) else str(name))
    elif isinstance(value, list):
        for entry in value:
            hide(entry, key)
    elif value is not None and _SECRET_NAME.search(key):
        _known.add(str(value))


def secrets() -> list[str]:
    """Returns the secrets, the longest first: those that were hidden, and values of environment variables whose names
    say so. Paths are none, nor are texts of less than 8 characters, which would be found everywhere."""
    read = os.environ.get(_READ, "").split(",")
    named = {
        value
        for name, value in os.environ.items()
        if (_SECRET_NAME.search(name) or name in read) and not _is_path(value)
    }
    return sorted((value for value in named | _known if len(value) >= 8), key=len, reverse=True)


def _is_path(text: str) -> bool:
    return text.startswith("/") and os.path.exists("/" + text.split("/")[1])


def redacted(value: Any, key: str = "") -> Any:
    """Returns a configuration without secrets: values of keys like `api_key`, values that contain one of `secrets()`,
    and credentials in URLs and the like."""
    if isinstance(value, dict):
        return {name: redacted(entry, key if _SECRET_NAME.search(key) else str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [redacted(entry, key) for entry in value]
    if not value or isinstance(value, bool | float) or key == "_target_":
        return value
    text = str(value)
    is_secret = isinstance(value, str) or len(text) >= 8  # a shorter number may be a token's index
    if is_secret and (_SECRET_NAME.search(key) or any(secret in text for secret in secrets())):
        return REDACTED
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """Returns a text without `secrets()`, and without what follows `token=` or precedes the `@host` of a URL."""
    for secret in secrets():
        text = text.replace(secret, REDACTED)
    return _CREDENTIALS.sub(lambda found: (found["name"] or found["kind"] or "") + REDACTED, text)


def redacted_arguments(arguments: list[str]) -> list[str]:
    """Returns a command line without secrets."""
    parts = (argument.partition("=") for argument in arguments)
    return [
        f"{name}={REDACTED}" if value and _SECRET_NAME.search(name) else redacted_text(f"{name}{equals}{value}")
        for name, equals, value in parts
    ]
