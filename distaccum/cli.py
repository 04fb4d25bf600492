"""Shared by the entry points: they compose the configuration with Hydra, and end with one message when it is wrong.

Only this module, `distaccum.config.compose` and `distaccum.config.sweep` use Hydra; all others get typed dataclasses.
torch is imported only when a run starts.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from distaccum.config import conf_dir
from distaccum.config.compose import (
    composed_by_hydra,
    explain_composition_error,
    register_schemas,
    typed,
)
from distaccum.config.sweep import Finished, Sweep
from distaccum.errors import (
    EXIT_INTERRUPTED,
    EXIT_STATUS,
    EXIT_UNFINISHED,
    OtherRankFailedError,
    UserError,
    asked_to_exit,
)
from distaccum.runtime.imports import quick_imports
from distaccum.runtime.logs import check_printed, console, flush_output, make_output_safe, print_error, tell_launcher

_SECONDS_TO_BE_STOPPED = 5.0
"""How long a rank that prints nothing waits for the launcher to stop it, after another rank has failed."""

Outcome = TypeVar("Outcome")

_OWN_RANKS = {
    "compare": "compare.world_sizes=[…] how many ranks to compare",
    "study": "study.ranks=… how many ranks each run is to have",
    "tune": "tune.world_size=… how many ranks to tune for",
}
"""By tool that starts its own ranks: the key for their number."""


def run_tool(name: str) -> None:
    """Runs `distaccum.tools.NAME.NAME` as `run_entry_point` does.

    `--json` is short for `NAME.json=true` where that key exists; Hydra has no such option.
    """

    def run(config: Any) -> int | None:
        if name in _OWN_RANKS and "RANK" in os.environ:
            raise UserError(
                f"distaccum.{name} starts its own ranks, and a launcher that sets RANK (torchrun?) has started it. Run "
                f"`python -m distaccum.{name} …`, and set by {_OWN_RANKS[name]}."
            )
        # Here and not above: --help, --cfg and a mistake in an override shouldn't wait for torch.
        with quick_imports():
            tool: Callable[[Any], int | None] = getattr(importlib.import_module(f"distaccum.tools.{name}"), name)
        return tool(config)

    if name in ("check", "memory"):
        sys.argv = [f"{name}.json=true" if argument == "--json" else argument for argument in sys.argv]
    run_entry_point(name, run)


class Parser(argparse.ArgumentParser):
    """The command line of a program without a configuration; a mistake ends with one message and the right form."""

    def __init__(self, name: str, how: str, description: str) -> None:
        super().__init__(prog=f"python -m distaccum.{name}", description=description, allow_abbrev=False)
        self._how = how

    def error(self, message: str) -> NoReturn:
        exit_before_ranks_are_joined(UserError(f"{message}. Write: {self.prog} {self._how}; --help shows all."))


def run_entry_point(config_name: str, run: Callable[[Any], int | Finished | None]) -> None:
    """Composes `conf/<config_name>.yaml` and the command line, checks it, and runs.

    Bad input ends with one message and exit status 2; any other error keeps its traceback. A number that `run` returns
    becomes the exit status; of the points of a sweep, the largest one. What else it returns of a finished run is for
    the sweep's table and its sweeper.
    """
    _prepare(config_name)
    is_composing, status = True, 0
    asks_hydra = _asks_hydra(sys.argv[1:])
    sweep = Sweep()

    def job(composed: DictConfig) -> float | None:
        nonlocal is_composing, status
        is_composing = False
        try:
            config = typed(composed)
            if asks_hydra:
                sweep.begin(config)
        except UserError as error:
            exit_before_ranks_are_joined(error)
        outcome = outcome_of(lambda: run(config), prints=config_name != "train")
        if outcome in (EXIT_INTERRUPTED, EXIT_UNFINISHED):
            leave(outcome)  # a sweep stops too
        if isinstance(outcome, int):
            status = max(status, outcome)
        found = None
        if asks_hydra and isinstance(outcome, Finished):
            found = outcome_of(lambda: sweep.end(outcome), prints=False)
        is_composing = True  # the next run of a sweep
        return found

    try:
        if asks_hydra:
            sys.argv[1:] = _options_last(sys.argv[1:])
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
        else:
            job(composed_by_hydra(sys.argv[1:], config_name))
        if sweep.table is not None:
            console.print(f"points         {sweep.table}")
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except UserError as error:
        exit_before_ranks_are_joined(error)
    except Exception as error:  # of the many that Hydra lets through
        if not is_composing:
            raise
        exit_before_ranks_are_joined(UserError(explain_composition_error(error, sys.argv[1:], config_name)))
    finally:
        flush_output()
    leave(status)


def _prepare(config_name: str) -> None:
    """Makes output safe, and Hydra know the schemas and raise its errors."""
    make_output_safe()
    try:
        register_schemas(config_name)
        os.getcwd()
    except (FileNotFoundError, UserError) as error:
        is_gone = isinstance(error, FileNotFoundError)
        print_error("the current folder no longer exists. Change to another one: cd PATH." if is_gone else str(error))
        sys.exit(EXIT_STATUS)
    # Hydra then raises its errors instead of printing them and exiting with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"


def _asks_hydra(words: list[str]) -> bool:
    """Returns whether a command line has more than overrides of the package's own keys: options, or keys of Hydra's.

    `hydra.main` composes everything twice, the first time to see whether this is a sweep: a sixth of a second.
    """
    return any(word.startswith("-") or "hydra" in word for word in words)


def _options_last(words: list[str]) -> list[str]:
    """Returns a command line with Hydra's options behind all overrides, where its parser wants them.

    Raises:
        UserError: there is no such option, or it has a wrong value.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}. Write KEY=VALUE …, and options such as `--cfg job`; --help shows all.")

    parser.error = refuse  # type: ignore[method-assign]
    found, left = parser.parse_known_args(words)
    if strange := [word for word in left if word.startswith("-")]:
        refuse(f"there is no option {', '.join(strange)}")
    overrides = [*found.overrides, *left]
    options = list(words)
    for word in overrides:
        options.remove(word)
    return [*overrides, *options]


def outcome_of(run: Callable[[], Outcome], *, prints: bool = True) -> Outcome:
    """Runs what ranks do together, and returns its result. Bad input ends the process with one message of the rank that
    has found it. With `prints`, so does output that was lost for want of room."""
    try:
        outcome = run()
        if prints:
            check_printed()
        return outcome
    except OtherRankFailedError:
        # If this rank left first, the launcher would stop the other one before it has printed the reason.
        time.sleep(_SECONDS_TO_BE_STOPPED)
    except UserError as error:
        print_error(str(error))
    except SystemExit as error:
        print_error(str(asked_to_exit(error)))
    except Exception as error:
        tell_launcher(f"{type(error).__name__}: {error}")
        raise
    leave(EXIT_STATUS)
    raise AssertionError("it has left")


def leave(status: int) -> None:
    """Ends the process, unless it is no rank and `status` is 0.

    A rank, whose files are closed, ends without finalizing the interpreter: a thread of gloo's that frees a Python
    object meanwhile aborts the process, once in some dozens of runs (seen with torch 2.13), and the launcher then takes
    a finished rank for a failed one. A rank that was forked by `distaccum.launch` does so in any case, after that has
    seen its status.
    """
    if "RANK" in os.environ and multiprocessing.parent_process() is None:
        logging.shutdown()
        flush_output()
        os._exit(status)
    if status:
        sys.exit(status)


def exit_before_ranks_are_joined(error: UserError) -> NoReturn:
    """Prints an error that all ranks most likely have alike, so that it is seen once, and exits.

    Rank 0 prints it. The others wait until the launcher stops them, as it does when rank 0 fails; one that is not
    stopped has failed alone (it was started with other arguments), and prints its own.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_TO_BE_STOPPED)
    print_error(str(error))
    sys.exit(EXIT_STATUS)
