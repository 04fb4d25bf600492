from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starting import Starter
from zygote import Zygote, zygote


@pytest.fixture(scope="session")
def processes() -> Iterator[Zygote]:
    with zygote() as found:
        yield found


@pytest.fixture(scope="session")
def runs() -> Starter:
    """Starts training processes that are troubled in other ways than by `kill -9`."""
    return Starter()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
