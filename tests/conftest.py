from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import Ended

# One thread a process, as under torchrun: many processes share few cores here.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """A test that leaves an environment variable, a thread or a process group behind fails."""
    environment = dict(os.environ)
    threads = set(threading.enumerate())
    yield
    changed = {key for key in {*environment, *os.environ} if environment.get(key) != os.environ.get(key)}
    # torch and scikit-learn set some of their own when parts of them are first imported.
    changed = {key for key in changed if not key.startswith(("PYTEST", "TORCHINDUCTOR", "KMP_"))}
    assert not changed, f"left environment variables changed: {changed}"
    left = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    assert not left, f"left threads: {left}"
    assert not dist.is_initialized(), "left a process group"


@pytest.fixture(autouse=True)
def _cache_of_its_own(
    _nothing_leaks: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is remembered from one start to the next is kept apart from the user's, and from other tests'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `python -m distaccum.train` with the given arguments, in this process and in a new and empty folder."""
    from distaccum.train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by the entry point: so it is taken back

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["distaccum.train", *arguments])
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Ended(status, *capfd.readouterr())

    return run
