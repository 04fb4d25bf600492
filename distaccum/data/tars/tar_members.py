"""Reads where the members of a tar file lie, by its headers alone: ustar, GNU and pax forms."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from distaccum.errors import UserError

BLOCK = 512
_LONGEST_NAME = 1 << 20
_MOST_AFTER_END = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ\0": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "a part of a file that began in another archive",
}


class Member(NamedTuple):
    """A file in a tar file: its name, and the bytes `[offset, offset + size)` that it has there."""

    name: str
    offset: int
    size: int


def members_of(file: BinaryIO, path: str) -> Iterator[Member]:
    """Yields the files in a tar file in their order; its folders are passed over.

    Args:
        file: the tar file, which can seek; whoever iterates may seek in it between members.
        path: its name, for messages.

    Raises:
        UserError: it is compressed, damaged, cut off or no tar file, or it has members that are no plain files.
    """
    length = file.seek(0, os.SEEK_END)
    position, extended = 0, dict[str, bytes]()
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if position == 0:
            _check_first(header, path)
        if header.count(0) == BLOCK:
            _check_end(file, path)
            return
        name, size, kind = _fields(header, path, position)
        if "size" in extended and kind in (b"0", b"\0", b"7"):
            size = _number(extended["size"], path, position, base=10)
        position += BLOCK
        if position + size > length:
            raise UserError(
                f"{path} is cut off: its member {name} would end at byte {position + size}, and it has {length}. Make "
                "it anew, or copy it again."
            )
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            if size > _LONGEST_NAME:
                raise UserError(f"{path} is damaged: at byte {position} it has a name of {size} bytes.")
            if kind == b"L":
                extended["path"] = file.read(size).rstrip(b"\0")
            elif kind in (b"x", b"X"):
                extended |= _records(file.read(size), path, position)
        else:
            name = extended["path"].decode("utf-8", "surrogateescape") if "path" in extended else name
            if any(key.startswith("GNU.sparse") for key in extended):
                kind = b"S"
            is_folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
            if not is_folder:
                if kind not in (b"0", b"\0", b"7"):
                    what = _KINDS.get(kind, f"of the unknown type {kind!r}")
                    raise UserError(
                        f"{path}: its member {name} is {what}. Put plain files into it (tar --dereference)."
                    )
                yield Member(name, position, size)
            extended = {}
        position += -(-size // BLOCK) * BLOCK


def name_at(header: bytes) -> str:
    """Returns the name in a member's header, which is only its beginning if it is a long one."""
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    # GNU's own form has other fields where ustar has the prefix.
    whole = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
    return whole.decode("utf-8", "surrogateescape")


def _fields(header: bytes, path: str, position: int) -> tuple[str, int, bytes]:
    if len(header) < BLOCK:
        raise UserError(f"{path} is cut off at byte {position + len(header)}: it has no end mark. Make it anew.")
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156], path, position) != checksum:
        raise UserError(f"{path} is damaged: at byte {position} there should be a header. Make it anew.")
    return name_at(header), _number(header[124:136], path, position), header[156:157]


def _number(field: bytes, path: str, position: int, base: int = 8) -> int:
    try:
        if field[:1] == b"\x80":  # GNU's form of large numbers
            return int.from_bytes(field[1:], "big")
        return int(field.partition(b"\0")[0].strip() or b"0", base)
    except ValueError:
        raise UserError(f"{path} is damaged: the header at byte {position} has the number {field!r}.") from None


def _records(data: bytes, path: str, position: int) -> dict[str, bytes]:
    """Returns what a pax header says: records `LENGTH KEY=VALUE`, each ending with a line break."""
    found: dict[str, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        count = int(length) if length.isdigit() else 0
        key, is_one, value = data[len(length) + 1 : count - 1].partition(b"=")
        if not is_one or data[count - 1 : count] != b"\n":
            raise UserError(f"{path} is damaged: the pax header at byte {position} can't be read.")
        found[key.decode("utf-8", "surrogateescape")] = value
        data = data[count:]
    return found


def _check_first(header: bytes, path: str) -> None:
    if not header:
        raise UserError(f"{path} is empty, and no tar file.")
    for start, mend in _COMPRESSED.items():
        if header.startswith(start):
            raise UserError(
                f"{path} is compressed, so that no sample in it can be read without all before it. Decompress it once "
                f"({mend} FILE); images hardly get smaller by it."
            )
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if header.count(0) < len(header):
            raise UserError(f"{path} is no tar file ({error}).") from None


def _check_end(file: BinaryIO, path: str) -> None:
    """Refuses archives that were put end to end, of which programs read the first one only."""
    rest = file.read(_MOST_AFTER_END)
    if rest.strip(b"\0"):
        raise UserError(
            f"{path} goes on after its end mark. Archives that were put end to end are not supported: give each as a "
            "file of its own."
        )
