from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import disks
import pytest


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with 64 KiB of room."""
    with disks.mounted(tmp_path / "tiny") as folder:
        yield folder
