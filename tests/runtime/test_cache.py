from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from distaccum.errors import UserError
from distaccum.runtime.cache import Remembered, cache_folder, fingerprint
from distaccum.runtime.files import without_tilde


def test_it_is_kept_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Remembered("size").read() is None
    Remembered("size").write({"samples": 3})
    assert Remembered("size").read() == {"samples": 3}
    assert Remembered("size").path == tmp_path / "distaccum" / "size.json"
    # The standard has relative paths ignored.
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "distaccum"


def test_a_folder_that_cannot_be_written_to_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.DEBUG):
        Remembered("size").write(3)
    assert "can't be written" in caplog.text
    assert Remembered("size").read() is None


def test_one_holds_a_value_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    order = []

    def second() -> None:
        with Remembered("size").held():
            order.append("second")

    other = threading.Thread(target=second)
    with Remembered("size").held():
        other.start()
        other.join(0.1)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Remembered("size").held():
        order.append("without a cache nobody waits")
    assert len(order) == 3


def test_fingerprints_tell_everything_apart_but_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert len({fingerprint(entry) for entry in ({"a": 1}, {"a": 2}, {"a": "1"}, [1], None)}) == 5


def test_without_a_home_nothing_is_kept_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    kept = Remembered("sizes")
    kept.write([1, 2])
    assert kept.read() is None
    with pytest.raises(UserError, match=r"^~/x can't be found: .*\. Give the whole path\.$"):
        without_tilde("~/x")
