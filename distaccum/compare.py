"""Compares placements of one training: `python -m distaccum.compare`, `distaccum-compare`."""

from __future__ import annotations

import os

from distaccum.cli import run_entry_point
from distaccum.config.tools import CompareConfig
from distaccum.errors import UserError


def _run(config: CompareConfig) -> None:
    if "RANK" in os.environ:
        raise UserError(
            "distaccum.compare starts its own ranks, and a launcher that sets RANK (torchrun?) has started it. Run "
            "`python -m distaccum.compare …`, and say with compare.world_sizes=[…] how many ranks to compare."
        )
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    from distaccum.tools.compare import compare

    compare(config)


def main() -> None:
    """The console script."""
    run_entry_point(_run, config_name="compare")


if __name__ == "__main__":
    main()
