from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from distaccum.checkpoints.folder import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    DamagedCheckpointError,
    checkpoints_in,
    clear_leftovers,
    commit,
    prune,
    read_checkpoint,
    start_writing,
    verify_files,
    write_manifest,
    writing_path,
)

CONTENT = b"some tensors"
DATA = "rank-00000.safetensors"
STATE: dict[str, Any] = {
    "progress": {"note": "ü"},
    "states": {},
    "optimizer": {"name": "SGD", "settings": [{}], "settings_at_start": [{}]},
    "extra": {},
    "world_size": 1,
    "best": {},
}


def make(folder: Path, update: int, **changed: Any) -> Checkpoint:
    """Writes a checkpoint with one file, which is not a real one, and a manifest that fits it."""
    start_writing(folder, update)
    writing = writing_path(folder, update)
    (writing / DATA).write_bytes(CONTENT)
    digest = hashlib.blake2b(CONTENT, digest_size=16).hexdigest()
    chunk = {"file": DATA, "key": "a", "offsets": [0], "shape": [3]}
    manifest = {
        "format": FORMAT,
        "update": update,
        "state": STATE,
        "tensors": {"a": {"dtype": "float32", "shape": [3], "chunks": [chunk]}},
        "files": {DATA: {"bytes": len(CONTENT), "blake2b": digest}},
        **changed,
    }
    write_manifest(writing, manifest)
    commit(writing, update)
    return read_checkpoint(folder / f"update-{update:08d}")


def updates_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("update-")) for path in checkpoints_in(folder)]


def test_a_written_checkpoint_reads_back(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 12)
    assert checkpoint.path == tmp_path / "update-00000012"
    assert (checkpoint.update, checkpoint.state, checkpoint.files) == (12, STATE, [DATA])
    verify_files(checkpoint, [DATA])
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000012"]


def test_the_newest_has_the_highest_update_and_not_the_latest_date(tmp_path: Path) -> None:
    for update in (100, 9, 20):
        make(tmp_path, update)
    (tmp_path / "update-later").mkdir()
    (tmp_path / "update-00000300").write_text("a file")
    assert updates_in(tmp_path) == [100, 20, 9]


def test_a_checkpoint_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    start_writing(tmp_path, 5)
    (writing_path(tmp_path, 5) / DATA).write_bytes(CONTENT)
    assert updates_in(tmp_path) == []
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saving_the_same_update_again_replaces_it(tmp_path: Path) -> None:
    make(tmp_path, 5)
    assert make(tmp_path, 5, torch="second").manifest["torch"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000005"]


def test_a_run_killed_while_it_replaced_a_checkpoint_has_the_old_one(tmp_path: Path) -> None:
    make(tmp_path, 5)
    (tmp_path / "update-00000005").rename(tmp_path / ".replaced-update-00000005")
    clear_leftovers(tmp_path)
    assert read_checkpoint(tmp_path / "update-00000005").state == STATE


@pytest.mark.parametrize(
    ("keep_last", "best", "left"),
    [(1, [], [5]), (2, [], [5, 4]), (2, [1, 3], [5, 4, 3, 1]), (1, [5, 2], [5, 2]), (9, [], [5, 4, 3, 2, 1])],
)
def test_old_checkpoints_go_and_the_best_stay(tmp_path: Path, keep_last: int, best: list[int], left: list[int]) -> None:
    for update in range(1, 6):
        make(tmp_path, update)
    prune(tmp_path, keep_last=keep_last, newest=5, best=best)
    assert updates_in(tmp_path) == left
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# Damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / DATA).unlink(), f"{DATA} is missing"),
        (lambda path: (path / DATA).write_bytes(CONTENT[:-1]), f"{DATA} has 11 bytes of 12"),
        (lambda path: (path / DATA).write_bytes(CONTENT[:-1] + b"S"), f"{DATA} is not as it was written"),
        (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff"), "manifest.json can't be read"),
        (lambda path: (path / MANIFEST).write_text(""), "manifest.json is not as it was written"),
    ],
)
def test_damage_is_noticed_and_named(tmp_path: Path, damage: Any, said: str) -> None:
    path = make(tmp_path, 3).path
    damage(path)
    with pytest.raises(DamagedCheckpointError, match=said.replace(".", r"\.")):
        verify_files(read_checkpoint(path), [DATA])


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path, 3).path
    text = (path / MANIFEST).read_bytes()
    for position in range(len(text)):
        damaged = bytearray(text)
        damaged[position] ^= 1
        (path / MANIFEST).write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except DamagedCheckpointError:
            continue
        (path / MANIFEST).write_bytes(text)
        # White space around the JSON may change without changing what is read.
        assert found == read_checkpoint(path), (position, bytes(damaged[position - 5 : position + 5]))


def test_every_truncation_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path, 3).path
    text = (path / MANIFEST).read_bytes()
    for length in range(len(text) - 1):
        (path / MANIFEST).write_bytes(text[:length])
        with pytest.raises(DamagedCheckpointError):
            read_checkpoint(path)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    outside = {"../../etc/passwd": {"bytes": 1, "blake2b": "0"}}
    chunk = {"file": "elsewhere", "key": "a", "offsets": [], "shape": []}
    for changed in ({"files": outside}, {"tensors": {"a": {"dtype": "int8", "shape": [], "chunks": [chunk]}}}):
        with pytest.raises(DamagedCheckpointError, match="names files that are not the checkpoint's"):
            make(tmp_path, 3, **changed)


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=rf"of format {FORMAT + 1}, and this version reads {FORMAT}"):
        make(tmp_path, 3, format=FORMAT + 1)


def test_the_manifest_is_json(tmp_path: Path) -> None:
    path = make(tmp_path, 3).path
    assert json.loads((path / MANIFEST).read_text())["content"]["update"] == 3
