"""A run of a few ranks in which one hangs, dies or fails: `hanging.py FOLDER FAULT RANK TIMEOUT_SECONDS`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from distaccum.errors import OtherRankFailedError, UserError
from distaccum.runtime import heartbeat
from distaccum.runtime.logs import print_error
from distaccum.runtime.world import World, joined_world


def sleeps_in_forward() -> None:
    time.sleep(60)


def sleeps_with_the_gil() -> None:
    ctypes.PyDLL(None).sleep(60)


def stops() -> None:
    # A stopped process can't be ended by the launcher before 30 s have passed.
    subprocess.Popen(["sh", "-c", f"sleep 12; kill -9 {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_killed_then_has_a_bug() -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        is_killed()
    has_a_bug()


def has_a_bug() -> None:
    raise KeyError("a bug in forward")


def has_bad_input() -> None:
    raise UserError("a sample can't be read")


def comes_to_another_collective() -> None:
    dist.all_reduce(torch.ones(1))
    dist.broadcast(torch.ones(1), src=int(os.environ["RANK"]))
    dist.barrier()


def nothing_happens() -> None:
    return


def _slow_forward() -> None:
    """Keeps a rank away from collectives while the others notice that one is gone."""
    time.sleep(float(os.environ.get("SLOW_FORWARD_SECONDS", "0")))


def _work(world: World, fault: str, rank: int) -> None:
    for update in range(1, 6):
        for micro_step in (1, 2):
            world.heartbeat.doing("forward", update=update, micro_step=micro_step)
            if (update, micro_step, world.rank) == (3, 2, rank):
                time.sleep(2.2)  # two beats, so that the others have heard of it
                globals()[fault]()
            elif (update, micro_step) == (3, 2):
                _slow_forward()
        world.heartbeat.doing("gradient sync", update=update, waits=True)
        dist.all_reduce(torch.ones(1))


def _main(folder: str, fault: str, rank: str, timeout_seconds: str) -> None:
    began = time.monotonic()
    torch.set_num_threads(1)
    if "OUTLIVES_SIGTERM" in os.environ:  # as a run does that saves before it leaves
        signal.signal(signal.SIGTERM, lambda *_: None)
        heartbeat.SECONDS_TO_GIVE_UP = 4.0
    try:
        with joined_world() as world:
            # While they start, a busy machine may keep some of them waiting for longer than the timeout.
            world.init_process_group(torch.device("cpu"), 60.0)
            dist.barrier()
            _set_pg_timeout(timedelta(seconds=float(timeout_seconds)))
            world.heartbeat.timeout_seconds = float(timeout_seconds)
            world.heartbeat.log_to(Path(folder, f"rank{world.rank}.log"))
            began = time.monotonic()
            _work(world, fault, int(rank))
    except OtherRankFailedError:
        status = 2
        _report(folder, began)
        time.sleep(3)  # as the entry points do, so that the launcher does not stop the one that speaks
    except UserError as error:
        print_error(str(error))
        _report(folder, began)
        status = 2
    else:
        status = 0
    sys.stdout.flush()
    os._exit(status)


def _report(folder: str, began: float) -> None:
    Path(folder, f"seconds{os.environ['RANK']}").write_text(str(time.monotonic() - began))


if __name__ == "__main__":
    _main(*sys.argv[1:])
