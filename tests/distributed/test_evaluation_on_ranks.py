from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_evaluation")
def test_evaluation_and_agreement(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
