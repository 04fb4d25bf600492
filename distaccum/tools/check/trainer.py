"""Checks anybody's trainer: `python -m distaccum.check --trainer my_module:make_trainer`."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import reduce
from itertools import chain
from typing import Any

import torch

from distaccum.config.enums import DeviceChoice
from distaccum.errors import UserError, require, require_at_least, require_positive
from distaccum.runtime.devices import resolve_device
from distaccum.runtime.torchvision_operators import tolerate_missing_operators
from distaccum.runtime.world import joined_world
from distaccum.testing import Loop, UpdateDiffersError, loop_of
from distaccum.testing.same_update import Comparison, comparisons
from distaccum.tools.check.report import CheckReport, CutRow, Finding, ParameterRow, printed


def options_of(parser: ArgumentParser, words: list[str]) -> Namespace:
    """Returns the options of a command line; a mistake in it ends the process with one message."""
    parser.add_argument("--trainer", required=True, metavar="MODULE:FUNCTION", help="a function that makes the trainer")
    parser.add_argument("--samples", type=int, default=12, help="of the window (default: 12)")
    parser.add_argument("--even", action="store_true", help="no cuts into micro-batches of unequal sizes")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative, of each tensor (default: 1e-6)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(words)


def check_trainer(options: Namespace) -> int:
    """Examines the trainer, prints the report on rank 0, and returns the exit status on every rank."""
    with joined_world() as world:
        with world.together():
            require_at_least(2, __samples=options.samples)
            require_positive(__tolerance=options.tolerance)
            tolerate_missing_operators()  # Transformers and Lightning import torchvision where there is one
            make_trainer = _imported(options.trainer)
        world.init_process_group(resolve_device(DeviceChoice.auto, world.local_rank))
        with redirect_stdout(sys.stderr):  # of the trainer
            loop = loop_of(make_trainer, options.samples)
            with _quiet():
                report = _examined(options.trainer, loop, options.tolerance, uneven=not options.even)
        if world.is_main:
            printed(report, as_json=options.json, worst=5)
        return world.from_main(report.status)


def _imported(path: str) -> Callable[[], Any]:
    module, _, name = path.partition(":")
    require(bool(module and name), f"--trainer {path} must be MODULE:FUNCTION, as in my_module:make_trainer.")
    try:
        found: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:  # an import runs arbitrary code, and whatever it raises is the reason
        raise UserError(
            f"--trainer {path} cannot be imported: {type(error).__name__}: {error}. Give a module that Python finds "
            "from here (PYTHONPATH helps), and a function in it."
        ) from error
    if not callable(found):
        raise UserError(f"--trainer {path} is a {type(found).__name__}, not a function that makes the trainer.")
    return found  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what trainers log, which they do again for every update; the first, which only makes samples, speaks.

    Also keeps what has been imported from the garbage collection that trainers begin with, which takes a second else.
    """
    gc.freeze()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        gc.unfreeze()


def _examined(name: str, loop: Loop, tolerance: float, *, uneven: bool) -> CheckReport:
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    report = CheckReport(
        model=name,
        precision="fp64",
        world_size=world_size,
        tolerance_fp64=tolerance,
        tolerance=tolerance,
        windows=[len(loop.samples)],
    )
    try:
        found = list(comparisons(replace(loop, uneven=loop.uneven and uneven), tolerance=tolerance))
    except UpdateDiffersError as error:
        what = str(error)
        report.findings.append(
            Finding(kind="not_repeatable", because="the same update twice differs", what=what, where=name, remedy="")
        )
        return report
    report.rows = list(map(_row, found))
    causes = {one.cause.kind: one.cause for one in reversed(found) if one.cause}
    report.findings = [
        Finding(kind=kind, because=cause.because, what=cause.what, where=name, remedy=cause.remedy)
        for kind, cause in reversed(causes.items())
    ]
    report.parameters = _parameters(found)
    return report


def _row(found: Comparison) -> CutRow:
    by_rank = dict.fromkeys(" + ".join(map(str, sizes)) for sizes in found.sizes)
    worst, error = next(iter(found.gradients.items()))
    return CutRow(
        window=1,
        precision="float64",
        ranks=len(found.sizes),
        cut=" | ".join(by_rank),
        micro_steps=len(found.sizes[0]),
        sizes=list(chain(*found.sizes)),
        gradient_error=found.gradient_error,
        worst_parameter=worst,
        worst_error=error,
        parameters_error=found.after_error,
        equal=found.cause is None,
    )


def _parameters(found: list[Comparison]) -> list[ParameterRow]:
    rows = [
        ParameterRow(
            name=name,
            float64_error=max(one.gradients[name] for one in found),
            configured_error=None,
            step_error=max(one.after[name] for one in found),
        )
        for name in found[0].gradients
    ]
    return sorted(rows, key=lambda row: row.float64_error or 0.0, reverse=True)
