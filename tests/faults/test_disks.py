"""Disks that are full, and folders that can no longer be written, while a run saves its checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from forking import environment
from outcomes import leftovers, outcome, saved_updates, undisturbed
from starting import RUN, STEPS, Starter
from troubles import trouble

pytestmark = pytest.mark.usefixtures("here")

CHECKPOINTS = Path("run/checkpoints")


@pytest.fixture
def disk(here: Path) -> Iterator[Path]:
    """The run folder, on a small disk of its own."""
    with disks.mounted(here / "run") as folder:
        disks.remount(folder, "size=512k")  # room for some checkpoints
        yield folder


def at(update: int, nth: int, ranks: int = 1) -> dict[str, object]:
    """Where a run shows that it is in an update, and gives the test time to do something."""
    return trouble("forward", "wait", nth=(update - 1) * STEPS // ranks + 1, path=f"pause{nth}")


def pause(number: int) -> None:
    """Waits until the run is there."""
    deadline = time.monotonic() + 60
    while not Path(f"pause{number}").exists():
        assert time.monotonic() < deadline, "the run did not come there"
        time.sleep(0.01)


def go_on(number: int) -> None:
    Path(f"pause{number}").unlink()


def assert_saved(*updates: int) -> None:
    """Waits a little: what is saved may still be being written, or cleared away."""
    deadline = time.monotonic() + 10
    while (saved_updates(), leftovers()) != (list(updates), []):
        assert time.monotonic() < deadline, (saved_updates(), leftovers())
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("is_async", ["true", "false"])
def test_the_disk_is_full_for_a_while(runs: Starter, disk: Path, is_async: str, ranks: int) -> None:
    settings = (f"checkpoint.async_save={is_async}", "checkpoint.keep_last=1")
    running = runs.start(*RUN, *settings, ranks=ranks, troubles=[at(4, 0, ranks), at(7, 1, ranks)])
    pause(0)
    assert_saved(2)
    filled = disks.fill(disk)
    go_on(0)
    pause(1)
    assert_saved(2)
    filled.unlink()
    go_on(1)
    ended = running.ended()
    assert (ended.statuses, ended.err) == ([0] * ranks, "")
    warning = r"the checkpoint of update (\d) could not be saved: No space left on device.* Training goes on; (.+)"
    warnings = re.findall(warning, ended.out)
    # One that is due while another is still being written waits for the next update.
    assert {update for update, _ in warnings} <= {"4", "5", "6"}, ended.out
    assert {kept for _, kept in warnings} == {"that of update 2 is kept."}
    assert_saved(8)
    assert outcome() == undisturbed(runs, ranks=ranks)


def test_the_disk_stays_full(runs: Starter, disk: Path) -> None:
    """The run comes to its end and says what is missing; once there is room, the same command makes up for it."""
    running = runs.start(*RUN, troubles=[at(4, 0)])
    pause(0)
    assert_saved(2)
    filled = disks.fill(disk)
    go_on(0)
    ended = running.ended()
    message = ended.message
    assert message.startswith("run/model.safetensors can't be written: No space left on device")
    assert "start the same command again" in message
    assert "update 8/8" in ended.out
    assert_saved(2)
    filled.unlink()
    again = runs.run(*RUN)
    assert again.statuses == [0], again
    assert f"going on from {CHECKPOINTS}/update-00000002, update 2" in again.out
    assert outcome() == undisturbed(runs)


def test_a_signal_while_the_disk_is_full(runs: Starter, disk: Path) -> None:
    running = runs.start(*RUN, troubles=[at(4, 0), trouble("forward", "SIGTERM", nth=4 * STEPS + 2)])
    pause(0)
    assert_saved(2)
    filled = disks.fill(disk)
    go_on(0)
    ended = running.ended()
    assert (ended.statuses, ended.err) == ([75], "")
    assert "stopped        by SIGTERM after update 5 of 8; not saved" in ended.out
    assert_saved(2)
    filled.unlink()
    assert runs.run(*RUN).statuses == [0]
    assert outcome() == undisturbed(runs)


WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
"""Before a command: root's processes then heed the permissions of files too."""


def test_the_run_folder_is_made_read_only(runs: Starter, here: Path) -> None:
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root can't be kept from writing without setpriv")
        probe = [*WITHOUT_PRIVILEGES, sys.executable, "-c", "open('sealed/file', 'w')"]
        Path("sealed").mkdir(mode=0o555)
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if "Permission denied" not in done.stderr:
            pytest.skip(f"root can't be kept from writing here: {done.stderr}")
    privileges = WITHOUT_PRIVILEGES if os.getuid() == 0 else []
    command = [*privileges, sys.executable, "-m", "distaccum.train", *RUN, "checkpoint.async_save=false"]
    with subprocess.Popen(
        command,
        env=environment(TROUBLES=json.dumps([at(4, 0), at(7, 1)])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        pause(0)
        assert_saved(2)
        folders = [Path("run"), Path("run/checkpoints"), *Path("run/checkpoints").iterdir()]
        for folder in folders:
            folder.chmod(0o555)
        go_on(0)
        pause(1)
        assert_saved(2)
        for folder in folders:
            folder.chmod(0o755)
        go_on(1)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out
    for update in (4, 6):
        assert f"the checkpoint of update {update} could not be saved: Permission denied (" in out
    assert out.count("Training goes on; that of update 2 is kept.") == 2
    assert_saved(8, 2)
    assert outcome() == undisturbed(runs)
