"""Where the memory goes, and what fits: `python -m distaccum.memory`, `distaccum-memory`."""

from __future__ import annotations

import sys

from distaccum.cli import run_entry_point
from distaccum.config.tools import MemoryConfig


def _run(config: MemoryConfig) -> int:
    # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
    from distaccum.tools.memory import memory

    return memory(config)


def main() -> None:
    """The console script. Exit status: 0 it fits, 1 it does not, 2 bad input."""
    # The command line is Hydra's, which knows no --json.
    sys.argv = ["memory.json=true" if argument == "--json" else argument for argument in sys.argv]
    run_entry_point(_run, config_name="memory")


if __name__ == "__main__":
    main()
