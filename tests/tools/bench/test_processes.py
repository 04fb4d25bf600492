from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from distaccum.config.compose import compose
from distaccum.errors import UserError
from distaccum.tools.bench import fork_server, processes
from distaccum.tools.bench.processes import KILLED, Ranks


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=text"],
        ["precision=fp16", "optim=rmsprop", "schedule=step", "train.on_nonfinite=skip"],
        ["model=custom", "model._target_=user_project.Line", "+model.inner={_target_: a.B, sizes: [1, 2]}"],
    ],
)
def test_a_configuration_survives_the_way_to_another_process(overrides: list[str]) -> None:
    config = compose(overrides, "compare")
    assert pickle.loads(pickle.dumps(config)) == config


def refuse() -> int:
    print("SomeError: of somebody else", flush=True)
    raise UserError("this can't be run here")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (partial(int, 0), None),
        (refuse, "this can't be run here"),
        (partial(os.kill, 0, signal.SIGKILL), KILLED),
        (partial(divmod, 1, 0), "ZeroDivisionError: integer division or modulo by zero"),
        (partial(os._exit, 7), "it ended with status 7; its output is in LOG"),
    ],
)
def test_the_end_of_a_process_and_its_reason(tmp_path: Path, run: partial[int], said: str | None) -> None:
    log = tmp_path / "logs" / "log"
    log.parent.mkdir()
    log.write_text("error: of an earlier start\n")
    ranks = Ranks(run, num_processes=1, threads=1, log=log)
    assert ranks.has_ended(60)
    assert ranks.failure() == (said and said.replace("LOG", str(log)))
    ranks.stop(1)


def fail_or_wait(folder: Path, how: str) -> int:
    """Rank 1 fails in some way, and the others wait for SIGTERM, or are deaf to it."""
    rank = os.environ["RANK"]
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads()) == "2"
    assert not any(name.startswith("SLURM_") for name in os.environ)
    assert sys.path[0] == "of the user"
    if how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    pids(folder)  # one that fails before the other has written would have it stopped
    if rank == "1" and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and how == "refused":
        raise UserError("not on rank 1")
    time.sleep(60)
    return 0


def is_there(pid: int) -> bool:
    """Whether a process runs, or has yet to be waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Ranks]:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.syspath_prepend("of the user")

    def started(how: str) -> Ranks:
        run = partial(fail_or_wait, tmp_path, how)
        return Ranks(run, num_processes=2, threads=2, log=tmp_path / "log")

    return started


def pids(folder: Path) -> list[int]:
    deadline = time.monotonic() + 60
    files = [folder / f"pid{rank}" for rank in (0, 1)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize(("how", "said"), [("killed", KILLED), ("refused", "not on rank 1")])
def test_when_one_rank_has_failed_the_others_are_stopped(
    start: Callable[[str], Ranks], tmp_path: Path, how: str, said: str
) -> None:
    ranks = start(how)
    assert ranks.has_ended(60)
    assert ranks.failure() == said
    assert not any(map(is_there, pids(tmp_path)))


@pytest.mark.parametrize(("how", "status"), [("waits", -signal.SIGTERM), ("deaf", -signal.SIGKILL)])
def test_ranks_are_stopped_and_killed_if_they_do_not_hear(
    start: Callable[[str], Ranks], tmp_path: Path, how: str, status: int
) -> None:
    ranks = start(how)
    found = pids(tmp_path)
    assert not ranks.has_ended()
    ranks.stop(0.5)
    assert ranks.status == status
    assert not any(map(is_there, found))


def test_a_server_that_was_killed_is_started_anew(start: Callable[[str], Ranks], tmp_path: Path) -> None:
    start("refused").stop(60)
    (server,) = (server for kind, server in processes._servers.items() if kind[:2] == (os.getpid(), 2))
    server._process.kill()
    server._process.wait()
    ranks = start("refused")
    assert ranks.has_ended(60)
    assert ranks.failure() == "not on rank 1"


ORPHANING = """
import os, signal, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, "of the user")
import test_processes
from distaccum.tools.bench.processes import Ranks
folder = Path(sys.argv[1])
ranks = Ranks(partial(test_processes.fail_or_wait, folder, "waits"), num_processes=2, threads=2, log=folder / "log")
found = test_processes.pids(folder)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_end_with_the_process_that_has_started_them(tmp_path: Path) -> None:
    path = os.pathsep.join([*map(str, sys.path), str(Path(__file__).parent)])
    killed = subprocess.run(
        [sys.executable, "-c", ORPHANING, str(tmp_path)], check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(map(is_there, pids(tmp_path))):
        assert time.monotonic() < deadline, "they go on"
        time.sleep(0.05)


def test_the_server_asks_for_no_device() -> None:
    """A process that has can't fork ranks that use CUDA."""
    code = f"""
import importlib, sys, torch
def ask(*_): raise AssertionError("asked for devices")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = ask
for name in {fork_server._MODULES!r}: importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
