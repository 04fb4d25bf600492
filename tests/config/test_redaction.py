from __future__ import annotations

from typing import Any

import pytest

from distaccum.config.compose import compose
from distaccum.config.redaction import REDACTED, hide, redacted, redacted_arguments, redacted_text, secrets


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distaccum.config.redaction._known", set())
    monkeypatch.setenv("DISTACCUM_SECRET_VARIABLES", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://me:hunter2@db/runs?x=1", f"postgres://{REDACTED}@db/runs?x=1"),
        ("clone https://ghp_0815@github.com/me/it failed", f"clone https://{REDACTED}@github.com/me/it failed"),
        ("https://me:p@ss@host", f"https://{REDACTED}@host"),
        ("https://host/a?sig=s%2Bs&b=c&token=t t", f"https://host/a?sig={REDACTED}&b=c&token={REDACTED} t"),
        ("{'Authorization': 'Basic bWU6aXQ=', 'a': 1}", f"{{'Authorization': {REDACTED}, 'a': 1}}"),
        ("Authorization: Bearer abc, Accept: b", f"Authorization: {REDACTED}, Accept: b"),
        ("sent 'Bearer eyJhbGciOi.JIUz' to it", f"sent 'Bearer {REDACTED}' to it"),
        ("host=h user=me password=hunter2 port=1", f"host=h user=me password={REDACTED} port=1"),
        ('{"api_key": "a b", "pwd":"c"}', f'{{"api_key": {REDACTED}, "pwd":{REDACTED}}}'),
        ("MY_PAT=abc X-Api-Key: def", f"MY_PAT={REDACTED} X-Api-Key: {REDACTED}"),
    ],
)
def test_credentials_are_known_by_where_they_stand(text: str, expected: str) -> None:
    assert redacted_text(text) == redacted_text(expected) == expected
    assert redacted({"value": [text]}) == {"value": [expected]}


@pytest.mark.parametrize(
    "text",
    [
        "update 3/8  loss 0.5  lr 0.1",
        "https://host/path/me@example.org?page=3",
        "file:///home/me/a:b",
        "pad_token=0 --end-token=3 max_tokens=512 author=me compat=1 cut=by_length",
        "git@github.com:me/it.git",
        "the bearer of news",
        "give it again, as in data.train.api_key=…",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redacted_text(text) == text


def test_a_long_line_takes_no_time() -> None:
    for text in ("x" * 200_000, "token" * 40_000, "://" * 60_000, "a.b-" * 50_000):
        assert redacted_text(text) == text


def test_names_of_keys_say_what_is_secret() -> None:
    secret = {
        "auth": ["me", "it"],
        "pat": "p",
        "pwd": "q",
        "headers": {"Authorization": "r"},
        "credentials": {"id": "s"},
    }
    assert redacted(secret) == {
        "auth": [REDACTED] * 2,
        "pat": REDACTED,
        "pwd": REDACTED,
        "headers": {"Authorization": REDACTED},
        "credentials": {"id": REDACTED},
    }
    plain: dict[str, Any] = {"path": "p", "compat": "q", "pad_token": "r", "token": None, "auth": True, "cls_token": 3}
    assert redacted(plain) == plain
    assert redacted({"password": 12345678, "token": 50256, "lr": 0.5}) == {
        "password": REDACTED,
        "token": 50256,
        "lr": 0.5,
    }


def test_a_secret_of_a_configuration_is_one_everywhere() -> None:
    hide({"mail": {"password": "hunter2hunter2"}, "token": "short"})
    assert redacted({"url": "to hunter2hunter2", "other": "short"}) == {"url": REDACTED, "other": "short"}
    assert redacted_text("can't log in with hunter2hunter2") == f"can't log in with {REDACTED}"


def test_what_comes_from_the_environment_is_secret_unless_it_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the names of the variable and of the key."""
    monkeypatch.setenv("LOGIN", "correct horse")
    monkeypatch.setenv("HERE", "/usr/somewhere")
    monkeypatch.setenv("SLASHED", "/Zm9vYmFy/c2VjcmV0")
    monkeypatch.setenv("UNREAD", "not read by it")
    overrides = [f"+observers.a.{key.lower()}=${{oc.env:{key}}}" for key in ("LOGIN", "HERE", "SLASHED")]
    mine = compose([*overrides, "+observers.a.b=x ${oc.env:LOGIN}", "+observers.a.c=${oc.env:NONE,by default}"])
    found = mine.observers["a"]
    assert found["login"] == "correct horse"
    assert redacted(found) == {
        "login": REDACTED,
        "here": "/usr/somewhere",
        "slashed": REDACTED,
        "b": REDACTED,
        "c": "by default",
    }
    assert {"correct horse", "/Zm9vYmFy/c2VjcmV0"} <= set(secrets())
    assert "not read by it" not in secrets()


def test_a_target_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "distaccum")
    assert redacted({"_target_": "distaccum.models.MLP", "project": "distaccum"}) == {
        "_target_": "distaccum.models.MLP",
        "project": REDACTED,
    }


def test_a_command_line_is_shown_without_secrets() -> None:
    given = ["+a.password=correct horse", "+a={pwd: x, b: y}", "a.url=ftp://me:it@host", "seed=1"]
    assert redacted_arguments(given) == [
        f"+a.password={REDACTED}",
        f"+a={{pwd: {REDACTED}, b: y}}",
        f"a.url=ftp://{REDACTED}@host",
        "seed=1",
    ]
