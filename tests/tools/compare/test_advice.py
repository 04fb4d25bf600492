from __future__ import annotations

import pytest
from rows_by_hand import report, row

from distaccum.tools.compare.advice import advise
from distaccum.tools.compare.results import CompareRow, Reference

SLOW = (40.0, 41.0, 42.0, 41.0, 40.0)
MIDDLING = (30.0, 31.0, 32.0, 31.0, 30.0)
FAST = (20.0, 21.0, 22.0, 21.0, 20.0)


def said(*rows: CompareRow, reference: Reference | None = None) -> str:
    return "\n".join(advise(report(*rows, **({"reference": reference} if reference else {}))))


def test_the_fastest_exact_placement_is_chosen() -> None:
    text = said(
        row("single", SLOW),
        row("ddp", FAST, world_size=2, calls=1, sent=1000),
        row("ddp_bf16", (10.0,) * 5, world_size=2, calls=1, sent=500, error_float64=1e-3, error=1e-3),
    )
    assert text.startswith("Use DDP, no_sync · 2 ranks × 4: its update is the large batch's (error 1.0e-15 in float64)")
    assert "torchrun --nproc_per_node=2 -m distaccum.train strategy=ddp batch.accumulation_steps=4" in text
    assert "2.00 times as fast as accumulation · 4 steps" in text.replace("1.95", "2.00")
    assert "Compression would be faster: DDP, bf16 · 2 ranks × 4 takes 10.0 ms an update" in text
    assert "off by 1.0e-03" in text


def test_within_the_noise_the_simpler_one_is_chosen_and_it_says_so() -> None:
    text = said(row("single", (20, 25, 30, 35, 40)), row("ddp", (18, 24, 29, 33, 39), world_size=2))
    assert text.startswith("Use accumulation · 4 steps")
    assert "DDP, no_sync · 2 ranks × 4 is as fast within the spread of the rounds" in text


def test_within_the_noise_clearly_less_memory_decides() -> None:
    text = said(
        row("single", FAST, memory_mib=1000),
        row("fsdp", FAST, world_size=2, memory_mib=300),
        row("ddp", SLOW, world_size=2),
    )
    assert text.startswith("Use FSDP · 2 ranks × 4")
    assert "the least of all; the most is 1000.0 MiB (accumulation · 4 steps)" in text


def test_the_way_out_when_memory_is_short_is_named() -> None:
    text = said(row("ddp", FAST, world_size=2, memory_mib=1000), row("fsdp", SLOW, world_size=2, memory_mib=500))
    assert text.startswith("Use DDP, no_sync")
    assert "If that is too much: FSDP · 2 ranks × 4 needs 500.0 MiB, at 41.0 ms an update" in text


@pytest.mark.parametrize(
    ("every", "words"), [(SLOW, "takes 1.95 times as long"), (FAST, "takes the same time here, within the noise")]
)
def test_what_syncing_in_every_micro_step_costs(every: tuple[float, ...], words: str) -> None:
    text = said(
        row("ddp_sync_every_step", every, world_size=2, calls=4, sent=4096),
        row("ddp", FAST, world_size=2, calls=1, sent=1024),
    )
    assert "sends 4.0 KiB in 4 collectives where no_sync sends 1.0 KiB in 1" in text
    assert words in text


def flavours(sharded_mib: int) -> str:
    return said(
        row("fsdp", FAST, world_size=4, calls=3, sent=4096),
        row("fsdp_sharded", SLOW, world_size=4, memory_mib=sharded_mib, calls=12, sent=4 * 4096),
        row(
            "fsdp_node",
            MIDDLING,
            world_size=4,
            calls=13,
            sent=4 * 4096 + 2048,
            by_axis={"shard": (12, 4 * 4096), "replicate": (1, 2048)},
        ),
    )


def test_which_way_to_accumulate_under_fsdp() -> None:
    text = flavours(sharded_mib=300)
    assert "Of FSDP's ways to accumulate (4 ranks × 4), take FSDP here: it takes 21.0 ms an update" in text
    assert "Where memory is short, FSDP, sharded needs 300.0 MiB, at 41.0 ms an update." in text
    assert (
        "On several nodes with a slow link, take FSDP, node of 2 (strategy.shard_size: ranks of a node): 2.0 KiB"
        in text
    )
    assert "of gradients in 1 collective an update cross it then" in text
    assert "Else 4.0 KiB in 3 under FSDP and 16.0 KiB in 12 under FSDP, sharded may cross it" in text
    assert "Where memory is short, no other helps" in flavours(sharded_mib=390)
    assert "ways to accumulate" not in said(row("fsdp", FAST, world_size=4), row("fsdp_sharded", SLOW, world_size=2))


def test_an_inexact_placement_is_not_chosen_and_is_named() -> None:
    text = said(row("one_shot", SLOW, accumulation_steps=1, error_float64=0.0), row("single", FAST, error_float64=0.02))
    assert text.startswith("Use one shot: it is the large batch itself, which fits")
    assert "Not the large batch's update: accumulation · 4 steps (2.0e-02 in float64)" in text
    assert "python -m distaccum.check" in text


def test_it_says_when_nothing_is_exact() -> None:
    text = said(row("single", FAST, error_float64=0.02), row("ddp", SLOW, world_size=2, error_float64=0.03))
    assert text.startswith(
        "No placement gives the large batch's update to 1e-12 in float64: errors are from 2.0e-02 to"
    )


def test_without_a_reference_speed_decides() -> None:
    rows = [
        row("single", SLOW, error_float64=None, error=None),
        row("ddp", FAST, world_size=2, error_float64=None, error=None),
    ]
    text = said(*rows, reference=Reference(problem="out of memory"))
    assert text.startswith("Use DDP, no_sync · 2 ranks × 4: its exactness could not be measured")


def test_what_could_not_run_is_named_with_its_reason_once() -> None:
    reason = "this host has 1 GPU."
    text = said(row("single", FAST), row("ddp", world_size=2, reason=reason), row("fsdp", world_size=2, reason=reason))
    assert text.endswith("Not measured: DDP, no_sync · 2 ranks × 4 and FSDP · 2 ranks × 4 (this host has 1 GPU).")


def test_nothing_measured_is_said() -> None:
    assert said(row("single", reason="no")) == "Nothing could be measured: the table says why for each placement."
