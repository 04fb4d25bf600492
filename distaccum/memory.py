"""Measures what needs memory, and what fits: `python -m distaccum.memory`, `distaccum-memory`."""

from __future__ import annotations

from distaccum.cli import run_tool


def main() -> None:
    """Runs the command. Exit status: 0 it fits, 1 it does not, 2 bad input."""
    run_tool("memory")


if __name__ == "__main__":
    main()
