"""Finds the batch size to train with: `python -m distaccum.study`, `distaccum-study`."""

from __future__ import annotations

import os

from distaccum.cli import run_entry_point
from distaccum.config.tools import StudyConfig
from distaccum.errors import UserError


def _run(config: StudyConfig) -> int:
    if "RANK" in os.environ:
        raise UserError(
            "distaccum.study starts its own ranks, and a launcher that sets RANK (torchrun?) has started it. Run "
            "`python -m distaccum.study …`, and say with study.ranks=… how many ranks each run is to have."
        )
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    from distaccum.tools.study import study

    return study(config)


def main() -> None:
    """The console script. Exit status: 0; 2 for bad input; 75 or 130 if it was stopped and can go on."""
    run_entry_point(_run, config_name="study")


if __name__ == "__main__":
    main()
