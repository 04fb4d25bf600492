"""What the entry points share: composing the configuration with Hydra, and ending with one message when it is wrong.

Hydra stops here: what the entry points call gets typed dataclasses. torch is imported only once a run starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from distaccum.components import SCHEMAS
from distaccum.config import TrainConfig, conf_dir
from distaccum.errors import EXIT_STATUS, OtherRankFailedError, UserError
from distaccum.logs import print_error

_SECONDS_FOR_RANK_0_TO_FAIL = 5.0


def run_entry_point(run: Callable[[TrainConfig], object], config_name: str) -> None:
    """Composes `conf/<config_name>.yaml` and the command line, checks it, and runs.

    Bad input ends with one message and exit status 2; anything else that goes wrong keeps its traceback.
    """
    _register()
    # Hydra then hands its errors on instead of printing them in its own way, with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
    def job(composed: DictConfig) -> None:
        try:
            config = _typed(composed)
        except UserError as error:
            _exit_before_ranks_are_joined(error)
        try:
            run(config)
        except OtherRankFailedError:
            sys.exit(EXIT_STATUS)
        except UserError as error:
            print_error(str(error))
            sys.exit(EXIT_STATUS)

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        _exit_before_ranks_are_joined(UserError(explain_composition_error(error)))


def _register() -> None:
    store = ConfigStore.instance()
    store.store(group="schema/train", name="train", node=TrainConfig)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
    OmegaConf.register_new_resolver(
        "distaccum.default_strategy",
        lambda: "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single",
        replace=True,
    )


def _typed(composed: DictConfig) -> TrainConfig:
    """The composed configuration as the dataclass of its schema, checked."""
    if HydraConfig.get().mode is RunMode.MULTIRUN and "RANK" in os.environ:
        raise UserError(
            "-m (multirun) under torchrun would make every rank run the whole sweep. Sweep outside: one torchrun for "
            "each point."
        )
    if strays := _stray_keys(composed):
        raise UserError(f"there is no key {strays[0]}: it was added with +, but nothing reads it.")
    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} must be given, for example {error.full_key}=…") from error
    except OmegaConfBaseException as error:
        raise UserError(explain_composition_error(error)) from error
    assert isinstance(config, TrainConfig)
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


def explain_composition_error(error: BaseException) -> str:
    """One message, without Hydra's internals, of what was wrong on the command line or in a file."""
    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException):
        lines = [line.strip() for line in str(error).splitlines()]
        options = [line for line in lines[1:] if line and not line.startswith(("Available", "Config", "provider"))]
        asked = error.missing_cfg_file or ""
        group, _, option = asked.rpartition("/")
        return f"there is no {group}={option}. Choose one of: {', '.join(options)}." if group else lines[0]
    if isinstance(error, ConfigCompositionException) and str(error).startswith("Could not override"):
        key = str(error).split("'")[1]
        return f"there is no key {key}.{_nearest_keys(cause, key)}"
    message = str(error).splitlines()[0]
    if isinstance(error, ConfigCompositionException) and message.startswith("Error merging override"):
        return f"{message.removeprefix('Error merging override ')}: {str(cause).splitlines()[0]}."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {message}."
    if isinstance(error, OverrideParseException):
        return f"{message}. Write KEY=VALUE; a value with special characters in quotes: 'KEY=\"VALUE\"'."
    return message


def _nearest_keys(cause: BaseException, key: str) -> str:
    """What the section has instead, as far as OmegaConf's exception knows."""
    parent = getattr(cause, "parent_node", None)
    if not isinstance(parent, DictConfig) or parent._is_none() or parent._is_missing():
        return " `--cfg job` shows all keys."
    section = str(parent._get_full_key(None) or "")
    asked = key.removeprefix(f"{section}.").split(".")[0]
    known = [str(entry) for entry in parent if entry != "hydra"]
    nearest = difflib.get_close_matches(asked, known, n=1)
    meant = f" Did you mean {section + '.' if section else ''}{nearest[0]}?" if nearest else ""
    homes = [
        option
        for option, schema in SCHEMAS.get(section, {}).items()
        if any(entry.name == asked for entry in dataclasses.fields(schema))
    ]
    belongs = f" It belongs to {section}={homes[0]}." if homes else ""
    return f"{belongs}{meant} {section or 'The configuration'} has: {', '.join(known)}."


def _exit_before_ranks_are_joined(error: UserError) -> NoReturn:
    """Prints an error that all ranks have alike, most likely, so that it is seen once.

    Rank 0 speaks. The others wait to be stopped by the launcher, as they are when rank 0 fails; one that is still
    here after a while failed alone (it was started with other arguments), and speaks for itself.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(_SECONDS_FOR_RANK_0_TO_FAIL)
    print_error(str(error))
    sys.exit(EXIT_STATUS)
