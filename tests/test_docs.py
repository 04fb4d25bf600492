"""What README and docs say is true: code runs; commands, keys, links and names exist; tables are the schema's."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import config_reference
import pytest
from documents import BLOCKS, COMMANDS, PAGES, Block, Command, blocks_of, code_spans, prose_of
from launching import ROOT

import distaccum
from distaccum import evaluate, launch, report
from distaccum.config import conf_dir
from distaccum.config.compose import ROOTS, compose
from distaccum.data.tokenize import command_line
from distaccum.errors import UserError
from distaccum.tools.check.trainer import options_of

README, DOCS = ROOT / "README.md", ROOT / "docs"
PYTHON = [block for block in BLOCKS if block.language == "python"]
SELF_CONTAINED = [block for block in PYTHON if block.test == "test_docs.py"]
KEYS = {
    f"{key}.{entry.name}".lstrip(".")
    for _, key, schema in config_reference.SECTIONS
    for entry in dataclasses.fields(schema)
}
GROUPS = {path.name: {file.stem for file in path.glob("*.yaml")} for path in conf_dir().iterdir() if path.is_dir()}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
COMPONENTS = ("data.train", "data.evaluation", "data.collate_fn", "observers", "model", "task", "optim", "schedule")
"""Sections that name a component, which may take any keys."""
WRITTEN = ("conf/experiment/tuned.yaml",)
"""What a command that a page shows writes into a checkout."""
FILES = r"\.(html|json|jsonl|svg|png|yaml|yml|py|md|safetensors|sbatch|sh|lock|log|out|bin|npy)$"


def _shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Code


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_every_fence_of_a_page_is_seen(page: Path) -> None:
    assert len(re.findall(r"^ *```", page.read_text(), re.M)) == 2 * len(blocks_of(page))


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.title)
def test_every_block_of_python_is_run_by_a_test(block: Block) -> None:
    assert block.test is not None, "the line above must be <!-- run by tests/… -->"
    text = (ROOT / "tests" / block.test).read_text()
    assert (
        block.test == "test_docs.py" or f'block_run_by("{block.test}"' in text or f"run by tests/{block.test}" in text
    )


@pytest.mark.parametrize("block", SELF_CONTAINED, ids=lambda block: block.title)
def test_a_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "block.py").write_text(block.code)
    runpy.run_path("block.py", run_name="__main__")


# Commands


@pytest.fixture
def files_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the configuration files that pages show; each says its path in its first line."""
    for block in BLOCKS:
        if block.language == "yaml" and (path := re.match(r"# (\S+\.yaml)\n", block.code)):
            (tmp_path / path[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path[1]).write_text(block.code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.title)
def test_a_command_is_understood(command: Command, files_of_pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.name == "report":
        written: list[object] = []
        monkeypatch.setattr("distaccum.tools.report.write_page", lambda *given: written.append(given))
        report.main(command.arguments)
        assert written
    elif command.name == "evaluate":
        given = evaluate._parser().parse_intermixed_args(command.arguments)
        compose([word for word in given.argument if "=" in word])
    elif command.name == "data.tokenize":
        command_line().parse_args(command.arguments)
    elif "--trainer" in command.arguments:
        options_of(argparse.ArgumentParser(), list(command.arguments))
    elif command.name == "launch":
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which torchrun's own code sets otherwise
        _, module, words = launch.parsed(list(command.arguments))
        test_a_command_is_understood(
            dataclasses.replace(command, name=module.removeprefix("distaccum."), arguments=tuple(words)),
            files_of_pages,
            monkeypatch,
        )
    elif {"--help", "--cfg"} & set(command.arguments):
        assert command.arguments in (("--help",), ("--cfg", "job"))
    else:
        for overrides in _points(command, files_of_pages):
            assert type(compose(overrides, command.name)) is ROOTS[command.name]


def _points(command: Command, here: Path) -> Iterator[list[str]]:
    """The overrides of a command line: of a sweep those of its first and its last point."""
    words = ["…json=true".replace("…", f"{command.name}.") if word == "--json" else word for word in command.arguments]
    if "--config-dir" in words:
        number = words.index("--config-dir")
        words[number : number + 2] = [f"hydra.searchpath=[file://{here / words[number + 1]}]"]
    words = [word for word in words if word not in ("-m", "…")]
    is_sweep = [re.match(r"[^=]+=[^\[{'\"][^\[{'\"]*,", word) is not None for word in words]
    for place in (0, -1) if any(is_sweep) else (0,):
        yield [
            f"{word.partition('=')[0]}={word.partition('=')[2].split(',')[place]}" if swept else word
            for word, swept in zip(words, is_sweep, strict=True)
        ]


@pytest.mark.parametrize("wrong", ["batch.globl_size=8", "optim.lr=1e-3,fast", "model=net"])
def test_a_wrong_command_is_noticed(wrong: str, files_of_pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Command(page=README, title=wrong, name="train", arguments=tuple(wrong.split()))
    with pytest.raises(UserError):
        test_a_command_is_understood(command, files_of_pages, monkeypatch)


def test_the_two_commands_are_the_real_ones() -> None:
    for page in (README, DOCS / "getting-started.md"):
        text = page.read_text()
        assert "pip install -e '.[examples]' && torchrun --nproc_per_node=4 -m distaccum.train" in text
        assert "pip install -e '.[test]' && pytest" in text
    assert "pip install -e '.[test" in (ROOT / ".ci" / "run").read_text()


# Keys


def test_the_configuration_page_is_the_schemas() -> None:
    page = config_reference.PAGE.read_text()
    assert config_reference.written(page) == page, "run: python tests/config_reference.py --write"


def test_every_key_of_the_schema_is_on_the_configuration_page() -> None:
    shown = set(re.findall(r"^\| `([\w.]+)` \|", config_reference.PAGE.read_text(), re.M))
    sections = {key for _, key, _ in config_reference.SECTIONS}
    targets = {key for key in KEYS if key.endswith("._target_")}
    # What options of a group share is on the page once, by the section of the group.
    assert shown == {key for key in KEYS - targets if key not in sections}


def test_every_schema_is_on_the_configuration_page() -> None:
    named = {schema for _, _, schema in config_reference.SECTIONS}
    for root in ROOTS.values():
        types = {entry.name: str(entry.type).partition(" |")[0] for entry in dataclasses.fields(root)}
        sections = {name for name, kind in types.items() if kind.endswith(("Config", "Section"))}
        assert sections <= {key.partition(".")[0] for _, key, _ in config_reference.SECTIONS}
    assert len(named) == len(config_reference.SECTIONS)


def test_every_field_of_the_schema_has_a_docstring() -> None:
    docs = config_reference.field_docstrings()
    for _, _, schema in config_reference.SECTIONS:
        for entry in dataclasses.fields(schema):
            described = any(entry.name in docs.get(parent.__name__, {}) for parent in schema.__mro__)
            is_section = str(entry.type).endswith("Config") or entry.name in ("model", "task", "optim", "schedule")
            assert described or is_section or entry.name == "_target_", f"{schema.__name__}.{entry.name}"


def _wrong_in(span: str) -> list[str]:
    """What a page shows between backticks as a key, or as an option of a group, that does not exist."""
    wrong = []
    for word in span.split():
        key, equals, value = word.lstrip("+~").partition("=")
        is_python = bool(re.search(r"[(\"']|^(True|False|None)", value)) or "(" in key
        if is_python or not re.fullmatch(r"[a-z][a-z_0-9]*(\.\w+)*", key) or (not equals and re.search(FILES, key)):
            continue
        top = key.partition(".")[0]
        if equals and key in GROUPS:
            options = [value] if re.fullmatch(r"[a-z_0-9|]+", value) else []
            wrong += [f"{key}={name}" for option in options for name in option.split("|") if name not in GROUPS[key]]
        elif "." in key and (top in SECTIONS or equals):
            is_open = any(key.startswith(f"{component}.") for component in COMPONENTS) and key not in KEYS
            if not is_open and not any(known == key or known.startswith(f"{key}.") for known in KEYS):
                wrong.append(key)
        elif equals and len(span.split()) == 1 and key not in KEYS and re.fullmatch(r"[A-Z…].*|auto|none", value):
            wrong.append(key)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_keys_that_a_page_mentions_exist(page: Path) -> None:
    wrong = [word for span in code_spans(page) for word in _wrong_in(span)]
    # A page may show a file of one's own that makes an option: my_conf/model/net.yaml.
    text = page.read_text()
    assert [word for word in wrong if f"{word.replace('=', '/')}.yaml" not in text] == []


def test_a_wrong_key_is_noticed() -> None:
    for wrong in ("batch.globl_size=3", "train.emma.decay", "strategy=mesh", "schedule=cosine|linea", "study.goals"):
        assert _wrong_in(wrong)
    for right in (
        "batch.schedule=table|ramp",
        "train.ema",
        "data.train.root=x",
        "metrics.jsonl",
        "study.json",
        "x=f(1)",
    ):
        assert not _wrong_in(right)


# Links, pictures, names


def _targets(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, and of the names whose docstrings it shows."""
    text = prose_of(page)
    headings = (re.sub(r"`|\[(.*?)\]\(.*?\)", r"\1", heading) for heading in re.findall(r"^#+ (.+)$", text, re.M))
    names = re.findall(r"^::: (\S+)$", text, re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings} | {*names}


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in _targets(page):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def test_the_navigation_has_every_page_and_no_other() -> None:
    named = set(re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES if page != README}


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: distaccum\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(shown) == sorted(distaccum.__all__)


def _defined(path: Path) -> set[str]:
    """Classes, functions and constants of a file; methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            names = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for name in names if isinstance(name, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=_shown)
def test_files_that_a_page_names_exist_and_hold_what_it_says(page: Path) -> None:
    text = prose_of(page)
    for path in re.findall(r"`((?:distaccum|tests|conf|launch|benchmarks|docs)/[\w/.-]+)`", text):
        assert "NAME" in path or path in WRITTEN or (ROOT / path).exists(), path
    for name, _, path in re.findall(r"`([\w.]+)` (in|\() ?`(\w+/[\w/]+\.py)`", text):
        assert name in _defined(ROOT / path), f"{name} in {path}"


def test_the_pitfalls_of_the_readme_are_those_of_the_docs() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| ")]
    start = rows.index("| the pitfall | what it does | here |")
    assert len(rows[start:]) > 12
    for row in rows[start : start + 13]:
        assert row in (DOCS / "concepts.md").read_text()


def test_the_drawing_of_a_window_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_window.py"))["draw"]()
    assert drawn == (DOCS / "images" / "window.svg").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 250


def test_blocks_are_found_with_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# T\n\n<!-- run by tests/a/b.py -->\n```python\nx = 1\n```\n\n- a\n\n    ```sh\n    ls\n    ```\n")
    found = blocks_of(page)
    assert [(b.language, b.code, b.test, b.line) for b in found] == [
        ("python", "x = 1\n", "a/b.py", 4),
        ("sh", "ls\n", None, 10),
    ]
