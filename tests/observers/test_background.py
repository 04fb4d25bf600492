"""Calls in a thread beside the training, and forks meanwhile."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from distaccum.observers.background import forks_wait


def _import(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize(
    ("guard", "hangs"), [(forks_wait(), False), (nullcontext(), True)], ids=["forks-wait", "control"]
)
def test_a_forked_child_imports_what_a_thread_was_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: AbstractContextManager[None], hangs: bool
) -> None:
    name = f"slowly_imported_{hangs}"
    (tmp_path / f"{name}.py").write_text("import time\ntime.sleep(0.5)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def in_thread() -> None:
        with guard:
            _import(name)

    thread = threading.Thread(target=in_thread)
    thread.start()
    while name not in sys.modules:
        time.sleep(0.001)
    child = multiprocessing.get_context("fork").Process(target=_import, args=(name,))
    child.start()
    child.join(2.0 if hangs else 60.0)
    try:
        assert child.is_alive() == hangs
        assert hangs or child.exitcode == 0
    finally:
        child.kill()
        child.join()
        thread.join()
        sys.modules.pop(name, None)
