"""Proves that accumulation equals the large batch: `python -m distaccum.check`, `distaccum-check`, torchrun with it."""

from __future__ import annotations

import sys

from distaccum.cli import run_entry_point
from distaccum.config.tools import CheckConfig


def _run(config: CheckConfig) -> int:
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    from distaccum.tools.check import check

    return check(config)


def main() -> None:
    """The console script. Exit status: 0 equal, 1 not equal, 2 bad input."""
    # The command line is Hydra's, which knows no --json.
    sys.argv = ["check.json=true" if argument == "--json" else argument for argument in sys.argv]
    run_entry_point(_run, config_name="check")


if __name__ == "__main__":
    main()
