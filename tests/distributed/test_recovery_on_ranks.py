from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_recovery", world_sizes=(2,))
def test_recovery(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
