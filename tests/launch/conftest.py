from __future__ import annotations

from collections.abc import Iterator

import pytest
import slurm_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_lab.SlurmLab]:
    """A SLURM of two nodes, for all tests together."""
    if reason := slurm_lab.why_not():
        pytest.skip(reason)
    lab = slurm_lab.SlurmLab(tmp_path_factory.mktemp("slurm"))
    yield lab
    lab.close()
