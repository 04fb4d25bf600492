"""The own loop with a checkpointer, of docs/resuming.md."""

from __future__ import annotations

from pathlib import Path

import forking
from documents import block_run_by

BLOCK = block_run_by("checkpoints/test_resumed_loop.py")


def test_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    loop = tmp_path / "loop.py"
    # As often as told, whether or not the one before is on the disk yet.
    loop.write_text(
        BLOCK.replace("        if checkpointer.is_due", "        checkpointer.wait()\n        if checkpointer.is_due")
    )
    killed = tmp_path / "killed.py"
    text = loop.read_text().replace(
        "        update = acc", "        if accumulator.updates == 23: os._exit(9)\n        update = acc"
    )
    killed.write_text("import os\n" + text)

    def run(script: Path, folder: str) -> tuple[int, list[str]]:
        (tmp_path / folder).mkdir(exist_ok=True)
        done = forking.run(str(script), folder=tmp_path / folder)
        return done.status, done.out.splitlines()

    status, wanted = run(loop, "whole")
    assert (status, len(wanted)) == (0, 44)
    status, before = run(killed, "cut")
    assert (status, before) == (9, wanted[:23])
    status, after = run(loop, "cut")
    assert (status, after) == (0, wanted[20:])
