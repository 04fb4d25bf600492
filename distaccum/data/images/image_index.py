"""The files below class folders and the images that can't be read, both kept for the next start.

A folder is listed again when its time of change is another one: listing a million files takes a while, comparing the
times of their folders does not.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

from rich.progress import Progress

from distaccum.data.images.image_files import image_extensions, read_rgb
from distaccum.errors import UserError
from distaccum.runtime.cache import Remembered, fingerprint
from distaccum.runtime.logs import console

logger = logging.getLogger("distaccum.data")

_GRAIN_NS = 2_000_000_000
"""Changes that follow each other in less than this may have the same time, on some file system."""
_SAVE_EVERY_SECONDS = 60.0
_TOGETHER = 512


@dataclass(slots=True)
class Folder:
    """Lists what is in one folder, without names that begin with a dot.

    Attributes:
        listed: when it was listed, in nanoseconds.
        changed: its time of change then; None if that was too short a time before to tell the next change by it.
        files: sorted names of its files.
        folders: sorted names of its folders, and of links to some.
        links: real path of each file that is a link, by name.
        unseen: sorted names of files that have not been looked at; None: all of them.
        damaged: why an image can't be read, by its name.
    """

    listed: int
    changed: int | None
    files: list[str]
    folders: list[str]
    links: dict[str, str]
    unseen: list[str] | None = None
    damaged: dict[str, str] = field(default_factory=dict)

    def image_paths(self, real: str) -> Iterator[tuple[str, str]]:
        """Yields each file's name and real path; `real` is the folder's."""
        prefix = real if real.endswith("/") else f"{real}/"
        for name in self.files:
            yield name, self.links.get(name) or prefix + name


@contextmanager
def image_index(root: str | os.PathLike[str]) -> Iterator[ImageIndex]:
    """Opens the index of a folder, and keeps it for the next start.

    Meanwhile other processes that want it wait, so that of the ranks of a host one does the work.
    """
    remembered = Remembered(f"images-{fingerprint(os.path.realpath(root))}")
    with remembered.held():
        index = ImageIndex(remembered)
        try:
            yield index
        finally:
            index.save()


class ImageIndex:
    """The files below a folder, from the cache where nothing has changed."""

    def __init__(self, remembered: Remembered) -> None:
        self._remembered = remembered
        self._folders = _folders_in(remembered.read())
        self._known = set[str]()
        self._is_new = False

    def files_below(self, folder: str) -> list[tuple[str, str]]:
        """Returns real path and path of all files at any depth, sorted by path; follows links, each file once.

        Raises:
            UserError: a folder can't be listed.
        """
        found: dict[str, str] = {}
        start, seen = os.path.realpath(folder), set[str]()
        ahead = [folder]
        while ahead:
            parent = ahead.pop()
            real = os.path.realpath(parent)
            if real in seen or os.path.commonpath([real, start]) == real != start:
                continue  # a link to a folder that is or was walked through
            seen.add(real)
            entry = self._folder(real)
            for name, path in entry.image_paths(real):
                found.setdefault(path, f"{parent}/{name}")
            ahead += [f"{parent}/{name}" for name in reversed(entry.folders)]
        # By the parts of the path, as "a/x" comes before "a-b/x".
        return sorted(found.items(), key=lambda item: item[1].replace("/", "\0"))

    def damaged(self) -> dict[str, str]:
        """Looks at the images of all folders that were listed, if it has not been done; those that couldn't be read are
        looked at again.

        Returns:
            Why an image can't be read, by its real path.
        """
        extensions = image_extensions()
        ahead: list[tuple[Folder, str, str]] = []
        for real in sorted(self._known):
            entry = self._folders[real]
            names = set(entry.files if entry.unseen is None else entry.unseen) | entry.damaged.keys()
            paths = dict(entry.image_paths(real)) if names else {}
            images = [name for name in sorted(names) if os.path.splitext(name)[1].lower() in extensions]
            ahead += [(entry, name, paths[name]) for name in images]
        self._look_at(ahead)
        reasons: dict[str, str] = {}
        for real in self._known:
            entry = self._folders[real]
            paths = dict(entry.image_paths(real)) if entry.damaged else {}
            reasons |= {paths[name]: reason for name, reason in entry.damaged.items()}
        return reasons

    def save(self) -> None:
        """Keeps it for the next start, if it has changed."""
        if self._is_new:
            self._remembered.write({real: astuple(self._folders[real]) for real in sorted(self._known)})
        self._is_new = False

    def _folder(self, real: str) -> Folder:
        before = self._folders.get(real)
        if real not in self._known:
            self._known.add(real)
            if before is None or before.changed is None or before.changed != os.stat(real).st_mtime_ns:
                self._folders[real] = _listed(real, before)
                self._is_new = True
        return self._folders[real]

    def _look_at(self, ahead: Sequence[tuple[Folder, str, str]]) -> None:
        """Reads images in as many threads as there are processors; Pillow decodes beside other threads."""
        if not ahead:
            return
        logger.info("looking at %d images, to find damaged ones (data.on_damaged=late: without)", len(ahead))
        noted, saved = 0, time.monotonic()
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        ):
            shown = bar.add_task("looking at images", total=len(ahead))
            for start in range(0, len(ahead), _TOGETHER):
                some = ahead[start : start + _TOGETHER]
                for (entry, name, _), reason in zip(some, pool.map(_reason, [item[2] for item in some]), strict=True):
                    entry.damaged.pop(name, None)
                    if reason is not None:
                        entry.damaged[name] = reason
                bar.advance(shown, len(some))
                if start + _TOGETHER >= len(ahead) or time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                    _note_seen(ahead[noted : start + _TOGETHER])
                    self._is_new = True
                    self.save()
                    noted, saved = start + _TOGETHER, time.monotonic()


def _note_seen(some: Sequence[tuple[Folder, str, str]]) -> None:
    by_folder: dict[int, tuple[Folder, set[str]]] = {}
    for entry, name, _ in some:
        by_folder.setdefault(id(entry), (entry, set()))[1].add(name)
    for entry, names in by_folder.values():
        entry.unseen = [name for name in (entry.files if entry.unseen is None else entry.unseen) if name not in names]


def _reason(path: str) -> str | None:
    """Returns why an image can't be read; None if it can."""
    try:
        read_rgb(path, small=True)
    except UserError as error:
        return str(error.__cause__).replace(f" {path!r}", "")  # the path is named with it
    return None


def _listed(real: str, before: Folder | None) -> Folder:
    """Lists a folder; files that have been looked at and have not changed since need not be looked at again."""
    now = time.time_ns()
    try:
        changed = os.stat(real).st_mtime_ns  # before it is listed, so that what changes meanwhile is noticed
        with os.scandir(real) as entries:
            there = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"ImageFolder: the folder {real} can't be listed: {error.strerror}.") from error
    folders = [entry.name for entry in there if _is_folder(entry)]
    links = {
        entry.name: os.path.realpath(entry.path) for entry in there if entry.is_symlink() and not _is_folder(entry)
    }
    # A pipe would be waited for, and is no file.
    files = [entry.name for entry in there if entry.name in links or entry.is_file()]
    unseen: list[str] | None = None
    damaged: dict[str, str] = {}
    if before is not None and before.unseen is not None:
        seen = set(before.files).difference(before.unseen)
        unseen = [name for name in files if name not in seen or _has_changed(f"{real}/{name}", before.listed)]
        damaged = {name: before.damaged[name] for name in files if name in before.damaged}
    return Folder(now, changed if now - changed > _GRAIN_NS else None, files, folders, links, unseen, damaged)


def _has_changed(path: str, since: int) -> bool:
    try:
        return os.stat(path).st_ctime_ns > since - _GRAIN_NS
    except OSError:
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _folders_in(kept: Any) -> dict[str, Folder]:
    """Returns what was kept; nothing if it has another form."""
    try:
        folders = {str(real): Folder(*values) for real, values in kept.items()}
    except (AttributeError, TypeError):
        return {}
    is_whole = all(
        isinstance(entry.listed, int)
        and isinstance(entry.files, list)
        and isinstance(entry.folders, list)
        and isinstance(entry.links, dict)
        and isinstance(entry.damaged, dict)
        and isinstance(entry.unseen, list | None)
        for entry in folders.values()
    )
    return folders if is_whole else {}
