"""Clocks that jump by a day, forwards and backwards, under a run that saves by the clock."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import environment
from outcomes import leftovers, outcome, saved_updates, undisturbed
from starting import RUN, STEPS, Starter
from troubles import trouble

from distaccum.checkpoints import checkpoints_in

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), *Path("/usr/local/lib").glob("faketime/*.so.1")]

DAY = 86400


@pytest.mark.usefixtures("here")
@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed")
def test_checkpoints_keep_coming_when_the_clock_jumps(runs: Starter) -> None:
    """A day forwards in update 3, two days back in update 5; a checkpoint is due after each update."""
    settings = ["checkpoint.every_updates=null", "checkpoint.every_minutes=0.000001", "checkpoint.keep_last=10"]
    settings = [*RUN, *settings, "checkpoint.async_save=false"]
    jumps = [
        trouble("forward", "clock", nth=2 * STEPS + 3, path="clock", offset="+1d"),
        trouble("forward", "clock", nth=4 * STEPS + 3, path="clock", offset="-1d"),
        trouble("forward", "SIGKILL", nth=7 * STEPS + 1),
    ]
    Path("clock").write_text("+0d\n")
    faked = {"LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME_TIMESTAMP_FILE": str(Path("clock").absolute())}
    # As on a real machine: what jumps is the time of day.
    faked |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "distaccum.train", *settings],
        env=environment(TROUBLES=json.dumps(jumps), **faked),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -9, done
    assert saved_updates() == [7, 6, 5, 4, 3, 2, 1]
    assert leftovers() == []
    said = [time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")) for line in _log("checkpoint of update")]
    hours = [round((after - before) / DAY) for before, after in itertools.pairwise(said)]
    assert hours == [0, 1, 0, -2, 0, 0], "the clock did jump"
    newest = checkpoints_in(Path("run/checkpoints"))[0]
    ended = runs.run(*settings)
    assert f"going on from {newest}, update 7" in ended.out
    assert outcome() == undisturbed(runs)


def _log(text: str) -> list[str]:
    return [line for line in Path("run/logs/rank0.log").read_text().splitlines() if text in line]
