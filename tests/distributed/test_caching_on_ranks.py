from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_caching", world_sizes=(2, 3))
def test_caching(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
