"""States that one process keeps in memory: found again, damaged, without room, another's."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
import torch
from torch import nn

from distaccum.checkpoints import Checkpointer, memory_place
from distaccum.checkpoints.memory_place import VARIABLE, _file_system
from distaccum.config import CheckpointConfig
from distaccum.errors import UserError

CONFIG = CheckpointConfig(memory_every_updates=1, every_updates=4)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setenv(VARIABLE, folder)
        yield Path(folder)


def checkpointer(folder: Path, config: CheckpointConfig = CONFIG, width: int = 8) -> Checkpointer:
    model = nn.Linear(width, width)
    with torch.no_grad():
        model.weight.zero_()
    return Checkpointer(folder, model, torch.optim.SGD(model.parameters(), lr=1.0), config=config)


def make_updates(one: Checkpointer, first: int, last: int) -> None:
    """Saves after each update, if that is due; the weights are the number of the update."""
    for update in range(first, last + 1):
        with torch.no_grad():
            one.strategy.module.weight.fill_(update)
        if one.is_due(update):
            one.save(update, {"update": update})
    one.wait()


def restored(folder: Path, config: CheckpointConfig = CONFIG) -> tuple[Checkpointer, int]:
    """A checkpointer that goes on from the newest state, and the state's update; 0 if it begins anew."""
    one = checkpointer(folder, config)
    newest = one.newest()
    if newest is None:
        return one, 0
    assert one.restore(newest) == {"update": newest.update}
    assert (one.strategy.module.weight == newest.update).all()
    return one, newest.update


def states(memory: Path) -> list[Path]:
    return sorted(memory.glob("distaccum-*/*/update-*"))


def flip_byte(state: Path) -> None:
    path = state / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_newest_state_is_taken_from_wherever_it_is(
    tmp_path: Path, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "checkpoints"
    make_updates(checkpointer(folder), 1, 6)
    # The one before the newest stays until the next one is begun.
    assert [state.name for state in states(memory)] == ["update-00000005", "update-00000006"]
    assert states(memory)[0].parent.parent.stat().st_mode & 0o777 == 0o700
    assert restored(folder)[1] == 6
    assert "the state of update 6, in memory, is newer than the newest on the disk, of update 4" in caplog.text
    flip_byte(states(memory)[1])
    assert restored(folder)[1] == 5
    assert "state of update 6 in memory is not whole and passed over: rank-00000.safetensors is not as it was" in (
        caplog.text
    )
    (states(memory)[0] / "manifest.json").unlink()
    one, update = restored(folder)
    assert update == 4, "the one on the disk"
    assert caplog.text.count("is newer than") == 2
    make_updates(one, 5, 7)
    assert [state.name for state in states(memory)] == ["update-00000006", "update-00000007"]
    # Also for a run that keeps none there any more.
    assert restored(folder, CheckpointConfig())[1] == 7
    one = restored(folder)[0]
    make_updates(one, 8, 8)
    one.clear_memory()
    assert not list(memory.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["update-00000004", "update-00000008"]


def test_a_state_of_another_run_in_the_same_folder_does_not_count(tmp_path: Path, memory: Path) -> None:
    folder = tmp_path / "checkpoints"
    make_updates(checkpointer(folder), 1, 3)
    folder.rename(tmp_path / "removed")
    assert restored(folder)[1] == 0
    assert not states(memory)


def test_states_are_given_up_without_their_identifier(tmp_path: Path, memory: Path) -> None:
    folder = tmp_path / "checkpoints"
    make_updates(checkpointer(folder), 1, 6)
    (folder / "memory.id").unlink()
    assert restored(folder)[1] == 4
    assert not states(memory)


def test_a_folder_that_others_may_have_written_is_refused_and_not_read(tmp_path: Path, memory: Path) -> None:
    folder = tmp_path / "checkpoints"
    make_updates(checkpointer(folder), 1, 3)
    (root,) = memory.iterdir()
    root.chmod(0o770)
    plain = CheckpointConfig()
    assert restored(folder, plain)[1] == 0
    with pytest.raises(UserError, match=r"is there, and not this user's alone\. Name another"):
        checkpointer(folder)
    root.chmod(0o700)
    root.rename(memory / "elsewhere")
    root.symlink_to(memory / "elsewhere")
    assert restored(folder, plain)[1] == 0
    with pytest.raises(UserError, match="is there, and not this user's alone"):
        checkpointer(folder)


def test_memory_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(UserError, match=f"can't keep states in {tmp_path}/missing: No such file"):
        checkpointer(tmp_path / "checkpoints")


def test_a_folder_that_is_not_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes may share it, and would remove each other's states."""
    if _file_system(tmp_path) == "tmpfs":
        monkeypatch.setattr(memory_place, "_file_system", lambda path: "nfs4")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"can't keep states in {re.escape(str(tmp_path))}: it is on .+, not on tmpfs"):
        checkpointer(tmp_path / "checkpoints")
    assert not list(tmp_path.glob("distaccum-*"))


def test_room_is_asked_for_before_anything_is_written(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    with disks.mounted(memory / "small") as small:
        monkeypatch.setenv(VARIABLE, str(small))
        one = checkpointer(folder, width=100)  # 40 kB, of which two don't fit into 64 KiB
        assert one.is_due(1)
        one.save(1, {"update": 1})
        with pytest.raises(
            UserError, match=r"needs 0.1 MB of memory on .* for two states of the run, and .* room for 0.1 MB"
        ):
            one.wait_for_memory()
        assert not list(small.rglob("*.safetensors"))
        one.clear_memory()
        # What takes the room afterwards doesn't end the training.
        one = checkpointer(folder)
        make_updates(one, 1, 1)
        filled = disks.fill(small)
        make_updates(one, 2, 3)
        assert caplog.text.count("could not be kept in memory: No space left on device") == 1
        assert "that of update 1 stays" in caplog.text
        assert [state.name for state in states(small)] == ["update-00000001"]
        filled.unlink()
        make_updates(one, 4, 5)
        assert [state.name for state in states(small)] == ["update-00000004", "update-00000005"]


def test_the_best_checkpoint_is_on_the_disk_before_a_state_in_memory_counts_it(tmp_path: Path, memory: Path) -> None:
    one = checkpointer(tmp_path / "checkpoints", CheckpointConfig(memory_every_updates=1, keep_best=1))
    make_updates(one, 1, 1)
    assert one.is_due(2)
    assert one.is_among_best(2, {"loss": 1.0})
    one.save(2, {"update": 2})
    assert (tmp_path / "checkpoints" / "update-00000002").exists()
    one.wait()
    assert [state.name for state in states(memory)] == ["update-00000001", "update-00000002"]
