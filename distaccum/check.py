"""Proves that accumulation equals the large batch: `python -m distaccum.check`, `distaccum-check`, torchrun with it."""

from __future__ import annotations

import sys

from distaccum.cli import Parser, leave, outcome_of, run_tool


def main() -> None:
    """Runs the command. Exit status: 0 equal, 1 not equal, 2 bad input."""
    words = sys.argv[1:]
    if any(word.partition("=")[0] == "--trainer" for word in words):  # anybody's, so there is nothing to compose
        # Here and not above: the other form's --help shouldn't wait for torch.
        from distaccum.tools.check import trainer

        options = trainer.options_of(Parser("check", "--trainer MODULE:FUNCTION", str(trainer.__doc__)), words)
        leave(outcome_of(lambda: trainer.check_trainer(options)))
    else:
        run_tool("check")


if __name__ == "__main__":
    main()
