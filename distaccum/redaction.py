"""Secrets, kept out of everything that a run writes."""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "<redacted>"

_OF_A_TOKENIZER = "".join(
    f"(?<!{kind}_)" for kind in ("pad", "eos", "bos", "unk", "mask", "sep", "cls", "start", "end", "image")
)
_SECRET_NAME = re.compile(
    rf"((api|access|secret|private|auth|signing)_?keys?|{_OF_A_TOKENIZER}token|secrets?|passwords?|passwd|passphrase|"
    r"credentials?)$",
    re.IGNORECASE,
)


def secrets() -> list[str]:
    """What the environment's variables hold whose names say that it is secret."""
    return [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8]


def secrets_in(value: Any, key: str = "") -> list[str]:
    """Texts in a configuration whose keys say that they are secret."""
    if isinstance(value, dict):
        return [secret for name, entry in value.items() for secret in secrets_in(entry, str(name))]
    if isinstance(value, list):
        return [secret for entry in value for secret in secrets_in(entry, key)]
    return [value] if isinstance(value, str) and len(value) >= 8 and _SECRET_NAME.search(key) else []


def redacted(value: Any, key: str = "") -> Any:
    """A configuration without secrets: texts under a name like `api_key`, or that an environment variable of such a
    name holds (`${oc.env:…}`)."""
    if isinstance(value, dict):
        return {name: redacted(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [redacted(entry, key) for entry in value]
    if isinstance(value, str) and value and (_SECRET_NAME.search(key) or any(s in value for s in secrets())):
        return REDACTED
    return value


def redacted_text(text: str, hidden: list[str]) -> str:
    """A text without the environment's secrets, and without others that are `hidden`."""
    for secret in (*secrets(), *hidden):
        text = text.replace(secret, REDACTED)
    return text


def redacted_arguments(arguments: list[str]) -> list[str]:
    """A command line without secrets."""
    texts = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_secret = bool(equals and value and _SECRET_NAME.search(name))
        texts.append(f"{name}={REDACTED}" if is_secret else redacted_text(argument, []))
    return texts
