from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_sources", world_sizes=(4,))
def test_sources(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
