from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from distaccum.runtime.files import LineFile, remove_unfinished, replacing, write_text


def test_a_file_is_written_through_no_link(tmp_path: Path) -> None:
    """Neither one in its own place nor one in that of the file that it is until it is complete."""
    precious, path = tmp_path / "precious", tmp_path / "page"
    precious.write_text("precious")
    path.symlink_to(precious)
    with replacing(path) as file:
        (aside,) = set(tmp_path.iterdir()) - {precious, path}
        assert not aside.is_symlink()
        file.write(b"new")
    assert (path.read_text(), path.is_symlink(), precious.read_text()) == ("new", False, "precious")
    assert set(tmp_path.iterdir()) == {precious, path}


def test_the_name_of_an_incomplete_file_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "page"):
            names |= {path.name for path in tmp_path.glob(".*")}
    assert len(names) == 3
    assert all(re.fullmatch(r"\.page\.[0-9a-f]{8}-[0-9a-f]{16}\.writing", name) for name in names)


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    with replacing(tmp_path / "page"):
        (own,) = tmp_path.iterdir()
        others = [own.with_name(name) for name in (f".other{own.name[5:]}", ".page.00000000-0123456789abcdef.writing")]
        old = own.with_name(".page.00000000-1123456789abcdef.writing")
    for path in (own, *others, old):
        path.touch()
    os.utime(old, (0, 0))
    remove_unfinished(tmp_path, "page")
    assert {path.name for path in tmp_path.iterdir()} == {"page", *(path.name for path in others)}


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="not a regular file"):
            write_text(tmp_path / name, "text")
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "folder"}


def test_lines_are_appended_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious\n")
    (tmp_path / "lines").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        LineFile(tmp_path / "lines", new=False)
    assert (tmp_path / "precious").read_text() == "precious\n"


def _append(path: Path, *meanwhile: str | None) -> str:
    """Appends 1 to 6, with the file removed (None) or given another content after every second line; returns what it
    comes to."""
    file = LineFile(path, new=True)
    for number in range(1, 7):
        file.append(str(number))
        if number % 2 == 0 and meanwhile:
            content, meanwhile = meanwhile[0], meanwhile[1:]
            path.unlink()
            if content is not None:
                path.write_text(content)
    assert file.close() is None
    assert not file.pending
    return path.read_text()


@pytest.mark.parametrize(
    ("meanwhile", "expected"),
    [
        pytest.param([], "123456", id="nothing"),
        pytest.param([None], "123456", id="removed"),
        pytest.param([None, None, None], "123456", id="removed again and again"),
        pytest.param(["1\n2\n"], "123456", id="saved as it is"),
        pytest.param(["1\n"], "123456", id="saved as it was a moment before"),
        pytest.param(["1"], "123456", id="without the end of a line"),
        pytest.param(["0\n2\n"], "023456", id="changed"),
        pytest.param(["mine"], ["mine", *"3456"], id="something else"),
    ],
)
def test_lines_survive_what_happens_to_their_file(
    tmp_path: Path, meanwhile: list[str | None], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert _append(tmp_path / "lines", *meanwhile).splitlines() == list(expected)
    assert len(caplog.messages) == len(meanwhile)
    is_whole = "".join(expected) == "123456"
    assert all(("has all its lines again" in message) == is_whole for message in caplog.messages)
