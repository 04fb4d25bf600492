"""Random command lines of all commands, made from the schema of the configuration: most of them wrong, some right.

A case is a function of its seed alone.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from command_line import TINY

from distaccum.config import conf_dir
from distaccum.config.compose import ROOTS
from distaccum.config.schemas import SCHEMAS

GROUPS = {
    path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in conf_dir().iterdir() if path.is_dir()
}
del GROUPS["hydra"]

TOOLS = (
    "train",
    "train",
    "train",
    "compare",
    "check",
    "tune",
    "study",
    "memory",
    "evaluate",
    "report",
    "data.tokenize",
)
"""Commands, by how often they are taken: all that train take what `train` takes."""

_BASES: dict[str, list[str]] = {
    "train": [],
    "compare": [
        *("compare.placements=[single]", "compare.world_sizes=[1]", "compare.accumulation_steps=[2]"),
        *("compare.updates=1", "compare.warmup_updates=0", "compare.rounds=1", "compare.curve_updates=1"),
        *("compare.exact_updates=1", "compare.keep_alive=true"),
    ],
    "check": ["check.samples=4", "check.windows=1"],
    "tune": [
        *("tune.minutes=0.001", "tune.rounds=1", "tune.confirm_rounds=1", "tune.round_seconds=0.01"),
        *("tune.predict_world_sizes=[1]", "tune.predict_accumulation_steps=[1]", "tune.threads_per_rank=1"),
    ],
    "study": ["study.batch_sizes=[16]", "study.lr_rules=[none]", "study.max_samples=32", "study.evaluations=2"],
    "memory": ["memory.alternatives=false"],
}

STARTS_PROCESSES = {"num_workers", "world_size", "world_sizes", "ranks", "threads_per_rank"}
"""Keys of numbers of processes or threads: what is possible in principle is not tried out in the hundreds."""

_JOBS: list[tuple[str, ...]] = [
    (),
    (),
    (),
    ("data=digits", "model=cnn"),
    ("data=coins", "model=unet", "task=segmentation"),
]
_JOBS += [
    ("data=text", "model=gpt", "task=language_modeling"),
    ("data=digit_views", "model=encoder", "task=contrastive"),
]
_JOBS += [("data=text", "model=gpt", "task=language_modeling", "batch=by_length"), ("data=digits", "model=mlp")]
"""Options that fit together."""

_NUMBERS = ["-1", "0", "1", "2", "3", "7", "-0.0", "0.5", "1.5", "1e-300", "1e30", "9" * 30, "-" + "9" * 30, "1e999"]
_NUMBERS += [".nan", "nan", ".inf", "-.inf", "inf", "0x10", "1_000", "9223372036854775807", "4294967296"]
_TEXTS = [
    "''",
    '""',
    "text",
    "'two words'",
    "ünï",
    "漢字",
    "'\u202eabc'",
    "x" * 5000,
    "'a=b'",
    "'\\x1b[2J'",
    "/",
    "..",
    "~",
]
_TEXTS += ["null", "true", "no", "auto", "'null'", "'1'", "'*'", "'['", "'('", "/dev/null", "/proc/self/mem/x", "a/b/c"]
_NESTS = [
    "[]",
    "{}",
    "[1,2]",
    "[null]",
    "[[1]]",
    "[[]]",
    "{a: 1}",
    "{1: 2}",
    "{a: {b: {c: []}}}",
    "[a,b]",
    "[-1]",
    "[0]",
]
_NESTS += [
    "[.nan]",
    "[{a: 1}]",
    "[1.5]",
    "[true,false]",
    "[" * 60 + "]" * 60,
    "[1" + ",1" * 500 + "]",
    "[''," + "9" * 25 + "]",
]
_POINTERS = [
    "${nothing}",
    "${seed}",
    "${batch}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${oc.env:HOME}",
    "'${'",
    "???",
    "${now:%Y}",
]
_POINTERS += ["${.x}", "${..seed}", "${oc.decode:'['}", "${oc.env:NO_SUCH,4}", "${optim.lr}", "${data}", "${nothing:1}"]
_TARGETS = [
    "builtins.dict",
    "builtins.len",
    "builtins.print",
    "math.pi",
    "os",
    "nothing.here",
    "''",
    "torch.nn.Linear",
    ".",
]
_TARGETS += [
    "distaccum.models.MLP",
    "distaccum.data.Digits",
    "sys.exit",
    "builtins.object",
    "torch.nn.Identity",
    "7",
    "null",
]
_TARGETS += ["collections.OrderedDict", "builtins.None", "torch.optim.SGD", "os.getcwd", "a..b", "functools.partial"]
_POOLS = [_NUMBERS, _NUMBERS, _TEXTS, _NESTS, _POINTERS, [f"{{_target_: {target}}}" for target in _TARGETS]]

_WHOLE_LINES = [
    "",
    "=",
    "=1",
    "seed",
    "seed=",
    "batch",
    "--nothing",
    "-x",
    "--cfg=job",
    "~seed",
    "~batch",
    "~nothing",
    "+",
]
_WHOLE_LINES += [
    "~model",
    "~wandb.mode",
    "batch=",
    "batch=3",
    "batch=[uniform]",
    "batch={a: 1}",
    "batch=null",
    "model=null",
]
_WHOLE_LINES += [
    "+batch=uniform",
    "model=[mlp,cnn]",
    "experiment=nothing",
    "experiment=[text,vision]",
    "experiment=''",
    "seed =1",
]
_WHOLE_LINES += [
    "seed=1 2",
    "seed=[",
    "seed={",
    "seed='",
    "seed=1,2",
    "batch/=uniform",
    "model@=mlp",
    "model@x=mlp",
    "/seed=1",
]
_WHOLE_LINES += [
    ".seed=1",
    "seed.=1",
    "seed..x=1",
    "seed.x=1",
    "seed[0]=1",
    "batch[0]=1",
    "+seed=1",
    "++seed=1",
    "+x.y.z=1",
]
_WHOLE_LINES += [
    "hydra.run.dir=x",
    "hydra=null",
    "hydra.x=1",
    "hydra/help=nothing",
    "hydra.mode=7",
    "schema=x",
    "schema/train=x",
]
_WHOLE_LINES += [
    "+schema/batch=packed",
    "observers=[nothing]",
    "observers=csv",
    "observers=null",
    "observers=7",
    "observers={a: 1}",
]
_WHOLE_LINES += [
    "observers=[csv,csv]",
    "+observers.a=1",
    "+observers.a={}",
    "+observers.a._target_=math.pi",
    "~observers",
]
_WHOLE_LINES += [
    "+observers.a._target_=builtins.dict",
    "+observers.a._target_=distaccum.models.MLP",
    "strategy=${seed}",
    "é=1",
]
_WHOLE_LINES += [
    "+data.train.nothing=1",
    "+model.nothing=1",
    "+optim.nothing=1",
    "+task.nothing=1",
    "resume=.",
    "resume=none",
]
_WHOLE_LINES += [
    "resume=/dev/null",
    "resume=nothing",
    "run_dir=''",
    "run_dir=/dev/null",
    "run_dir=/proc/x",
    "run_dir=" + "y" * 300,
]
_WHOLE_LINES += [
    "run_dir=.",
    "run_dir=run/../run",
    "run_dir='a\\nb'",
    "--config-dir=nothing",
    "--config-name=nothing",
    "--help",
]
_WHOLE_LINES += [
    "--config-path=/nothing",
    "--version",
    "--info",
    "--info=nothing",
    "--package=x",
    "--resolve",
    "--shell-completion",
]

_OPTIONS = {
    "evaluate": ["--which", "--weights", "--combine", "--class-dim", "--device", "--trust", "--out"],
    "report": ["--out"],
    "data.tokenize": ["--tokenizer", "--out", "--column", "--workers", "--shard-tokens", "--end-token"],
}
_OPTION_VALUES = [
    "newest",
    "best",
    "all",
    "raw",
    "ema",
    "swa",
    "probabilities",
    "outputs",
    "weights",
    "-1",
    "0",
    "1",
    "99",
]
_OPTION_VALUES += [
    "nan",
    "1e9",
    "9" * 30,
    "",
    " ",
    "x" * 5000,
    "ünï",
    "\u202e",
    "os",
    "os.path",
    "a..b",
    "cpu",
    "cuda",
    "text",
]
_OPTION_VALUES += [
    "/",
    "/dev/null",
    "/dev/full",
    "..",
    "out.json",
    "run",
    "nothing/out",
    "--out",
    "-",
    "=",
    "7",
    "tokenizer",
    "tokens",
]
_PATHS = [
    "run",
    "run/",
    "./run",
    "run/checkpoints",
    "run/checkpoints/update-00000003",
    "nothing",
    "/dev/null",
    "/dev/zero",
    "",
]
_PATHS += [
    ".",
    "..",
    "run/metrics.jsonl",
    "~",
    "~nobody/x",
    "*",
    "[",
    "run/run.json",
    "empty",
    "ünï",
    "\udcff",
    "x" * 300,
    "pipe",
]
_EVALUATED = [
    "data.evaluation.split",
    "data.evaluation.num_samples",
    "data.evaluation.seed",
    "precision.name",
    "precision",
]
_EVALUATED += [
    "train.eval_batch_size",
    "task.ignore_index",
    "task",
    "model.name_or_path",
    "model.init_from",
    "seed",
    "data.evaluation",
]
_EVALUATED += [
    "data.evaluation._target_",
    "task._target_",
    "model.hidden_sizes",
    "nothing",
    "nothing.x",
    "task.label_smoothing",
]


@dataclass(frozen=True, slots=True)
class Case:
    """A command line.

    Attributes:
        tool: the command, as in `distaccum.TOOL`.
        base: its first words, which are right.
        given: the words that are random.
        names: what a refusal must name, at least one of them.
    """

    tool: str
    base: tuple[str, ...]
    given: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.base, *self.given)


def case(seed: int) -> Case:
    """The case of a seed."""
    chance = random.Random(seed)
    tool = chance.choice(TOOLS)
    return _of_configuration(tool, chance) if tool in ROOTS else _of_arguments(tool, chance)


def _of_configuration(tool: str, chance: random.Random) -> Case:
    groups = list(chance.choice(_JOBS))
    for group in chance.sample(sorted(SCHEMAS), chance.choice([0, 0, 1, 1, 2])):
        if not any(clashes(word, group) for word in groups):
            groups.append(f"{group}={chance.choice(GROUPS[group])}")
    keys = dict(keys_of(tool, tuple(groups)))
    given = list(groups)
    given += [
        chance.choice(_WHOLE_LINES) if chance.random() < 0.12 else _override(keys, chance)
        for _ in range(chance.choice([1, 1, 1, 2, 2, 3]))
    ]
    chance.shuffle(given)
    base = tuple(word for word in TINY if not any(clashes(word, group) for group in groups))
    names = [name for word in given for name in names_of(word)]
    if groups:  # what doesn't fit an option is named by its class
        names += [name for word in ("model=cnn", "data=digits", "task=classification") for name in names_of(word)[2:]]
        names.append("CausalLM")  # of task=mixture_lm, too
    return Case(tool, (*base, *_BASES[tool]), tuple(given), tuple(names))


def clashes(word: str, group: str) -> bool:
    """Whether a word of the base belongs to an option that another word replaces."""
    return word.partition("=")[0].split(".")[0] == group.partition("=")[0]


def names_of(word: str) -> list[str]:
    """What a message may call a word: by its key, as a whole, or as the class that an option of a group chooses."""
    key, _, value = word.partition("=")
    key = key.strip("+~ ")
    if value in GROUPS.get(key, []):
        fields = [entry for schema in _schemas(key, value) for entry in dataclasses.fields(schema)]
        targets = [str(entry.default) for entry in fields if entry.name == "_target_"]
        targets += re.findall(r"^_target_: (.*)$", _text(key, value), re.MULTILINE)
        return [f"{key}=", f"{key}.", *(target.rpartition(".")[2] for target in targets)]
    targets = re.findall(r"_target_: ?([\w.]+)", word)
    names = [key, f"key {key.partition('.')[0]}:", *(target.rpartition(".")[2] for target in targets)] if key else []
    return [*names, word] if not key.startswith("-") else [key, value or word]


def _schemas(group: str, option: str) -> list[type]:
    return [
        schema
        for name, schema in SCHEMAS.get(group, {}).items()
        if f"/schema/{group}@_here_: {name}\n" in f"{_text(group, option)}\n"
    ]


@cache
def _text(group: str, option: str) -> str:
    return (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8")


def _override(keys: dict[str, Any], chance: random.Random) -> str:
    key = chance.choice(sorted(keys))
    if key.endswith("_target_"):
        return f"{key}={chance.choice(_TARGETS)}"
    last = key.rpartition(".")[2]
    value = _value(keys[key], chance)
    if last in STARTS_PROCESSES:
        value = chance.choice(["-1", "0", "1", "2", "[1,2]", "nan", "9" * 30, "text", "null", "[]", "auto", "''"])
    match chance.randrange(24):
        case 0:
            key = _near(key, chance)
        case 1:
            return f"{chance.choice(['+', '++', '~'])}{key}={value}"
        case 2:
            return f"{key}.{chance.choice(['x', '0', '_target_', ''])}={value}"
        case 3:
            return f"{key.rpartition('.')[0] or key}={value}"
        case 4:
            return key
    return f"{key}={value}"


def _near(key: str, chance: random.Random) -> str:
    place = chance.randrange(len(key))
    return chance.choice([key[:place] + key[place + 1 :], key[:place] + "x" + key[place:], key.upper(), key + "s"])


def _value(hint: Any, chance: random.Random) -> str:
    if chance.random() < 0.6 and (fitting := _fitting(hint)):
        return chance.choice(fitting)
    return chance.choice(chance.choice(_POOLS))


def _fitting(hint: Any) -> list[str]:
    """Values that the type allows, not all of which are possible."""
    if get_origin(hint) in (Union, types.UnionType):
        return [value for part in get_args(hint) for value in _fitting(part)]
    if get_origin(hint) is list:
        return [f"[{value}]" for value in _fitting(get_args(hint)[0])]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [entry.name for entry in hint if entry.name != "online"]  # without a network that takes its time
    by_type = {
        bool: ["true", "false"],
        int: ["0", "1", "2", "3", "5", "16", "64", "1000000", "-1"],
        float: ["0", "0.1", "0.5", "0.999", "1.0", "2", "1e-8", "1000.0", "-0.1"],
        str: ["text", "loss", "'*'", "''", "train", "accuracy"],
        type(None): ["null"],
    }
    return by_type.get(hint, []) if isinstance(hint, type) else []


@cache
def keys_of(tool: str, groups: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """Keys and types of the configuration of a command with these options."""
    chosen = {"model": "mlp", "data": "synthetic", "task": "classification", "optim": "adamw", "schedule": "cosine"}
    chosen |= {"strategy": "single", "precision": "fp32", "batch": "uniform"}
    chosen |= dict(word.split("=") for word in groups)
    return tuple(_keys(ROOTS[tool], "", chosen))


def _keys(schema: type, prefix: str, chosen: dict[str, str]) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(schema).items():
        if name not in {entry.name for entry in dataclasses.fields(schema)}:
            continue
        key = f"{prefix}{name}"
        if key in chosen:
            for inner, kind in (*_schema_keys(key, chosen[key]), *_file_keys(key, chosen[key])):
                yield f"{key}.{inner}", kind
        elif dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{key}.", chosen)  # type: ignore[arg-type]
        else:
            yield key, hint


def _schema_keys(group: str, option: str) -> Iterator[tuple[str, Any]]:
    for schema in _schemas(group, option):
        yield from _keys(schema, "", {})


def _file_keys(group: str, option: str) -> Iterator[tuple[str, Any]]:
    content = yaml.safe_load(_text(group, option)) or {}
    content.pop("defaults", None)

    def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield path, type(value)
            return
        for name, entry in value.items():
            yield from leaves(entry, f"{path}.{name}".lstrip("."))

    yield from leaves(content, "")


def _of_arguments(tool: str, chance: random.Random) -> Case:
    options: list[str] = []
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        option = chance.choice([*_OPTIONS[tool], "--nothing", "-x"])
        value = chance.choice(_OPTION_VALUES)
        options += chance.choice([[option, value], [f"{option}={value}"], [option]])
    words = [chance.choice(_PATHS) for _ in range(chance.choice([0, 1, 1, 2]))]
    base: tuple[str, ...] = ()
    if tool == "evaluate":
        words += [
            f"{chance.choice(_EVALUATED)}={_value(chance.choice([int, float, str]), chance)}"
            for _ in range(chance.choice([0, 1, 2]))
        ]
        base = ("run",)
    elif tool == "report":
        base = ("run",) if chance.random() < 0.5 else ()
    else:
        base = ("texts.jsonl", "--tokenizer=tokenizer", "--out=tokens", "--workers=1") if chance.random() < 0.8 else ()
    given = [*words, *options]
    names = [
        name
        for word in given
        for name in (word, word.partition("=")[0], repr(word)[1:-1], os.path.normpath(word))
        if name
    ]
    return Case(tool, base, tuple(given), (*names, "required", "PATH", *((". ", ".:") if "" in given else ())))
