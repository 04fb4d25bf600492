"""Composes the typed configuration of a command line by Hydra, and explains mistakes in it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from typing import Any

import hydra
import yaml
from hydra._internal import defaults_list
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from omegaconf.resolvers import oc

from distaccum.config import TrainConfig, as_plain, conf_dir
from distaccum.config.launcher import launch
from distaccum.config.redaction import hide, hide_variable
from distaccum.config.schemas import SCHEMAS
from distaccum.config.tools import CheckConfig, CompareConfig, MemoryConfig, StudyConfig, TuneConfig
from distaccum.errors import UserError

ROOTS: dict[str, type[TrainConfig]] = {
    "train": TrainConfig,
    "compare": CompareConfig,
    "check": CheckConfig,
    "tune": TuneConfig,
    "memory": MemoryConfig,
    "study": StudyConfig,
}
"""By entry point: the schema of its whole configuration. `conf/NAME.yaml` starts with `/schema/NAME@_here_: NAME`."""


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> TrainConfig:
    """Returns the checked configuration of a command line: for notebooks, scripts and tests.

    Raises:
        UserError: with the message with which the command would end.
    """
    register_schemas(config_name)
    try:
        composed = composed_by_hydra(overrides, config_name)
    except Exception as error:  # which ones Hydra lets through is not told
        raise UserError(explain_composition_error(error, overrides, config_name)) from error
    return typed(composed)


def composed_by_hydra(overrides: Sequence[str], config_name: str) -> DictConfig:
    """Returns what Hydra makes of overrides; the schemas must be registered."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def register_schemas(config_name: str) -> None:
    """Registers the schemas of an entry point, and the resolvers, with Hydra."""
    launch()  # refuses variables of a launcher that defaults depend on
    _store_schemas()
    _store_root(config_name)
    OmegaConf.register_new_resolver(
        "distaccum.default_strategy", lambda: "ddp" if launch().world_size > 1 else "single", replace=True
    )
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


@functools.cache  # a tenth of a second each time
def _store_schemas() -> None:
    # Hydra copies all that is stored whenever it looks at a group: a fifth of what composing takes, and 7 s of --help.
    # A node it copies again when it takes it out.
    ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
    # What choices in defaults lists may refer to, it collects for each file, and there is hardly one that has any: a
    # quarter of what composing takes.
    collected = defaults_list._create_interpolation_map

    def collected_if_used(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig:
        is_used = any(entry.is_interpolation() for entry in defaults)
        return collected(overrides, defaults, self_added) if is_used else DictConfig({})

    defaults_list._create_interpolation_map = collected_if_used  # type: ignore[assignment]
    store = ConfigStore.instance()
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


@functools.cache  # each takes 20 ms
def _store_root(name: str) -> None:
    ConfigStore.instance().store(group=f"schema/{name}", name=name, node=ROOTS[name])


def typed(composed: DictConfig) -> TrainConfig:
    """Returns the composed configuration as the dataclass of its schema, checked.

    Raises:
        UserError: an unknown key, or an impossible value.
    """
    if strays := _stray_keys(composed):
        raise UserError(f"there is no key {strays[0]}: it was added with +, but nothing reads it.")
    _check_references(composed)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(explain_composition_error(error)) from error
    assert isinstance(config, TrainConfig)
    hide(as_plain(config))
    return config


def _check_references(node: DictConfig) -> None:
    """Refuses `${…}` in the place of a section or a list that stands for something else: OmegaConf takes anything.

    Raises:
        UserError: there is one.
    """
    for name in node:
        entry = node._get_node(name)
        if isinstance(entry, DictConfig) and not (entry._is_none() or entry._is_missing() or entry._is_interpolation()):
            _check_references(entry)
        if not isinstance(entry, Container) or not entry._is_interpolation():
            continue
        try:
            found = entry._dereference_node()
        except OmegaConfBaseException as error:
            full_key = entry._get_full_key(None)
            raise UserError(f"{full_key}={entry._value()}: {explain_composition_error(error)}") from error
        schema = entry._metadata.ref_type
        is_section = dataclasses.is_dataclass(schema)
        if found._is_none() or (type(found) is type(entry) and not is_section):
            continue
        if not is_section or not issubclass(OmegaConf.get_type(found) or object, schema):
            wanted = "a section of that kind" if isinstance(entry, DictConfig) else "a list"
            raise UserError(f"{entry._get_full_key(None)}={entry._value()}: it takes {wanted}, and this is none.")


def _stray_keys(node: DictConfig, path: str = "") -> list[str]:
    """Returns the keys that were added with + to sections that have a schema, which OmegaConf allows."""
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


def explain_composition_error(error: BaseException, overrides: Sequence[str] = (), config_name: str = "train") -> str:
    """Returns one message, without Hydra's internals, about a mistake on the command line or in a file."""
    cause = error.__cause__ or error.__context__
    message = _first_line(error)
    if nameless := [text for text in overrides if text.startswith("=")]:
        return f"{nameless[0]} has no key: write KEY=VALUE."
    match error:
        case MissingConfigException() if error.options is not None:
            group, _, option = (error.missing_cfg_file or "").rpartition("/")
            return f"there is no {group}={option}. Choose one of: {', '.join(error.options)}."
        case MissingConfigException() if message.startswith("Primary config directory"):
            return f"--config-path: {message}. It names the folder of the package's own; --config-dir adds one."
        case ConfigCompositionException() if not message and cause is not None:
            return explain_composition_error(cause)
        case ConfigCompositionException() if cause is not None and (file := re.match("In '(.+)': .+ raised", message)):
            return f"in {file[1]}.yaml: {_explain_content(cause, file[1])}"
        case ConfigCompositionException() if message.startswith("Could not override") and cause is not None:
            return _explain_unknown_key(cause, message.split("'")[1])
        case ConfigCompositionException() if message.startswith("Error merging override") and cause is not None:
            return _explain_wrong_value(cause, message.removeprefix("Error merging override "))
        case ConfigCompositionException() if given := re.match(r"Error resolving interpolation '(.*?)'", message):
            by = next((f"{text}: " for text in overrides if given[1] in text), "")
            return f"{by}{given[1]} can't choose an option of a group: name the option, as in data=digits."
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
        case ValueError() | TypeError() | AttributeError() if wrong := [
            text for text in overrides if text.partition("=")[0] in _groups() and not _is_choice(text)
        ]:
            named = f"{', '.join(wrong)} names no option"
            return f"{named}. A group is given by the name of one of its options, as in data=digits."
        case _ if not isinstance(error, HydraException | OmegaConfBaseException):
            return f"{_culprit(overrides, config_name)} can't be read: {message or type(error).__name__}."
    return f"{message}."


def _culprit(overrides: Sequence[str], config_name: str) -> str:
    """Returns the override without which a command line can be composed; all of them if there is no such one."""
    for place, text in enumerate(overrides):
        try:
            composed_by_hydra([*overrides[:place], *overrides[place + 1 :]], config_name)
        except Exception:
            continue
        return text
    return " ".join(overrides)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _explain_content(error: BaseException, file: str) -> str:
    """Explains a mistake in a file, whose place in the configuration is its group or stands in its first line."""
    if not isinstance(error, ConfigKeyError) or not error.full_key:
        return explain_composition_error(error)
    if error.full_key == file.partition("/")[0]:
        return "its first line must be `# @package _global_`, so that its keys are those of the whole configuration."
    return _explain_unknown_key(error, str(error.full_key))


def _explain_wrong_value(error: BaseException, override: str) -> str:
    reason = _first_line(error)
    if "is not a ListConfig" in reason or "merge DictConfig with ListConfig" in reason:
        reason = f"it takes a list, as in {override.partition('=')[0]}=[…]"
    elif "Union[int, str]" in reason or "Union[str, int]" in reason:  # the first that typing has seen in this process
        reason = "it takes a whole number, auto or null"
    elif "is not Optional" in reason:
        reason = "it can't be null"
    return f"{override}: {reason}."


def _explain_unknown_key(cause: BaseException, key: str) -> str:
    """Names the keys that exist instead, as far as OmegaConf's exception names the section."""
    parent = getattr(cause, "parent_node", None)
    if not isinstance(parent, DictConfig) or parent._is_none() or parent._is_missing():
        return f"there is no key {key}. `--cfg job` shows all keys."
    section = str(parent._get_full_key(None) or "")
    if key == section and getattr(cause, "full_key", None):  # the key is one inside of a value {…}
        key = str(cause.full_key)  # type: ignore[attr-defined]
    asked = key.removeprefix(f"{section}.").split(".")[0]
    known = [str(entry) for entry in parent if entry != "hydra"]
    is_open = not dataclasses.is_dataclass(OmegaConf.get_type(parent))
    parts = [f"there is no key {key}."]
    if not is_open and (options := _options_with(section, asked)):
        parts.append(f"It belongs to {' or '.join(f'{section}={option}' for option in options)}.")
    if nearest := difflib.get_close_matches(asked, known, n=1):
        parts.append(f"Did you mean {section + '.' if section else ''}{nearest[0]}?")
    if known:
        parts.append(f"{section or 'The configuration'} has: {', '.join(known)}.")
    if is_open:
        parts.append(f"To add a key to {section}, write +{key}=….")
    return " ".join(parts)


def _options_with(group: str, key: str) -> list[str]:
    """Returns the options of a configuration group whose schema has a key."""
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


def _environment(name: str, *default: Any) -> str | None:
    """Resolves `${oc.env:NAME}`, and keeps its value out of everything that is written."""
    hide_variable(name)
    return oc.env(name, *default)


@functools.cache
def _groups() -> frozenset[str]:
    return frozenset(path.name for path in conf_dir().iterdir() if path.is_dir())


def _is_choice(override: str) -> bool:
    try:
        value = yaml.safe_load(override.partition("=")[2])
    except yaml.YAMLError:
        return True  # Hydra's own grammar, which says itself what it can't read
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))
