"""Asks object stores by fsspec: again where that may help, with a clear message where it doesn't."""

from __future__ import annotations

import errno
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from distaccum.config.redaction import redacted_text
from distaccum.errors import UserError

logger = logging.getLogger("distaccum.data")

T = TypeVar("T")

WAITS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try, of which up to a half is left out at random, so that ranks don't ask together."""
TIMEOUT = 60.0
"""Seconds that an answer may take, and one more for each megabyte that is asked for."""

_TRANSIENT_STATUS = (408, 425, 429)
_TRANSIENT_ERRNO = (
    *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
    *(errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETRESET),
)
# Each store's package has classes of its own for these, with one of the words in their names.
_TRANSIENT_NAMES = ("Timeout", "Connection", "Disconnected", "Payload", "IncompleteRead", "TransportError")

_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    "hf": "huggingface_hub",
}
_CREDENTIALS = {
    "s3fs": "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; of a public bucket FSSPEC_S3_ANON=true",
    "gcsfs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "adlfs": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY",
    "huggingface_hub": "HF_TOKEN, or `hf auth login`",
}

_kept: dict[tuple[int, int], Any] = {}
"""File systems, by process. Those of the parent are kept by its forks: if they were collected there, their connections
would be closed in a way that ends the parent's as well (both share what the system waits with)."""


@lru_cache(maxsize=4096)
def shown(path: str) -> str:
    """Returns an address for messages, without the passwords and signatures in it.

    What has been found is kept, as samples are named by it: finding it takes 0.3 ms.
    """
    return redacted_text(path)


def file_system(path: str) -> tuple[Any, str]:
    """Returns this process's file system of fsspec for an address, and the object's name in it.

    Raises:
        UserError: a package is missing, or there is no such kind of address.
    """
    scheme = path.rpartition("::")[2].partition("://")[0]
    try:
        import fsspec
    except ImportError as error:
        raise UserError(f"{shown(path)} needs fsspec ({error}): pip install 'distaccum[stores]'.") from error
    try:
        system, name = fsspec.core.url_to_fs(path)
        _kept[os.getpid(), id(system)] = system
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        mend = f"pip install {package}" if package else str(error)
        raise UserError(f"{shown(path)} needs a package that is missing or can't be imported: {mend}") from error
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol not known" in str(error):
            raise UserError(f"{shown(path)}: fsspec knows no addresses that begin with {scheme}://.") from error
        raise _refusal(path, error) from error
    return system, str(name)


def asked(path: str, ask: Callable[[Any, str], T]) -> T:
    """Returns what a file system answers about an object: `ask(file system, name)`.

    It is asked again, after longer and longer waits, while the reason of a failure may pass (connections that break,
    timeouts, statuses 408, 425, 429 and 5xx).

    Raises:
        UserError: it has failed for good; names the object and says what to do.
    """
    for tries, wait in enumerate((*WAITS, None), 1):
        try:
            with _random_state_kept():
                return ask(*file_system(path))
        except UserError:
            raise
        except Exception as error:
            if _kind(error) != "transient":
                raise _refusal(path, error) from error
            if wait is None:
                raise UserError(
                    f"{shown(path)} can't be read, also after {tries} tries: {_said(error)}. Start again when the "
                    "store can be reached: a run with checkpoints goes on from the last one."
                ) from error
            logger.log(
                logging.WARNING if tries > 1 else logging.DEBUG,
                "%s: %s; try %d of %d failed and is repeated",
                *(shown(path), _said(error), tries, len(WAITS) + 1),
            )
        time.sleep(wait * (0.5 + secrets.randbelow(1000) / 2000))
    raise AssertionError


def read_object(path: str, start: int, stop: int) -> bytes:
    """Returns the bytes `[start, stop)` of an object.

    Raises:
        UserError: it can't be read, or has other bytes than asked for.
    """
    if start >= stop:
        return b""

    def ask(system: Any, name: str) -> bytes:
        return bytes(system.cat_file(name, start=start, end=stop, **timed(system, stop - start)))

    found = asked(path, ask)
    if len(found) > stop - start:
        raise UserError(f"{shown(path)}: its server sends whole files, no parts of them. Copy it elsewhere.")
    if len(found) < stop - start:
        raise UserError(
            f"{shown(path)} ends at byte {start + len(found)}, before byte {stop}: it is not whole, or was replaced."
        )
    return found


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Puts the state of `random` back: packages of stores draw waits from it, while it belongs to the samples."""
    if threading.current_thread() is not threading.main_thread():
        yield  # samples are loaded meanwhile
        return
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def timed(system: Any, num_bytes: int = 0) -> dict[str, float]:
    """Returns the argument that limits how long a file system may take, of those that have one."""
    return {"timeout": TIMEOUT + num_bytes / 1e6} if getattr(system, "async_impl", False) else {}


def _kind(error: BaseException) -> str:
    """Returns `absent`, `denied`, `transient`, or `other`."""
    names = [base.__name__ for base in type(error).__mro__]
    if (status := _status(error)) is not None:
        if status in (401, 403, 407):
            return "denied"
        if status in (404, 410):
            return "absent"
        return "transient" if status in _TRANSIENT_STATUS or status >= 500 else "other"
    if any(word in name for name in names for word in _TRANSIENT_NAMES):
        return "transient"
    # Packages make errors of the system of them; fsspec says of any failure to learn a size that there is no such file.
    if isinstance(error, OSError) and error.__cause__ is not None and (kind := _kind(error.__cause__)) != "other":
        return kind
    if isinstance(error, FileNotFoundError):
        return "absent"
    if isinstance(error, PermissionError) or any("Credential" in name for name in names):
        return "denied"
    return "transient" if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO else "other"


def _status(error: BaseException) -> int | None:
    """Returns the status of the HTTP answer that an error comes from, in any of the forms that packages have."""
    response = getattr(error, "response", None)
    found = getattr(error, "status", None) or getattr(response, "status_code", None)
    if found is None and isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if found is None:
        found = getattr(error, "code", None)
    number = int(found) if isinstance(found, int | str) and str(found).isdecimal() else 0
    return number if 400 <= number < 600 else None


def _refusal(path: str, error: Exception) -> UserError:
    kind = _kind(error)
    if kind == "absent":
        return UserError(f"there is no object {shown(path)}. Check its address.")
    if kind == "denied":
        package = _PACKAGES.get(path.rpartition("::")[2].partition("://")[0], "")
        where = _CREDENTIALS.get(package, "an address with a signature, or fsspec's configuration")
        return UserError(f"access to {shown(path)} is denied: {_said(error)}. Give credentials for it: {where}.")
    return UserError(f"{shown(path)} can't be read: {_said(error)}.")


def _said(error: BaseException) -> str:
    error = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    text = " ".join(str(error).split())
    return redacted_text(f"{type(error).__name__}: {text}" if text else type(error).__name__)
