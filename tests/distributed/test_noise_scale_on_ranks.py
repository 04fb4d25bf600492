from __future__ import annotations

from launching import assert_passed, cases


@cases("checks_noise_scale")
def test_noise_scale(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)
