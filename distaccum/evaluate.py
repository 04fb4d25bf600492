"""Evaluates trained models, alone and together: `python -m distaccum.evaluate PATH…`, `distaccum-evaluate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from distaccum.cli import Parser, exit_before_ranks_are_joined, leave, outcome_of
from distaccum.config.enums import Combination, DeviceChoice, Weights, WhichCheckpoint
from distaccum.errors import UserError
from distaccum.runtime.logs import make_output_safe


def _parser() -> Parser:
    parser = Parser(
        "evaluate",
        "PATH [PATH …] [KEY=VALUE …]",
        "Evaluates what training has saved, each model alone and all of them together. Under torchrun, the ranks share "
        "the data.",
    )
    parser.add_argument(
        "argument",
        nargs="+",
        metavar="PATH|KEY=VALUE",
        help="PATH: the folder of a run, or of one of its checkpoints. KEY=VALUE: a change of the training's "
        "configuration, in data.evaluation.…, task.…, precision.name or train.eval_batch_size",
    )

    def choice(name: str, kind: type[Enum], default: str | None, text: str) -> None:
        parser.add_argument(name, choices=[entry.value for entry in kind], default=default, help=text)

    choice("--which", WhichCheckpoint, "newest", "of a run's checkpoints (default: newest)")
    choice("--weights", Weights, "raw", "the weights themselves, or an average of them (default: raw)")
    choice(
        "--combine", Combination, None, "how several models are combined: the mean of these (default: probabilities)"
    )
    parser.add_argument("--class-dim", type=int, metavar="N", help="dimension of the outputs that is the classes")
    choice("--device", DeviceChoice, "auto", "auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, class or function that may be called though only a checkpoint names it; may be given several "
        "times. distaccum's own, and those that the command line names, are trusted",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="a file for the results as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exit status: 0, or 2 for bad input."""
    make_output_safe()
    given = _parser().parse_intermixed_args(arguments)
    overrides = [text for text in given.argument if "=" in text and not os.path.exists(text)]
    paths = [Path(text) for text in given.argument if text not in overrides]
    if not paths:
        exit_before_ranks_are_joined(UserError("there is no PATH: give the folder of a run, or of a checkpoint."))
    # Here and not above: --help and a mistake on the command line shouldn't wait for torch.
    from distaccum.tools.evaluate import Wishes, evaluate

    wishes = Wishes(
        paths=paths,
        overrides=overrides,
        which=WhichCheckpoint(given.which),
        weights=Weights(given.weights),
        combine=Combination(given.combine) if given.combine else None,
        class_dim=given.class_dim,
        device=DeviceChoice(given.device),
        output=given.out,
        trust=given.trust,
    )
    leave(outcome_of(lambda: evaluate(wishes)) or 0)


if __name__ == "__main__":
    main()
