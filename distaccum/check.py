"""Proves that accumulation equals the large batch: `python -m distaccum.check`, `distaccum-check`, torchrun with it."""

from __future__ import annotations

from distaccum.cli import run_tool


def main() -> None:
    """Runs the command. Exit status: 0 equal, 1 not equal, 2 bad input."""
    run_tool("check")


if __name__ == "__main__":
    main()
