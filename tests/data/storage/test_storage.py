from __future__ import annotations

import os
import pickle
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from object_server import ObjectServer, serving

from distaccum.data.rows.tables import rows_of
from distaccum.data.storage import files as storage
from distaccum.data.storage import object_stores
from distaccum.data.storage.files import RangeReader, list_files, open_file, read_range, size_and_version
from distaccum.errors import UserError

BYTES = random.Random(0).randbytes(1_000_003)
"""More than one block of a remote file."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "many.bin").write_bytes(BYTES)
    for name in ("c.jsonl", "a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    return tmp_path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setattr(object_stores, "WAITS", (0.001, 0.002))
    with serving(folder) as running:
        yield running


@pytest.fixture(params=["local", "file", "memory", "http"])
def base(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    if request.param == "memory":
        system = fsspec.filesystem("memory")
        for path in folder.iterdir():
            system.pipe_file(f"/base/{path.name}", path.read_bytes())
        yield "memory://base"
        system.rm("/base", recursive=True)
    elif request.param == "http":
        yield request.getfixturevalue("server").url
    else:
        yield str(folder) if request.param == "local" else f"file://{folder}"


def test_every_kind_of_path_reads_the_same(base: str) -> None:
    path = f"{base}/many.bin"
    size, version = size_and_version(path)
    assert size == len(BYTES)
    assert version
    assert read_range(path, 5, 900_000) == BYTES[5:900_000]
    assert read_range(path, 7, 7) == b""
    with open_file(path) as file:
        assert file.read() == BYTES
        drawn = random.Random(1)
        for _ in range(30):
            position, length = drawn.randrange(len(BYTES)), drawn.randrange(200_000)
            assert file.seek(position) == position
            assert file.read(length) == BYTES[position : position + length]
        assert file.seek(-3, os.SEEK_END) == len(BYTES) - 3
        assert file.read() == BYTES[-3:]
    names = [name.rpartition("/")[2] for name in list_files([f"{base}/*.jsonl", f"{base}/{{b,a}}.jsonl"], "data.files")]
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl", "b.jsonl", "a.jsonl"]
    assert [row["text"] for _, row in rows_of(f"{base}/*.jsonl", "data.files")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    with pytest.raises(UserError, match=r"data\.files: there is no file .*/\*\.tar"):
        list_files(f"{base}/*.tar", "data.files")
    with pytest.raises(UserError, match=r"there is no (file|object) .*/nothing\.bin"):
        open_file(f"{base}/nothing.bin")
    with pytest.raises(UserError, match=r"many\.bin (ends at byte 1000003|can't be read)"):
        read_range(path, len(BYTES) - 3, len(BYTES) + 5)
    read_range(path, 0, 10)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s3://a/{08..11}.tar", ["s3://a/08.tar", "s3://a/09.tar", "s3://a/10.tar", "s3://a/11.tar"]),
        ("s3://{a,b}/{9..10}", ["s3://a/9", "s3://a/10", "s3://b/9", "s3://b/10"]),
        ("https://a/b.tar?signature=x", ["https://a/b.tar?signature=x"]),
    ],
)
def test_names_in_braces(pattern: str, names: list[str]) -> None:
    assert list_files(pattern, "data.files") == names


def test_a_file_may_have_braces_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "{1..2}"
    path.touch()
    assert list_files(str(path), "data.files") == [str(path)]
    with pytest.raises(UserError, match="names nothing, as 2 is greater than 1"):
        list_files("{2..1}", "data.files")
    with pytest.raises(UserError, match="names more than 1,000,000 files"):
        list_files("{0..999999999}", "data.files")


def test_what_is_not_permitted_is_not_taken_for_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the user of a cluster: root, who may read everything, runs this too."""
    for name in ("a/x", "b/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jsonl").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: "/b" not in path)
        for pattern in ("*/x/*.jsonl", "**/*.jsonl", "b/x/*"):
            with pytest.raises(UserError, match=r"/b/(x/)? can't be searched for .*: permission denied"):
                list_files(f"{tmp_path}/{pattern}", "data.files")
        assert list_files(f"{tmp_path}/a/**/*.jsonl", "data.files") == [f"{tmp_path}/a/x/1.jsonl"]

    def refused(path: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refused)
        with pytest.raises(UserError, match=r"1\.jsonl can't be read: Permission denied"):
            list_files(f"{tmp_path}/a/x/1.jsonl", "data.files")


def test_errors_of_reading_a_local_file_name_it() -> None:
    with open_file("/proc/self/mem") as file:
        for count in (5, -1):
            with pytest.raises(UserError, match=r"/proc/self/mem can't be read: Input/output error"):
                file.read(count)


@pytest.mark.parametrize("fault", [503, 500, 429, "drop"])
def test_what_may_pass_is_tried_again(server: ObjectServer, fault: str | int, caplog: pytest.LogCaptureFixture) -> None:
    size_and_version(f"{server.url}/many.bin")
    server.faults += [fault, fault]
    state = random.getstate()
    assert read_range(f"{server.url}/many.bin", 10, 90_000) == BYTES[10:90_000]
    assert random.getstate() == state
    assert len([request for request in server.requests if request[2] == "bytes=10-89999"]) == 3
    assert f"{server.url}/many.bin: " in caplog.text
    assert "try 2 of 3 failed and is repeated" in caplog.text
    server.faults += [fault, fault, fault]
    with pytest.raises(UserError, match=r"many\.bin can't be read, also after 3 tries: .*Start again"):
        read_range(f"{server.url}/many.bin", 10, 90_000)


def test_a_size_is_asked_for_again(server: ObjectServer) -> None:
    server.faults += [503, 503]  # fsspec asks by HEAD, and by GET when that fails
    assert size_and_version(f"{server.url}/many.bin")[0] == len(BYTES)
    assert [method for method, *_ in server.requests] == ["HEAD", "GET", "HEAD"]


def test_a_server_that_does_not_answer(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_stores, "TIMEOUT", 0.1)
    read_range(f"{server.url}/many.bin", 0, 10)
    server.faults += ["late"]
    assert read_range(f"{server.url}/many.bin", 0, 10) == BYTES[:10]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, r"there is no object http://127.0.0.1:\d+/many.bin. Check its address"),
        (403, r"access to http://127.0.0.1:\d+/many.bin is denied: .*403.*Give credentials for it: an address with"),
        (400, r"many.bin can't be read: .*400"),
        ("whole", r"many.bin: its server sends whole files, no parts of them. Copy it"),
    ],
)
def test_what_does_not_pass_is_said_at_once(server: ObjectServer, fault: str | int, message: str) -> None:
    server.faults += [fault]
    with pytest.raises(UserError, match=message):
        read_range(f"{server.url}/many.bin", 0, 10)
    assert len(server.requests) == 1


def test_no_message_shows_a_signature(server: ObjectServer) -> None:
    address = f"{server.url}/many.bin?X-Amz-Signature=0123456789abcdef"
    assert read_range(address, 0, 3) == BYTES[:3]
    server.faults += [403]
    with pytest.raises(UserError) as failure:
        read_range(address, 0, 10)
    assert "0123456789abcdef" not in str(failure.value)


def test_reading_ahead(server: ObjectServer) -> None:
    path = f"{server.url}/many.bin"
    with open_file(path) as file:
        assert file.read(10) == BYTES[:10]
        assert [span for *_, span in server.requests] == ["", "bytes=0-131071"]
        server.faults += [503]
        assert file.read() == BYTES[10:]
    spans = sorted({span for *_, span in server.requests if span}, key=lambda span: int(span[6:].split("-")[0]))
    assert spans == ["bytes=0-131071", "bytes=131072-393215", "bytes=393216-655359", "bytes=655360-1000002"]


def test_a_failure_ahead_is_raised_where_it_is_read(server: ObjectServer) -> None:
    with open_file(f"{server.url}/many.bin") as file:
        file.read(131_072)
        server.faults += ["none", 404]
        file.read(10)
        with pytest.raises(UserError, match="there is no object"):
            file.read()


def _forked(work: Any) -> int:
    """Returns the status of a forked process, 0 if `work` has returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes_that_are_forked_read_on(server: ObjectServer, folder: Path) -> None:
    """With connections, a file and its block ahead open; the parent's connection is still good afterwards."""
    path = f"{server.url}/many.bin"
    reader = RangeReader()
    with open_file(path) as file:
        file.read(200_000)

        def work() -> None:
            assert file.read() == BYTES[200_000:]
            for place in (path, str(folder / "many.bin")):
                assert reader.read(place, 5, 50) == BYTES[5:50]

        reader.read(str(folder / "many.bin"), 0, 10)
        assert [_forked(work) for _ in range(3)] == [0, 0, 0]
        assert file.read() == BYTES[200_000:]
        assert read_range(path, 5, 50) == BYTES[5:50]


def test_few_files_stay_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    readers = [pickle.loads(pickle.dumps(RangeReader(most_open=2)))]

    def work() -> None:
        for _ in range(50):
            for name in ("a", "b", "c"):
                assert readers[0].read(str(folder / f"{name}.jsonl"), 0, 8) == b'{"text":'

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before + 2
    with pytest.raises(UserError, match=r"a\.jsonl ends at byte 20, before byte 30"):
        readers[0].read(str(folder / "a.jsonl"), 0, 30)
    readers.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://a/b needs a package that is missing .*: pip install gcsfs"):
        open_file("gs://a/b")
    with pytest.raises(UserError, match="fsspec knows no addresses that begin with nothing://"):
        open_file("nothing://a/b")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"memory://a needs fsspec .*pip install 'distaccum\[stores\]'"):
        open_file("memory://a")


def test_local_paths_need_no_fsspec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    (path,) = list_files(f"file://{folder}/many.*", "data.files")
    assert (path, read_range(path, 0, 9), size_and_version(path)[0]) == (f"{folder}/many.bin", BYTES[:9], len(BYTES))


def test_versions_tell_a_change(folder: Path, server: ObjectServer) -> None:
    for place in (str(folder / "a.jsonl"), f"{server.url}/a.jsonl"):
        before = size_and_version(place)
        (folder / "a.jsonl").write_bytes(os.urandom(before[0]))
        assert size_and_version(place) != before
    with pytest.raises(UserError, match="is a folder"):
        open_file("memory:///")
    assert storage.is_remote("s3://a")
