"""Random command lines end with a result or one message that names a key. More of them: `judging.py`."""

from __future__ import annotations

import command_lines
import judging
import pytest
from command_lines import Case

SEEDS = range(6000, 6150)
"""About 30 seconds of one core."""


@pytest.mark.timeout(600)
def test_random_command_lines_end_with_a_result_or_one_message() -> None:
    verdicts = judging.run(SEEDS)
    assert not [str(verdict) for verdict in verdicts if verdict.fault], judging.summary(verdicts)
    assert {verdict.status for verdict in verdicts} >= {0, 2}
    assert len({verdict.case.tool for verdict in verdicts}) > 5, judging.summary(verdicts)


def test_a_case_is_a_function_of_its_seed() -> None:
    found = [command_lines.case(seed) for seed in range(300)]
    assert found == [command_lines.case(seed) for seed in range(300)]
    assert len({case.words for case in found}) > 290


CASE = Case("train", (), ("seed=x",), ("seed",))


@pytest.mark.parametrize(
    ("status", "err", "fault"),
    [
        (2, "error: seed=x: it takes a whole number.\n", None),
        (0, "", None),
        (2, "error: it takes a whole number.\n", "names no key"),
        (2, "error: seed=x\nerror: seed=x\n", "not one message"),
        (2, "error: seed=x\nmore\n", "not one message"),
        (2, "Traceback (most recent call last):\nerror: seed=x\n", "traceback"),
        (1, "", "status 1"),
        (-11, "", "status -11"),
    ],
)
def test_what_counts_as_a_fault(status: int, err: str, fault: str | None) -> None:
    assert judging.fault_of(CASE, status, "", err) == fault
