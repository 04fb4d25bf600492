"""Tar files for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def tar_bytes(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Returns a tar file with members by their names."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], **how: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **how))
    return str(path)


def image_bytes(colour: tuple[int, int, int], form: str = "png", size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def write_images(folder: Path, counts: Sequence[int], num_classes: int = 3) -> list[str]:
    """Writes tar files with images whose red is their number, in the class of its remainder."""
    number, paths = 0, []
    for shard, count in enumerate(counts):
        members: dict[str, bytes] = {}
        for _ in range(count):
            members[f"{number:06d}.png"] = image_bytes((number, 0, 0))
            members[f"{number:06d}.cls"] = b"%d" % (number % num_classes)
            number += 1
        paths.append(write_tar(folder / f"shard-{shard:03d}.tar", members))
    return paths
