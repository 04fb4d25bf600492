"""Finds the fastest settings of a training: `python -m distaccum.tune`, `distaccum-tune`."""

from __future__ import annotations

from distaccum.cli import run_tool


def main() -> None:
    """Runs the command."""
    run_tool("tune")


if __name__ == "__main__":
    main()
