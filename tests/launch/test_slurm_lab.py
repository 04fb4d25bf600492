from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from slurm_lab import SlurmLab


def test_two_labs_live_side_by_side_and_leave_nothing(lab: SlurmLab, tmp_path: Path) -> None:
    # SLURM makes sockets in its folder, whose paths have at most 108 characters: pytest's own can be longer.
    with tempfile.TemporaryDirectory() as folder, closing(SlurmLab(Path(folder))) as other:
        job = other.submit(_script(tmp_path), cwd=tmp_path)
        assert other.wait(job).log == "127.0.0.2\n127.0.0.3\n"
        endless = other.submit(_script(tmp_path, "sleep 1000"), cwd=tmp_path)
        other.wait_until(lambda: other.state(endless)["JobState"] == "RUNNING", endless)
        other.close()
        assert not [path for path in Path("/proc").glob("[0-9]*/environ") if folder.encode() in _content(path)]
    with pytest.raises(AssertionError, match="Invalid job id"):
        lab.state("999999")


def _script(folder: Path, command: str = "srun --label hostname >/dev/null; scontrol show hostnames") -> Path:
    path = folder / "script.sbatch"
    path.write_text(f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\n{command}\n")
    return path


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
