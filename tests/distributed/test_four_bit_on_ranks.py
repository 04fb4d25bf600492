from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_four_bit", world_sizes=(2,))
def test_four_bit(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
