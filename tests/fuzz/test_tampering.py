"""What is read from folders that somebody has tampered with: it ends with a result or one message, soon; nothing in it
runs, and nothing outside is read or written. More of it: `python tests/fuzz/surviving.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import surviving

SEEDS = range(60)
"""About 10 seconds of one core."""


@pytest.mark.timeout(300)
def test_tampered_folders_are_survived() -> None:
    found = list(surviving.run(SEEDS))
    assert not [str(entry) for entry in found if entry.fault], surviving.summary(found)
    assert {entry.status for entry in found} == {0, 2}, surviving.summary(found)


def test_reading_and_writing_outside_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "secret.json"
    path.write_text("{}")
    os.utime(path, (surviving.OLD, path.stat().st_mtime))
    before = surviving.state(tmp_path, may_be_read=False)
    assert surviving.state(tmp_path, may_be_read=False) == before
    path.read_text()
    read = surviving.state(tmp_path, may_be_read=False)
    assert read != before
    assert surviving.state(tmp_path, may_be_read=True) == [(path.name, 0.0, *before[0][2:])]
    with path.open("a") as file:
        file.write(" ")
    assert surviving.state(tmp_path, may_be_read=True)[0][2:] != before[0][2:]
