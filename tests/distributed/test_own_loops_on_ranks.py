from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_own_loops", world_sizes=(1, 2))
def test_own_loops(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
