"""The README and the pages of `docs/`, taken apart: code, commands, links and the keys that they mention."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^(?P<above>[^\n]*)\n(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```", re.M | re.S)
_MARK = re.compile(r" *<!-- run by tests/(\S+) -->")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of its fence, from 1.
        test: the file under `tests/` that runs it, as the line above says; None if that line doesn't.
    """

    page: Path
    line: int
    language: str
    code: str
    test: str | None

    @property
    def title(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of distaccum, as a page shows it.

    Attributes:
        name: of the command: `train`, `compare`, …
        arguments: what stands behind it.
    """

    page: Path
    title: str
    name: str
    arguments: tuple[str, ...]


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = "\n" + page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.M)
        mark = _MARK.fullmatch(match["above"])
        line = text.count("\n", 0, match.start("language"))
        test = mark[1] if mark else None
        found.append(Block(page=page, line=line, language=match["language"], code=code, test=test))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def block_run_by(test: str, page: str | None = None) -> str:
    """The code of the one block that is marked as run by a file under `tests/`, on a page or on whatever page it is."""
    blocks = [block for block in BLOCKS if block.test == test]
    (found,) = [block.code for block in blocks if page is None or block.page == ROOT / page]
    return found


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


_SCRIPTS = {"local.sh": "train", "study.sbatch": "study"}
"""Script of `launch/` → the command that it runs; all others train."""


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of distaccum in a block of shell: by module, by console script, or by a script of `launch/`."""
    lines = re.sub(r"\\\n", " ", block.code).splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = next((number for number, word in enumerate(words) if word in ("&&", ";", "|", ">")), len(words))
            command, words = words[:end], words[end + 1 :]
            for number, word in enumerate(command):
                name = None
                if command[number - 1 : number] == ["-m"] and word.startswith("distaccum."):
                    name = word.removeprefix("distaccum.")
                elif number == 0 and word.startswith("distaccum-"):
                    name = word.removeprefix("distaccum-")
                elif word.startswith("launch/"):
                    assert (ROOT / word).exists(), f"{block.title}: {word}"
                    name = _SCRIPTS.get(Path(word).name, "train")
                if name is not None:
                    arguments = tuple(command[number + 1 :])
                    yield Command(page=block.page, title=f"{block.title}: {line}", name=name, arguments=arguments)
                    break


COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in commands_of(block)]


def code_spans(page: Path) -> Iterator[str]:
    """What stands between backticks in a page's prose, with the `\\|` of tables as `|`."""
    for span in re.findall(r"`([^`\n]+)`", prose_of(page)):
        yield span.replace(r"\|", "|")
