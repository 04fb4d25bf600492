"""Proves that accumulation equals the large batch: `python -m distaccum.check`, `distaccum-check`, torchrun with it."""

from __future__ import annotations

import importlib
import sys

from distaccum.cli import Parser, leave, outcome_of, run_tool


def main() -> None:
    """Runs the command. Exit status: 0 equal, 1 not equal, 2 bad input."""
    words = sys.argv[1:]
    if any(word.partition("=")[0] == "--trainer" for word in words):  # anybody's, so there is nothing to compose
        tool = importlib.import_module("distaccum.tools.check.trainer")
        options = tool.options_of(Parser("check", "--trainer MODULE:FUNCTION", tool.__doc__), words)
        leave(outcome_of(lambda: tool.check_trainer(options)))
    else:
        run_tool("check")


if __name__ == "__main__":
    main()
