"""Checkpoints as folders: complete or absent, checked by hash, newest first.

    run_dir/checkpoints/update-00000120/
        manifest.json               what there is, with a hash of every file, and everything that is not a tensor
        rank-00000.safetensors      the tensors that rank 0 has written

A checkpoint is written into a folder with another name and renamed when all of it is on the disk, so a folder
`update-…` is complete, unless the disk itself has damaged it, which the hashes show. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distaccum.checkpoints.encoding import decoded
from distaccum.checkpoints.form import FORMAT, SAFETENSORS_NAMES, is_shallow, misfit
from distaccum.checkpoints.form import MANIFEST as MANIFEST_FORM
from distaccum.runtime.files import open_regular, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

_PREFIX = "update-"
_NAME = re.compile(r"update-\d{1,18}", re.ASCII)
_FILE = re.compile(r"rank-\d{5,}\.safetensors", re.ASCII)
_WRITING = ".writing-"
_REMOVED = ".removed-"
_REPLACED = ".replaced-"
_CHUNK_BYTES = 8 << 20
_MOST_BYTES_OF_MANIFEST = 256 << 20


class DamagedCheckpointError(Exception):
    """A checkpoint can't be used: the message says what is wrong with which file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose manifest has been read and found whole."""

    path: Path
    manifest: dict[str, Any]
    is_in_memory: bool = False
    """It lies in memory, not on the disk."""

    @property
    def update(self) -> int:
        return int(self.manifest["update"])

    @property
    def state(self) -> dict[str, Any]:
        """Everything saved besides tensors."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    @property
    def states(self) -> dict[str, Any]:
        """The saved states of further objects, by name."""
        states: dict[str, Any] = decoded(self.state["states"])
        return states

    @property
    def frozen(self) -> dict[str, dict[str, Any]]:
        """Format, shape and fingerprint of the frozen weights that were left out, by their names in the model."""
        return self.state.get("frozen") or {}

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of all tensors by name, those that were left out among them."""
        left_out = {f"model/{name}": entry["shape"] for name, entry in self.frozen.items()}
        return {name: entry["shape"] for name, entry in self.manifest["tensors"].items()} | left_out

    @property
    def files(self) -> list[str]:
        return sorted(self.manifest["files"])


def name_of(update: int) -> str:
    return f"{_PREFIX}{update:08d}"


def update_of(path: Path) -> int:
    """The update of a checkpoint, by the name of its folder."""
    return int(path.name.removeprefix(_PREFIX))


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of checkpoints by their names, that of the highest update first."""
    if not os.path.isdir(folder):
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    found = [path for path in found if not path.is_symlink()]
    return sorted(found, key=update_of, reverse=True)


def writing_path(folder: Path, update: int) -> Path:
    """The folder that a checkpoint is written in before it gets its name."""
    return folder / f"{_WRITING}{update:08d}"


def start_writing(folder: Path, update: int) -> None:
    """Makes that folder, and removes one of an earlier try."""
    path = writing_path(folder, update)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def clear_leftovers(folder: Path) -> None:
    """Removes what a run that was killed had not finished writing or removing, and puts back what it had put aside."""
    for path in list(folder.iterdir()) if os.path.isdir(folder) else ():
        if path.name.startswith(_REPLACED) and not (final := folder / path.name.removeprefix(_REPLACED)).exists():
            path.rename(final)
        elif path.name.startswith((_WRITING, _REMOVED, _REPLACED)):
            shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest, with its own hash in front, and brings it to the disk."""
    text = json.dumps(content)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        file.write(f'{{"blake2b": "{digest}", "content":\n{text}\n}}\n')
        file.flush()
        os.fsync(file.fileno())


def commit(writing: Path, update: int) -> None:
    """Gives a written checkpoint its name, which makes it one, and removes one that had the name before."""
    sync(writing)
    final = writing.with_name(name_of(update))
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    writing.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's manifest.

    Raises:
        DamagedCheckpointError: there is none, or not as a run has written it.
    """
    try:
        with open_regular(path / MANIFEST, _MOST_BYTES_OF_MANIFEST) as file:
            lines = file.read(_MOST_BYTES_OF_MANIFEST).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} can't be read ({error})") from error
    try:
        digest = json.loads(lines[0] + "0}")["blake2b"]
        text = lines[1]
        if hashlib.blake2b(text.encode(), digest_size=16).hexdigest() != digest or lines[2:] != ["}"]:
            raise ValueError
        manifest = json.loads(text)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        raise DamagedCheckpointError(f"{MANIFEST} is not as it was written") from None
    _check_form(manifest, path.name)
    return Checkpoint(path=path, manifest=manifest)


def _check_form(manifest: Any, folder: str) -> None:
    """Refuses what this version would not have written: a hash is no signature, anybody can make one."""
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise DamagedCheckpointError(f"it is of format {found!r}, and this version reads {FORMAT}")
    if (where := misfit(manifest, MANIFEST_FORM)) is not None:
        raise DamagedCheckpointError(f"{MANIFEST} is not what a run writes: {where.removeprefix('.')}")
    best = manifest["state"]["best"]
    if not is_shallow(manifest["state"]) or not all(_NAME.fullmatch(f"{_PREFIX}{number}") for number in best):
        raise DamagedCheckpointError(f"{MANIFEST} is not what a run writes")
    named = {chunk["file"] for tensor in manifest["tensors"].values() for chunk in tensor["chunks"]}
    if not named <= manifest["files"].keys() or not all(map(_FILE.fullmatch, manifest["files"])):
        raise DamagedCheckpointError(f"{MANIFEST} names files that are not the checkpoint's")
    if folder.startswith(_PREFIX) and folder != name_of(manifest["update"]):
        raise DamagedCheckpointError(f"{MANIFEST} is of update {manifest['update']}, and the folder is {folder}")


def verify_files(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Checks size and hash of some of a checkpoint's files.

    Raises:
        DamagedCheckpointError: one is missing or not as it was written.
    """
    for name in names:
        wanted = checkpoint.manifest["files"][name]
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open_regular(checkpoint.path / name) as file:
                if (length := os.fstat(file.fileno()).st_size) != wanted["bytes"]:
                    raise DamagedCheckpointError(f"{name} has {length} bytes of {wanted['bytes']}")
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedCheckpointError(f"{name} can't be read ({error.strerror})") from error
        if digest.hexdigest() != wanted["blake2b"]:
            raise DamagedCheckpointError(f"{name} is not as it was written: its hash is another")


def newest_whole(folder: Path, *, rank: int, gather: Callable[[Any], list[Any]]) -> Checkpoint | None:
    """The newest checkpoint in a folder whose files are all as they were written; each rank checks a part of them.

    Args:
        gather: returns every rank's value on every rank.
    """
    for path in gather(checkpoints_in(folder) if rank == 0 else None)[0]:
        checkpoint, problems = checked(path, rank=rank, gather=gather)
        if checkpoint is not None:
            return checkpoint
        if rank == 0:
            logger.warning("the checkpoint %s is damaged and passed over: %s", path, problems)
    return None


def checked(path: Path, *, rank: int, gather: Callable[[Any], list[Any]]) -> tuple[Checkpoint | None, str]:
    """The checkpoint in a folder, or None and what is wrong with it; the same on all ranks."""
    ranks = len(gather(None))
    checkpoint, problem = None, None
    try:
        checkpoint = read_checkpoint(path)
        own_part = checkpoint.files[rank::ranks]
        verify_files(checkpoint, own_part)
        _check_content(checkpoint, own_part)
    except DamagedCheckpointError as error:
        problem = str(error)
    problems = [entry for entry in gather(problem) if entry is not None]
    return (None, "; ".join(dict.fromkeys(problems))) if problems else (checkpoint, "")


def _check_content(checkpoint: Checkpoint, names: list[str]) -> None:
    """Refuses files that don't hold what the manifest says."""
    wanted: dict[str, list[tuple[str, tuple[list[int], str]]]] = {name: [] for name in names}
    for tensor in checkpoint.manifest["tensors"].values():
        for chunk in tensor["chunks"]:
            if chunk["file"] in wanted:
                wanted[chunk["file"]].append((chunk["key"], (chunk["shape"], SAFETENSORS_NAMES[tensor["dtype"]])))
    for name, pieces in wanted.items():
        try:
            with safe_open(checkpoint.path / name, framework="np") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                found = {key: (entry.get_shape(), entry.get_dtype()) for key, entry in slices.items()}
        except SafetensorError as error:
            raise DamagedCheckpointError(f"{name} is no safetensors file ({error})") from error
        if any(found.get(key) != piece for key, piece in pieces):
            raise DamagedCheckpointError(f"{name} doesn't hold the tensors that {MANIFEST} names")


def prune(folder: Path, *, keep_last: int, newest: int, best: Iterable[int]) -> None:
    """Removes checkpoints but the newest `keep_last` and those of the updates in `best`.

    Args:
        newest: the update that was saved last. What has a higher number was damaged, or the run would have gone on from
            it: it must not take the place of one that is whole, and is left alone.
    """
    updates = [update_of(path) for path in checkpoints_in(folder)]
    older = [update for update in updates if update <= newest][keep_last:]
    for update in sorted(set(older).difference(best)):
        # Renamed first: what is half removed must not look like a checkpoint.
        aside = folder / f"{_REMOVED}{name_of(update)}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / name_of(update)).rename(aside)
        shutil.rmtree(aside)
