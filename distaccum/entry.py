"""What the entry points share: composing the configuration with Hydra, and ending with one message when it is wrong.

Hydra stops here: what the entry points call gets typed dataclasses. torch is imported only once a run starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from omegaconf.resolvers import oc

from distaccum.components import SCHEMAS
from distaccum.config import TrainConfig, as_plain, conf_dir
from distaccum.errors import (
    EXIT_INTERRUPTED,
    EXIT_STATUS,
    EXIT_UNFINISHED,
    OtherRankFailedError,
    UserError,
    asked_to_exit,
)
from distaccum.launcher import launch
from distaccum.logs import check_printed, flush_output, make_output_safe, print_error, tell_launcher
from distaccum.redaction import hide, hide_variable
from distaccum.tool_configs import CheckConfig, CompareConfig, MemoryConfig, StudyConfig, TuneConfig

ROOTS: dict[str, type[TrainConfig]] = {
    "train": TrainConfig,
    "compare": CompareConfig,
    "check": CheckConfig,
    "tune": TuneConfig,
    "memory": MemoryConfig,
    "study": StudyConfig,
}
"""Entry point → the schema of its whole configuration. `conf/NAME.yaml` starts with `/schema/NAME@_here_: NAME`."""

_SECONDS_TO_BE_STOPPED = 5.0
"""How long a rank that has nothing to say waits for the launcher to stop it, once another rank has failed."""

_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""What Hydra raises when the command line or a file is wrong."""


def run_entry_point(run: Callable[[Any], int | None], config_name: str) -> None:
    """Composes `conf/<config_name>.yaml` and the command line, checks it, and runs.

    Bad input ends with one message and exit status 2; anything else that goes wrong keeps its traceback. A number that
    `run` returns becomes the exit status; of the points of a sweep, the largest one.
    """
    make_output_safe()
    try:
        _register()
        os.getcwd()
    except FileNotFoundError:
        print_error("the current folder is no longer there. Change to one that is: cd PATH.")
        sys.exit(EXIT_STATUS)
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_STATUS)
    # Hydra then hands its errors on instead of printing them in its own way, with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    is_composing, status = True, 0
    folders: set[str] = set()

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
    def job(composed: DictConfig) -> None:
        nonlocal is_composing, status
        is_composing = False
        try:
            config = _typed(composed)
            _check_sweep(config.run_dir, folders)
        except UserError as error:
            exit_before_ranks_are_joined(error)
        outcome = outcome_of(lambda: run(config), prints=config_name != "train")
        if outcome in (EXIT_INTERRUPTED, EXIT_UNFINISHED):
            leave(outcome)  # a sweep stops too
        if isinstance(outcome, int):
            status = max(status, outcome)
        is_composing = True  # the next run of a sweep

    try:
        job()
    except _COMPOSITION_ERRORS as error:
        if not is_composing:
            raise
        exit_before_ranks_are_joined(UserError(explain_composition_error(error, sys.argv[1:])))
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    finally:
        flush_output()
    leave(status)


def outcome_of(run: Callable[[], int | None], *, prints: bool = True) -> int | None:
    """Runs what ranks do together. Bad input ends the process, with one message from the rank that has something to
    say; so does, if it `prints` what it is run for, that there is no room for that."""
    try:
        outcome = run()
        if prints:
            check_printed()
        return outcome
    except OtherRankFailedError:
        # Leaving first would have the launcher stop the rank that is about to say why.
        time.sleep(_SECONDS_TO_BE_STOPPED)
    except UserError as error:
        print_error(str(error))
    except SystemExit as error:
        print_error(str(asked_to_exit(error)))
    except Exception as error:
        tell_launcher(f"{type(error).__name__}: {error}")
        raise
    leave(EXIT_STATUS)
    return EXIT_STATUS


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> TrainConfig:
    """The configuration that a command line makes, checked: for notebooks, scripts and tests.

    Raises:
        UserError: the message that the command line would end with.
    """
    _register()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return _typed(hydra.compose(config_name, list(overrides)))
    except _COMPOSITION_ERRORS as error:
        raise UserError(explain_composition_error(error, overrides)) from error


def _register() -> None:
    launch()  # whose variables decide on defaults
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(group=f"schema/{name}", name=name, node=root)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
    OmegaConf.register_new_resolver("distaccum.default_strategy", _default_strategy, replace=True)
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _environment(name: str, *default: Any) -> str | None:
    """`${oc.env:NAME}`, whose value is kept out of what is written: it would be in the configuration otherwise."""
    hide_variable(name)
    return oc.env(name, *default)


def _default_strategy() -> str:
    return "ddp" if launch().world_size > 1 else "single"


def _check_sweep(run_dir: str | None, before: set[str]) -> None:
    """Refuses a sweep of ranks, and points in one folder: the second would go on with the first one's finished run."""
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    if "RANK" in os.environ:
        raise UserError(
            "-m (multirun) under torchrun would make every rank run the whole sweep. Sweep outside: one torchrun for "
            "each point."
        )
    folder = os.path.realpath(os.path.expanduser(run_dir or ""))
    # A point's own override is a word of the command line only if all points have it.
    if run_dir is not None and (folder in before or f"run_dir={run_dir}" in sys.argv):
        raise UserError(
            f"run_dir={run_dir} is one folder for several points of -m, which would go on with each other's run. Give "
            "each its own, as in 'run_dir=sweep/${optim.lr}', or leave run_dir out."
        )
    before.add(folder)


def _typed(composed: DictConfig) -> TrainConfig:
    """The composed configuration as the dataclass of its schema, checked."""
    if strays := _stray_keys(composed):
        raise UserError(f"there is no key {strays[0]}: it was added with +, but nothing reads it.")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(explain_composition_error(error)) from error
    assert isinstance(config, TrainConfig)
    hide(as_plain(config))
    return config


def _stray_keys(node: DictConfig, path: str = "") -> list[str]:
    """Keys added with + to sections that have a schema, which OmegaConf lets pass."""
    schema = OmegaConf.get_type(node)
    known = {entry.name for entry in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else None
    strays = []
    for name in node:
        key = f"{path}.{name!s}".lstrip(".")
        entry = node._get_node(name)
        if known is not None and name not in known:
            strays.append(key)
        elif isinstance(entry, DictConfig) and not (entry._is_none() or entry._is_missing()):
            strays += _stray_keys(entry, key)
    return strays


def explain_composition_error(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """One message, without Hydra's internals, of what was wrong on the command line or in a file."""
    cause = error.__cause__ or error.__context__
    message = _first_line(error)
    match error:
        case MissingConfigException() if error.options is not None:
            group, _, option = (error.missing_cfg_file or "").rpartition("/")
            return f"there is no {group}={option}. Choose one of: {', '.join(error.options)}."
        case ConfigCompositionException() if not message and cause is not None:
            return explain_composition_error(cause)
        case ConfigCompositionException() if cause is not None and (file := re.match("In '(.+)': .+ raised", message)):
            return f"in {file[1]}.yaml: {_explain_content(cause, file[1])}"
        case ConfigCompositionException() if message.startswith("Could not override") and cause is not None:
            return _explain_unknown_key(cause, message.split("'")[1])
        case ConfigCompositionException() if message.startswith("Error merging override") and cause is not None:
            return _explain_wrong_value(cause, message.removeprefix("Error merging override "))
        case ConfigCompositionException() if given := re.match(r"Error resolving interpolation '(.*?)'", message):
            return f"{given[1]} can't be what a group is given: name one of its options, as in data=digits."
        case ConfigCompositionException() if group_given := re.search(r"schema/(\w+)@", message):
            group = group_given[1]
            return f"{group} is given more than once. Choose one option: {group}=…, without +."
        case OverrideParseException():
            wanted = "Write KEY=VALUE; a value with special characters in quotes: 'KEY=\"VALUE\"'."
            return f"{error.override or message} can't be read. {wanted}"
        case InterpolationToMissingValueError():
            return f"{message.rpartition(' ')[2]} must be given."
        case MissingMandatoryValue():
            return f"{error.full_key} must be given."
        case OmegaConfBaseException() if error.full_key:
            return f"{error.full_key}: {message}."
        case yaml.YAMLError():
            return f"a configuration file can't be read: {' '.join(str(error).split())}."
        case ValueError() if message.startswith("Config group override"):
            wrong = [text for text in overrides if text.partition("=")[0] in SCHEMAS and not _is_choice(text)]
            said = f"{', '.join(wrong)} names no option" if wrong else message
            return f"{said}. A group is given by the name of one of its options, as in data=digits."
    return f"{message}."


def _is_choice(override: str) -> bool:
    return isinstance(yaml.safe_load(override.partition("=")[2]), str | list)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _explain_content(error: BaseException, file: str) -> str:
    """What is wrong in a file, which knows its place in the configuration by its group or by its first line."""
    if not isinstance(error, ConfigKeyError) or not error.full_key:
        return explain_composition_error(error)
    if error.full_key == file.partition("/")[0]:
        return "its first line must be `# @package _global_`, so that its keys are those of the whole configuration."
    return _explain_unknown_key(error, str(error.full_key))


def _explain_wrong_value(error: BaseException, override: str) -> str:
    reason = _first_line(error)
    if "is not a ListConfig" in reason:
        reason = f"it takes a list, as in {override.partition('=')[0]}=[…]"
    elif "Optional[Union[int, str]]" in reason:
        reason = "it takes a whole number, auto or null"
    elif "is not Optional" in reason:
        reason = "it can't be null"
    return f"{override}: {reason}."


def _explain_unknown_key(error: BaseException, key: str) -> str:
    return f"there is no key {key}.{_what_there_is_instead(error, key)}"


def _what_there_is_instead(cause: BaseException, key: str) -> str:
    """What the section of an unknown key has, as far as OmegaConf's exception knows."""
    parent = getattr(cause, "parent_node", None)
    if not isinstance(parent, DictConfig) or parent._is_none() or parent._is_missing():
        return " `--cfg job` shows all keys."
    section = str(parent._get_full_key(None) or "")
    asked = key.removeprefix(f"{section}.").split(".")[0]
    known = [str(entry) for entry in parent if entry != "hydra"]
    is_open = not dataclasses.is_dataclass(OmegaConf.get_type(parent))
    parts = []
    if not is_open and (options := _options_with(section, asked)):
        parts.append(f"It belongs to {' or '.join(f'{section}={option}' for option in options)}.")
    if nearest := difflib.get_close_matches(asked, known, n=1):
        parts.append(f"Did you mean {section + '.' if section else ''}{nearest[0]}?")
    if known:
        parts.append(f"{section or 'The configuration'} has: {', '.join(known)}.")
    if is_open:
        parts.append(f"To add a key to {section}, write +{key}=….")
    return "".join(f" {part}" for part in parts)


def _options_with(group: str, key: str) -> list[str]:
    """Options of a configuration group whose schema has a key."""
    names = {
        name
        for name, schema in SCHEMAS.get(group, {}).items()
        if any(entry.name == key for entry in dataclasses.fields(schema))
    }
    return [
        path.stem
        for path in sorted((conf_dir() / group).glob("*.yaml"))
        if names & set(re.findall(rf"/schema/{group}@_here_: (\w+)", path.read_text(encoding="utf-8")))
    ]


def leave(status: int) -> None:
    """Ends the process, unless it is an ordinary one and all went well.

    A rank's work is done and its files are closed; it leaves without taking the interpreter down. A thread of gloo's
    that frees a Python object meanwhile aborts the process, once in some dozens of runs (seen with torch 2.13), and the
    launcher then takes a finished rank for a failed one.
    """
    if "RANK" in os.environ:
        logging.shutdown()
        flush_output()
        os._exit(status)
    if status:
        sys.exit(status)


def exit_before_ranks_are_joined(error: UserError) -> NoReturn:
    """Prints an error that all ranks have alike, most likely, so that it is seen once.

    Rank 0 speaks. The others wait to be stopped by the launcher, as they are when rank 0 fails; one that is still
    here after a while failed alone (it was started with other arguments), and speaks for itself.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_TO_BE_STOPPED)
    print_error(str(error))
    sys.exit(EXIT_STATUS)
