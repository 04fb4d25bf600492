from __future__ import annotations

import logging
from pathlib import Path

import pytest

from distaccum.errors import UserError
from distaccum.logs import LOGGER_NAME, logging_to, print_error

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


def test_each_rank_writes_everything_to_its_file(tmp_path: Path) -> None:
    with logging_to(tmp_path, rank=3):
        _log_all()
    lines = (tmp_path / "logs" / "rank3.log").read_text().splitlines()
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
    assert [line.split()[-1] for line in (tmp_path / "logs" / "rank0.log").read_text().splitlines()] == [
        "first",
        "second",
    ]


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
