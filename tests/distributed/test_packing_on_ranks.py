from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_packing", world_sizes=(1, 2, 4))
def test_packing(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
