"""Finds the batch size to train with: `python -m distaccum.study`, `distaccum-study`."""

from __future__ import annotations

from distaccum.cli import run_tool


def main() -> None:
    """Runs the command. Exit status: 0; 2 for bad input; 75 or 130 if it was stopped and can go on."""
    run_tool("study")


if __name__ == "__main__":
    main()
