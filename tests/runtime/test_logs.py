from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import disks
import forking
import pytest

from distaccum.errors import UserError
from distaccum.runtime.logs import LOGGER_NAME, logging_to, print_error

logger = logging.getLogger(f"{LOGGER_NAME}.somewhere")


def _log_all() -> None:
    logger.debug("some detail")
    logger.info("some news")
    logger.warning("some warning")


def test_rank_0_says_what_is_not_a_detail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path, rank=0):
        _log_all()
    assert capsys.readouterr().out == "some news\nsome warning\n"


def test_other_ranks_only_warn_and_say_who_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path, rank=3):
        _log_all()
    assert capsys.readouterr().out == "[rank 3] some warning\n"


def test_what_is_printed_does_not_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nasty = "a\x1b]0;owned\x07\x1b[2J\x9b1m\r\x08\u202eb\x7f über 日本\tend\nnext line"
    with logging_to(tmp_path, rank=0):
        logger.warning("file %s", nasty)
    print_error(nasty)
    shown = r"a\x1b]0;owned\x07\x1b[2J\x9b1m\r\x08\u202eb\x7f über 日本" + "\tend\nnext line"
    out, err = capsys.readouterr()
    assert out.replace(" " * 4, "\t").endswith("next line\n")
    assert out.startswith(r"file a\x1b]0;owned\x07\x1b[2J\x9b1m\r\x08\u202eb\x7f über")
    assert err == "error: {}\n".format(shown.replace("\n", r"\n"))  # and is one message
    assert shown in (tmp_path / "logs" / "rank0.log").read_text()


def test_each_rank_writes_everything_to_its_file(tmp_path: Path) -> None:
    with logging_to(tmp_path, rank=3):
        _log_all()
    starts, *lines = (tmp_path / "logs" / "rank3.log").read_text().splitlines()
    assert re.fullmatch(rf"==== [-\d]+ [:\d]+ rank 3 starts \(process {os.getpid()} on \S+\) ====", starts)
    assert [line.split(" ", 2)[2] for line in lines] == [
        "DEBUG distaccum.somewhere: some detail",
        "INFO distaccum.somewhere: some news",
        "WARNING distaccum.somewhere: some warning",
    ]


def test_an_error_leaves_its_traceback_in_the_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError), logging_to(tmp_path, rank=0):
        raise UserError("mend this")
    assert capsys.readouterr() == ("", "")
    text = (tmp_path / "logs" / "rank0.log").read_text()
    assert "Traceback (most recent call last)" in text
    assert text.endswith("UserError: mend this\n")


def test_a_second_run_writes_on(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with logging_to(tmp_path, rank=0):
            logger.debug(text)
    assert [_last_word(line) for line in _lines(tmp_path)] == ["starts", "first", "starts", "second"]


def test_a_run_without_messages_leaves_no_mark(tmp_path: Path) -> None:
    with logging_to(tmp_path, rank=0):
        pass
    assert _lines(tmp_path) == []


def test_what_a_killed_run_left_of_a_line_does_not_run_into_the_next(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").write_text("first\nsecond, half of i")
    with logging_to(tmp_path, rank=0):
        logger.debug("third")
    assert [_last_word(line) for line in _lines(tmp_path)] == ["first", "i", "starts", "third"]


def test_a_full_disk_costs_messages_of_the_file_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path, rank=0):
        logger.info("before")
        with disks.no_larger_files(than=(tmp_path / "logs" / "rank0.log").stat().st_size + 20):
            logger.info("lost, but for its beginning")
            logger.warning("lost too")
        logger.info("after")
    assert capfd.readouterr() == ("before\nlost, but for its beginning\nlost too\nafter\n", "")
    lines = _lines(tmp_path)
    assert [_last_word(line) for line in lines] == ["starts", "before", "missing", "after"]
    assert lines[2] == "==== missing here, as they could not be written: 2 messages ===="


def test_a_disk_that_stays_full_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disks.no_larger_files(than=0), logging_to(tmp_path, rank=0):
        _log_all()
    assert capsys.readouterr() == ("some news\nsome warning\n", "")


def test_a_message_that_does_not_fit_its_arguments_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path, rank=1):
        logger.debug("%d", "no number")
    assert "--- Logging error ---" in capfd.readouterr().err


def test_text_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    with logging_to(tmp_path, rank=1):
        logger.debug("a path: %s", os.fsdecode(b"/\xff"))
    assert (tmp_path / "logs" / "rank1.log").read_text().endswith("a path: /\\udcff\n")


def test_a_log_is_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="can't be written: Too many levels of symbolic links"):
        logging_to(tmp_path, rank=0).__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_no_output_shows_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    with logging_to(tmp_path, rank=0):
        logger.warning("with hunter2hunter2 at https://me:it@host")
    print_error("with hunter2hunter2")
    out, err = capsys.readouterr()
    assert (out, err) == ("with <redacted> at https://<redacted>@host\n", "error: with <redacted>\n")
    assert _lines(tmp_path)[-1].endswith("with <redacted> at https://<redacted>@host")


_CHILD = """
import sys; from pathlib import Path
from distaccum.runtime.logs import console, flush_output, logging_to, make_output_safe, print_error
make_output_safe()
with logging_to(Path(sys.argv[1]), rank=0) as logger:
    for number in range(2000):
        logger.info("message %d", number)
        console.print("some more")
if len(sys.argv) > 2: print_error(sys.argv[2])
flush_output()
"""


@pytest.mark.parametrize("arguments", [[], ["a mistake"]], ids=["no error", "error"])
def test_standard_output_on_a_full_disk_stops_nothing(tmp_path: Path, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [forking.python(), "-c", _CHILD, str(tmp_path), *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (0, "error: a mistake\n" if arguments else "")
    assert _lines(tmp_path)[-1].endswith("message 1999")


def test_standard_error_on_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([forking.python(), "-c", _CHILD, str(tmp_path), "a mistake"], stdout=full, stderr=full)
    assert done.returncode == 0


def test_a_reader_that_has_gone_stops_nothing(tmp_path: Path) -> None:
    """As in `… | head`."""
    with subprocess.Popen(
        [forking.python(), "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == b""
    assert child.returncode == 0
    assert _lines(tmp_path)[-1].endswith("message 1999")


_PRINTER = """
import sys; from distaccum.runtime.logs import check_printed, make_output_safe
make_output_safe()
print("1 × 2")
print("1 × 2", file=sys.stderr)
check_printed()
file = open(sys.argv[1], "w")
assert file.fileno() > 2
raise KeyError("password=hunter2")
"""


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_and_characters_that_they_lack(tmp_path: Path, closed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", _PRINTER, str(tmp_path / "file")],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (tmp_path / "file").read_text() == "", "nothing is printed into it"
    assert done.stdout == ("1 \\xd7 2\n" if closed in ("", "2>&-") else "")
    assert done.stderr.startswith("1 \\xd7 2\nTraceback" if closed in ("", ">&-") else "")
    assert "hunter2" not in done.stderr.partition("KeyError")[2]


def _lines(run_dir: Path) -> list[str]:
    return (run_dir / "logs" / "rank0.log").read_text().splitlines()


def _last_word(line: str) -> str:
    """`starts` for the line that says so, `missing` for that about missing messages."""
    return next((word for word in ("starts", "missing") if word in line), line.split()[-1])


def test_the_logger_is_left_as_it_was(tmp_path: Path) -> None:
    package = logging.getLogger(LOGGER_NAME)
    before = (package.level, package.propagate, list(package.handlers))
    with logging_to(tmp_path, rank=0):
        assert (package.level, package.propagate, list(package.handlers)) != before
    assert (package.level, package.propagate, list(package.handlers)) == before


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("not a folder")
    with pytest.raises(UserError) as refused, logging_to(tmp_path, rank=0):
        raise AssertionError("not reached")
    assert str(refused.value) == (
        f"the log {tmp_path}/logs/rank0.log can't be written: File exists. Choose another folder with run_dir=…"
    )


def test_an_error_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("mend this")
    assert capsys.readouterr() == ("", "error: mend this\n")
