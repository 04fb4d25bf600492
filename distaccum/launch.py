"""Starts ranks as torchrun does, but forked from a process that has imported torch and the package once for all.

`python -m distaccum.launch --nproc_per_node=4 --max-restarts=3 experiment=text` takes the options of torchrun, and
after them the overrides of `distaccum.train`, or `-m MODULE` and its arguments. torchrun's own elastic agent looks
after the ranks. Those that it starts, and starts again, are forked by Python's fork server, so they import nothing.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import MutableSequence, Sequence
from multiprocessing import forkserver, resource_tracker
from typing import TYPE_CHECKING, Any

from distaccum.errors import EXIT_INTERRUPTED, EXIT_STATUS, EXIT_UNFINISHED, UserError, require
from distaccum.runtime.logs import flush_output, make_output_safe, print_error, tell_launcher
from distaccum.runtime.processes import name_process

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

_IMPORTED = (
    "torch._dynamo",  # by the first optimizer
    "torch.distributed.elastic.multiprocessing.api",  # by the start of each rank
    "distaccum.cli",
    "distaccum.data",
    "distaccum.training.run",
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

_RUNNING = -1
"""In place of the exit status of a rank that has not ended by itself."""


def main() -> None:
    """Runs the command."""
    make_output_safe()
    words = sys.argv[1:]
    try:
        if not {"-h", "--help"} & {*words} and (ranks := _number_of_ranks(words)).isdecimal():
            if int(ranks) > 1:
                os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, but before the libraries read it
            _start_server()  # which imports while this process does
        config, module, words = parsed(words)
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_STATUS)
    _start_server()
    sys.exit(_launched(config, module, words))


def _number_of_ranks(words: Sequence[str]) -> str:
    """Returns what `--nproc-per-node` says, for which torchrun's own parser would have to import torch."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = os.environ.get("PET_NPROC_PER_NODE", "1")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", default=default)
    return str(parser.parse_known_args(words)[0].nproc_per_node)


def _start_server() -> None:
    """Starts the process that ranks are forked from, unless it is there.

    Signals are blocked in it: one that goes to all processes of a job must leave it there until the ranks have ended.
    """
    multiprocessing.set_forkserver_preload(list(_IMPORTED))
    resource_tracker.ensure_running()  # before, as it unblocks some
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parsed(words: list[str]) -> tuple[LaunchConfig, str, list[str]]:
    """Returns torchrun's configuration, the module that ranks run, and its arguments.

    Raises:
        UserError: an option is impossible here.
    """
    from torch.distributed.run import config_from_args, get_args_parser, parse_min_max_nnodes

    parser = get_args_parser()
    parser.prog, parser.usage = "python -m distaccum.launch", "%(prog)s [options of torchrun] [-m MODULE] [overrides]"
    parser.description = "Starts ranks as torchrun does, forked from a process that has imported everything."
    # torchrun's parser insists on a script, where there may be no override.
    options = parser.parse_args([*words, "distaccum.train"])
    words = [options.training_script, *options.training_script_args][:-1]
    require(not options.module or bool(words), "-m wants the name of a module.")
    for given, option in ((options.no_python, "--no-python"), (options.run_path, "--run-path")):
        require(not given, f"{option} is not supported, as ranks are forked: give -m MODULE, or use torchrun.")
    require(options.start_method == "spawn", "--start-method has no meaning here, as ranks are forked: leave it out.")
    try:
        several = parse_min_max_nnodes(options.nnodes)[1] > 1
        if options.standalone or not (
            several or options.rdzv_backend != "static" or options.rdzv_endpoint or options.master_port
        ):
            options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
        options.master_port = options.master_port or 29500
        config, _, _ = config_from_args(options)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"torchrun's options are wrong: {error}. --help shows them.") from error
    if several:
        # A shared store ends with its host, and agents that stay don't tell one that comes anew where it is.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    config.start_method = "forkserver"
    return (config, words[0], words[1:]) if options.module else (config, "distaccum.train", words)


def _launched(config: LaunchConfig, module: str, words: list[str]) -> int:
    """Runs the module on the ranks of this host until they have ended; returns the exit status."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # Its traceback is of the agent's own code, whatever has happened to a rank.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_without_traceback)
    statuses = multiprocessing.get_context("forkserver").RawArray("i", [_RUNNING] * config.nproc_per_node)
    try:
        elastic_launch(config, _rank)("${local_rank}", module, words, statuses)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status in (EXIT_STATUS, EXIT_UNFINISHED, EXIT_INTERRUPTED):
            return status  # the rank has said why
        sys.stderr.write(f"{error}\n")
        return 1
    except SignalException as stop:
        ended = list(statuses)
        return 128 + stop.sigval if _RUNNING in ended else _of_all(ended)
    return 0


def _of_all(statuses: Sequence[int]) -> int:
    """Returns the exit status of ranks that have ended after a signal: a failure is not to be started again."""
    failed = {*statuses} - {0, EXIT_UNFINISHED, EXIT_INTERRUPTED}
    if failed:
        return EXIT_STATUS if failed == {EXIT_STATUS} else 1
    return max(statuses)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


# From here on: a rank.


def _rank(local_rank: str, module: str, words: list[str], statuses: MutableSequence[int]) -> None:
    """Runs a module as `python -m` does, in a process that was just forked; ends it unless the status is 0.

    Args:
        statuses: by local rank; gets this one's.
    """
    import torch

    os.setsid()  # Ctrl-C is for the agent, which hands it on
    multiprocessing.set_start_method(None, force=True)  # the usual one for data workers, not that of this process
    statuses[int(local_rank)] = _RUNNING
    name_process(f"rank{os.environ['RANK']}")
    threading.Thread(target=_end_with_agent, name="distaccum-launcher", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    status = _status(module, words)
    flush_output()
    statuses[int(local_rank)] = status
    if status:
        logging.shutdown()
        os._exit(status)


def _end_with_agent() -> None:
    agent = multiprocessing.parent_process()
    assert agent is not None
    agent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _status(module: str, words: list[str]) -> int:
    sys.argv = [module, *words]
    stdout: Any = sys.stdout
    stdout.reconfigure(line_buffering=True)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        tell_launcher(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
