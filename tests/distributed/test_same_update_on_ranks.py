from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_same_update")
def test_same_update(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
