"""Finds the fastest settings of a training: `python -m distaccum.tune`, `distaccum-tune`."""

from __future__ import annotations

import os

from distaccum.cli import run_entry_point
from distaccum.config.tools import TuneConfig
from distaccum.errors import UserError


def _run(config: TuneConfig) -> None:
    if "RANK" in os.environ:
        raise UserError(
            "distaccum.tune starts its own ranks, and a launcher that sets RANK (torchrun?) has started it. Run "
            "`python -m distaccum.tune …`, and say with tune.world_size=… how many ranks to tune for."
        )
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    from distaccum.tools.tune import tune

    tune(config)


def main() -> None:
    """The console script."""
    run_entry_point(_run, config_name="tune")


if __name__ == "__main__":
    main()
