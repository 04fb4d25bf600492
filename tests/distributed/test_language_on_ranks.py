from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_language", world_sizes=(2, 4))
def test_language(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
