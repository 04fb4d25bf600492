"""Logs the run's numbers to Weights & Biases."""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distaccum.config.enums import WandbMode
from distaccum.config.redaction import redacted_arguments
from distaccum.errors import UserError
from distaccum.observers.background import Background, default_environment, forks_wait
from distaccum.observers.base import EvaluationRecord, Observer, RunEnd, RunStart, UpdateRecord
from distaccum.observers.flattening import flattened
from distaccum.runtime.files import write_text

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_SERVICE = "WANDB_SERVICE"
"""Environment variable that leads to wandb's background process, set while there is one."""

_SECONDS_TO_BEGIN = 180.0
"""Time for wandb to begin, for which the end of a run waits; its own limit is 90 s."""

_SECONDS_TO_END = 30.0
"""Time for wandb to send the rest at the end of a run."""


class Wandb(Observer):
    """Logs to Weights & Biases, over the number of the update as x axis: `train/…` and `eval/…`.

    wandb is imported and begins in a thread, beside the first updates, which takes it two seconds; updates wait in a
    queue meanwhile, and so does the fork of data workers. If it can't begin, the next report of the run raises the
    error. Afterwards the thread logs: if it fails or hangs, a warning says so, and the training goes on.

    All that it writes lies in `run_dir/wandb/`; offline, nothing goes out to the network, and `wandb sync` uploads the
    run later. Its background process and its hooks last as long as the run.

    A run that is started again in the same folder is the same run to wandb: its id is in `run_dir/wandb/run_id`. What
    was logged after the last checkpoint is then logged again, so that there are two points for one `update`: the same
    ones twice, to rounding, and `metrics.jsonl` has each once. Offline, each start leaves a folder of its own in
    `run_dir/wandb/`, and `wandb sync run_dir/wandb` brings them together, in order of their start (wandb 0.31; older
    ones upload the last in place of those before).
    """

    def __init__(
        self, run_dir: Path, mode: WandbMode, project: str, name: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        """`name` None: the name of the run folder."""
        self._run_dir = run_dir.absolute()
        self._mode = mode
        self._project = project
        self._name = name or self._run_dir.name
        self._tags = tuple(tags)
        self._run: Run | None = None
        self._session: _Session | None = None
        self._ended = False
        self._background: Background | None = None
        self._has_begun = threading.Event()
        self._start_error: Exception | None = None

    def on_start(self, start: RunStart) -> None:
        if find_spec("wandb") is None:
            raise self._missing("there is none")
        self._background = Background("wandb")
        self._background.later(lambda: self._begin_or_fail(start))

    def _missing(self, reason: object) -> UserError:
        return UserError(
            f"wandb.mode={self._mode.value} needs the package wandb, which cannot be imported ({reason}): "
            "install it (pip install wandb), or set wandb.mode=disabled."
        )

    def _begin_or_fail(self, start: RunStart) -> None:
        """Begins the run, in the thread; what goes wrong is for `_raise_start_error` to raise in the main one."""
        try:
            with forks_wait():
                self._begin(start)
        except Exception as error:
            self._start_error = error
        finally:
            self._has_begun.set()

    def _begin(self, start: RunStart) -> None:
        try:
            import wandb
        except ImportError as error:
            raise self._missing(error) from error
        try:
            run_id = self._run_id()
            self._session = _Session(self._run_dir, self._mode)
            with _redacted_command_line():
                self._run = wandb.init(
                    id=run_id,
                    resume="allow",
                    dir=str(self._run_dir),
                    mode=self._mode.value,  # type: ignore[arg-type]
                    project=self._project,
                    name=self._name,
                    tags=self._tags,
                    config=start.config,
                    settings=wandb.Settings(console="off", silent=True),
                )
        except (wandb.Error, OSError, ValueError) as error:
            raise self._failure(error) from error
        self._run.define_metric("update")
        self._run.define_metric("train/*", step_metric="update")
        self._run.define_metric("eval/*", step_metric="update")

    def _raise_start_error(self) -> None:
        error, self._start_error = self._start_error, None
        if error is not None:
            raise error

    def _later(self, call: Callable[[Run], object]) -> None:
        """Makes a call with the run, after those that wait; raises why there is none if it could not begin."""
        assert self._background is not None, "on_start comes first"
        self._raise_start_error()

        def call_if_begun() -> None:
            if self._run is not None:
                call(self._run)

        self._background.later(call_if_begun)

    def _run_id(self) -> str:
        """Returns wandb's id of the run: that of an earlier start in this folder, or a new one."""
        path = self._run_dir / "wandb" / "run_id"
        if path.exists():
            written = path.read_bytes().strip().decode("ascii", "replace")
            if _RUN_ID.fullmatch(written):
                return written
            logger.warning("%s holds no id of a wandb run: this one gets a new id", path)
        path.parent.mkdir(exist_ok=True)
        run_id = secrets.token_hex(4)  # of the length of wandb's own
        write_text(path, f"{run_id}\n")
        return run_id

    def _failure(self, error: Exception) -> UserError:
        if self._mode is WandbMode.online:
            mend = "Log in with `wandb login` or WANDB_API_KEY, or set wandb.mode=offline and run `wandb sync` later."
        else:
            mend = "Mend that, or set wandb.mode=disabled."
        # Of what pydantic refuses, without its advice.
        wrong = [f"{entry['loc'][0]}: {entry['msg']}" for entry in error.errors()] if hasattr(error, "errors") else []
        reason = ("; ".join(wrong) or str(error)).rstrip(".")
        return UserError(f"wandb cannot start with wandb.mode={self._mode.value}: {reason}. {mend}")

    def on_update(self, record: UpdateRecord) -> None:
        self._log("train", record.update, flattened(record.known()))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        references = {f"reference/{name}": value for name, value in record.references.items()}
        sample = {} if record.sample is None else {"sample": record.sample}
        self._log("eval", record.update, {**record.metrics, **references, **sample, "seconds": record.seconds})

    def _log(self, group: str, update: int, values: dict[str, Any]) -> None:
        row = {"update": update, **{f"{group}/{name}": value for name, value in values.items()}}
        self._later(lambda run: run.log(row))

    def on_end(self, end: RunEnd) -> None:
        assert self._background is not None, "on_start comes first"
        if not self._has_begun.wait(_SECONDS_TO_BEGIN):
            self._background.lose(f"it has not begun within {_SECONDS_TO_BEGIN:g} s")
        others = ("evaluation", "interrupted", "is_saved", "run_dir")
        summary = {name: value for name, value in asdict(end).items() if name not in others}
        self._later(lambda run: run.summary.update(summary))
        if end.interrupted is None:
            self._ended = True
        else:
            self._later(lambda run: run.mark_preempting())  # so that wandb calls it preempted, and not failed

    def close(self) -> None:
        exit_code = 0 if self._ended else 1
        if self._background is None:
            return
        with suppress(Exception):  # something else has ended the run, before this could be raised
            self._later(lambda run: run.finish(exit_code=exit_code))
        background, self._background = self._background, None
        if not background.end(_SECONDS_TO_END):
            background.lose(f"it has not ended within {_SECONDS_TO_END:g} s; `wandb sync` sends what it has kept")
            if self._session is not None:
                self._session.kill()  # which ends what the thread waits for
            background.end(_SECONDS_TO_END)
        self._run = None
        session, self._session = self._session, None
        if session is not None:
            session.close(exit_code)


class _Session:
    """wandb's part of this process: its background process, threads, hooks and global settings.

    `run.finish()` leaves all of those behind. Where the process had a session before (somebody's own `wandb.init()`),
    that one is used and left as it is.
    """

    def __init__(self, run_dir: Path, mode: WandbMode) -> None:
        import wandb

        self._hooks = sys.excepthook, sys.exit
        self._owned = _SERVICE not in os.environ
        if self._owned:
            with default_environment(
                # The log of the background process would go to the home folder.
                WANDB_CACHE_DIR=str(run_dir / "wandb" / "cache"),
                # wandb's reports on itself, which need threads that outlive the session.
                WANDB_ERROR_REPORTING="false",
            ):
                # Settings of the whole session, as those of a run come too late to silence the login or keep it from
                # asking for a key, which would hang a run that nobody watches.
                wandb.setup(wandb.Settings(mode=mode.value, console="off", silent=True))  # type: ignore[arg-type]
        self._wandb_hooks = sys.excepthook, sys.exit
        connection = getattr(wandb.setup(), "_connection", None)
        self._process: Any = getattr(getattr(connection, "_proc", None), "_process", None)

    def kill(self) -> None:
        """Ends the background process at once."""
        if self._owned and self._process is not None:
            self._process.kill()

    def close(self, exit_code: int) -> None:
        import wandb

        if not self._owned:
            return
        try:
            wandb.teardown(exit_code)
        except Exception as error:
            logger.debug("wandb could not be ended in good order", exc_info=error)
        except SystemExit as error:  # how wandb reports that its background process failed
            logger.warning(
                "wandb's background process ended with status %s: what it logged may be incomplete.", error.code
            )
        # Only if nobody hooked in after wandb.
        if sys.excepthook == self._wandb_hooks[0]:
            sys.excepthook = self._hooks[0]
        if sys.exit == self._wandb_hooks[1]:
            sys.exit = self._hooks[1]


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """Hides secret arguments of the command line from wandb, which stores them."""
    before = sys.argv
    sys.argv = [*before[:1], *redacted_arguments(before[1:])]
    try:
        yield
    finally:
        sys.argv = before
