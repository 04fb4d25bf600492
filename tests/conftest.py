from __future__ import annotations

import fcntl
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from command_line import Ended
from hypothesis import settings

from distaccum.runtime.torchvision_operators import tolerate_missing_operators

tolerate_missing_operators()

# One thread a process, as under torchrun: many processes share few cores here.
torch.set_num_threads(1)

# Runs that tests start heed a closed terminal, also where the tests themselves are started with nohup; and so do they
# Ctrl-C, which a shell has its jobs in the background ignore.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# In continuous integration, property tests take the same examples each time: no change is refused for a new one.
settings.register_profile("same examples", derandomize=True, database=None)
if os.environ.get("NO_SKIPS"):
    settings.load_profile("same examples")

TESTS = Path(__file__).parent

LONG = (
    *("launch", "faults", "distributed", "tools", "test_benchmarks.py"),
    *("test_train.py", "test_docs.py", "test_packaging.py", "loaders", "observers"),
)
"""What takes long in one worker, longest first: what is short comes last, and fills the gaps between workers."""


def _is_alone(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("alone", "gpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[bool, int]:
        top = item.path.relative_to(TESTS).parts[0]
        return _is_alone(item), LONG.index(top) if top in LONG else len(LONG)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker gets a whole file, for the sake of launches and fixtures that its tests share; or a whole lab."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            # Long, and share nothing.
            if file.endswith(("faults/test_kills.py", "faults/test_restarts.py", "test_benchmarks.py")):
                return nodeid
            return "launch" if "/launch/" in file else file

    return ByFile(config, log)


MAY_SKIP = re.compile("CUDA|GPU|hosts can't be emulated here: `|no file system can be mounted here")
"""Reasons that hold for some machine that has everything installed: no GPU, or a kernel that refuses it to root."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails tests that skip because something isn't installed, if NO_SKIPS is set: in continuous integration."""
    report = yield
    if report.skipped and os.environ.get("NO_SKIPS") and not MAY_SKIP.search(str(report.longrepr)):
        report.outcome = "failed"
        report.longrepr = f"skipped, which NO_SKIPS forbids: {report.longrepr}"
    return report


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open() as file:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a child may still hold the file open


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests that are to be alone wait for the other worker's one, and it waits for them. No timeout runs meanwhile."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with ExitStack() as stack:
        # Any two files will do. With the first, nobody passes by one who waits to be alone.
        with _locked(TESTS.parent / "pyproject.toml", fcntl.LOCK_EX):
            stack.enter_context(_locked(Path(__file__), fcntl.LOCK_EX if _is_alone(item) else fcntl.LOCK_SH))
        return (yield)


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


@pytest.fixture(scope="module")
def collects_garbage() -> Iterator[None]:
    """What a module's tests have left open is closed before the next one's begin."""
    yield
    gc.collect()


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
