from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tar_files import tar_bytes

from distaccum.data.tars.tar_members import Member, members_of, name_at
from distaccum.errors import UserError

NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=90)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


def members(content: bytes) -> list[Member]:
    return list(members_of(io.BytesIO(content), "a.tar"))


def read_by_tarfile(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        return [Member(entry.name, entry.offset_data, entry.size) for entry in archive if entry.isfile()]


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    files=st.lists(st.tuples(PATHS, st.integers(0, 1100)), max_size=6),
    is_folder=st.sets(st.integers(0, 5)),
)
@example(form=tarfile.PAX_FORMAT, files=[("ä" * 300, 3), ("b" * 101, 512)], is_folder=set())
@example(form=tarfile.GNU_FORMAT, files=[("ä" * 300, 3), ("x/" * 100 + "b", 512)], is_folder={1})
def test_members_are_those_that_tarfile_finds(form: int, files: list[tuple[str, int]], is_folder: set[int]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for number, (name, size) in enumerate(files):
            entry = tarfile.TarInfo(name)
            if number in is_folder:
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
            else:
                entry.size = size
                archive.addfile(entry, io.BytesIO(bytes(size)))
    wanted = read_by_tarfile(file.getvalue())
    assert members(file.getvalue()) == wanted
    assert len(wanted) == len([number for number in range(len(files)) if number not in is_folder])


@pytest.mark.parametrize("name", ["a.png", "d" * 99, "x/" * 60 + "a.png", "p" * 150 + "/" + "n" * 100])
def test_ustar(name: str) -> None:
    content = tar_bytes({name: b"abc", "b.cls": b"7"}, form=tarfile.USTAR_FORMAT)
    assert members(content) == read_by_tarfile(content)
    assert name_at(content[:512]) == name


def test_what_gnu_tar_writes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.txt", "a.txt", "n" * 120 + ".txt"):
        (tmp_path / "in" / name).write_text(name)
    for form in ("gnu", "oldgnu", "posix", "ustar", "v7"):
        excluded = ["--exclude=nnn*"] if form in ("v7", "ustar") else []
        command = ["tar", "--sort=name", f"--format={form}", *excluded, "-cf", "out.tar", "-C", "in", "."]
        subprocess.run(command, cwd=tmp_path, check=True)
        content = (tmp_path / "out.tar").read_bytes()
        found = members(content)
        assert [member.name for member in found][:2] == ["./a.txt", "./b.txt"], form
        assert len(found) == (2 if excluded else 3)
        for name, offset, size in found:
            assert content[offset : offset + size].decode() == name.removeprefix("./"), form


def test_sizes_beyond_octal() -> None:
    """The header of a file of 9 GiB, in either form; the file itself is not there."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        entry = tarfile.TarInfo("a.bin")
        entry.size = 9 << 30
        with pytest.raises(
            UserError, match=rf"its member a.bin would end at byte {(9 << 30) + 512}\d*, and it has|cut"
        ):
            members(entry.tobuf(form))


def test_no_members() -> None:
    assert members(tar_bytes({})) == []


WHOLE = tar_bytes({"a.png": bytes(range(256)) * 5, "a.cls": b"1"})


def _link(kind: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("a.png")
        entry.type, entry.linkname = kind, "b.png"
        archive.addfile(entry)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.tar is empty"),
        (gzip.compress(WHOLE), r"a.tar is compressed, .*gzip -d FILE"),
        (bz2.compress(WHOLE), r"a.tar is compressed, .*bzip2 -d FILE"),
        (lzma.compress(WHOLE), r"a.tar is compressed, .*xz -d FILE"),
        (b"no archive" * 100, r"a.tar is no tar file \("),
        (b"short", r"a.tar is no tar file \("),
        (WHOLE[:1000], r"a.tar is cut off: its member a.png would end at byte 1792, and it has 1000"),
        (WHOLE[: 2048 + 100], r"a.tar is cut off at byte 2148: it has no end mark"),
        (WHOLE[: 2048 + 1024], r"a.tar is cut off at byte 3072: it has no end mark"),
        (WHOLE[:2048] + b"x" * 512 + WHOLE[2560:], r"a.tar is damaged: (at|the header at) byte 2048"),
        (WHOLE + WHOLE, r"a.tar goes on after its end mark"),
        (_link(tarfile.SYMTYPE), r"a.tar: its member a.png is a symbolic link. Put plain files"),
        (_link(tarfile.LNKTYPE), r"is a hard link"),
        (_link(tarfile.FIFOTYPE), r"is a pipe"),
        (_link(b"Q"), r"is of the unknown type b'Q'"),
    ],
)
def test_what_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        members(content)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=40))
def test_damage_is_refused_or_harmless(place: int, change: bytes) -> None:
    damaged = WHOLE[:place] + change + WHOLE[place + len(change) :]
    try:
        found = members(damaged)
    except UserError:
        return
    assert all(offset + size <= len(damaged) for _, offset, size in found)


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.bin").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    for form in ("gnu", "posix"):
        subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", "a.tar", "a.bin"], cwd=tmp_path, check=True)
        with pytest.raises(UserError, match="is a sparse file"):
            members((tmp_path / "a.tar").read_bytes())
