"""Compares placements of one training: `python -m distaccum.compare`, `distaccum-compare`."""

from __future__ import annotations

from distaccum.cli import run_tool


def main() -> None:
    """Runs the command."""
    run_tool("compare")


if __name__ == "__main__":
    main()
