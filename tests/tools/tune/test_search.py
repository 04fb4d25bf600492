"""Which way the search goes, on machines whose times are made up; test_tune has real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from distaccum.config import ByLengthBatchConfig, TrainConfig
from distaccum.config.compose import compose
from distaccum.config.tools import TuneConfig
from distaccum.errors import UserError
from distaccum.tools.bench.sessions import PlacementFailedError
from distaccum.tools.tune.contenders import Verdict, verdict_of
from distaccum.tools.tune.search import Search
from distaccum.tools.tune.settings import base_of, micro_batch_of

Seconds = Callable[[TrainConfig], float]


class Machine:
    """Answers as the processes of a training would that takes so long."""

    def __init__(self, seconds: Seconds, *, memory: Seconds = lambda _: 1.0, lengths_differ: bool = False) -> None:
        self.seconds, self.memory, self.lengths_differ = seconds, memory, lengths_differ
        self.open = 0

    def start(self, config: TrainConfig, _: str) -> Any:
        machine = self
        machine.open += 1

        class Processes:
            def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
                if do == "facts":
                    return [{"lengths_differ": machine.lengths_differ, "gradient_bytes": 10 * 2**20, "device": "cpu"}]
                if do == "prepare":
                    if machine.memory(config) > 8:
                        raise PlacementFailedError("out of memory", "memory")
                    memory = int(machine.memory(config) * 2**30)
                    return [
                        {"peak_memory": memory, "memory_kind": "made up", "device": "CPU", "micro_batch_sizes": [1]}
                    ]
                seconds = [machine.seconds(config)] * arguments["updates"]
                zeros = [0.0] * len(seconds)
                return [
                    {
                        "seconds": seconds,
                        "data_seconds": zeros,
                        "sync_seconds": zeros,
                        "samples": 64,
                        "sync_calls": 1,
                        "sync_bytes": 1,
                    }
                ]

            def close(self) -> None:
                machine.open -= 1

        return Processes()


def search(machine: Machine, *overrides: str, world_size: int = 2) -> Search:
    config = compose(["experiment=text", *overrides], "tune")
    assert isinstance(config, TuneConfig)
    return Search(config, base_of(config, world_size), world_size, machine.start, lambda *_: None)


def micro_batch(config: TrainConfig) -> int:
    return micro_batch_of(config, 2)


@pytest.mark.parametrize("best", [1, 2, 4, 8, 16, 32])
def test_the_best_micro_batch_is_found_up_and_down(best: int) -> None:
    machine = Machine(lambda config: 1 + abs(math.log2(micro_batch(config) / best)))
    found = search(machine, f"batch.micro_batch_size={max(2, min(8, best * 4))}")
    found.run()
    assert micro_batch(found.best_config) == best
    found.close()
    assert machine.open == 0


def test_a_gain_within_the_noise_is_not_taken() -> None:
    found = search(Machine(lambda config: 1.0 - 0.01 * math.log2(micro_batch(config))))
    found.run()
    assert found.best is found.default
    assert found.confirm() is None
    assert {row.verdict for row in found.rows[1:]} == {"no clear difference", "slower"}
    found.close()


def test_by_length_is_tried_where_lengths_differ() -> None:
    def seconds(config: TrainConfig) -> float:
        return 0.5 if isinstance(config.batch, ByLengthBatchConfig) else 1.0

    one_length, several = search(Machine(seconds)), search(Machine(seconds, lengths_differ=True))
    one_length.run()
    several.run()
    assert "cut" not in {row.knob for row in one_length.rows}
    assert isinstance(several.best_config.batch, ByLengthBatchConfig)
    confirmation = several.confirm()
    assert confirmation is not None
    assert confirmation.is_faster
    assert confirmation.ratio == 0.5


def test_checkpointing_makes_room_for_a_larger_micro_batch() -> None:
    def memory(config: TrainConfig) -> float:
        return micro_batch(config) / (4 if config.model.activation_checkpointing else 1)

    def seconds(config: TrainConfig) -> float:
        return (1.1 if config.model.activation_checkpointing else 1.0) / micro_batch(config)

    found = search(Machine(seconds, memory=memory), "batch.micro_batch_size=4")
    found.run()
    assert found.best_config.model.activation_checkpointing
    assert micro_batch(found.best_config) == 32
    assert next(row.verdict for row in found.rows if row.title == "micro-batch 16") == "out of memory"


def test_under_fsdp_shards_make_room_for_a_larger_micro_batch_and_whole_gradients_are_faster() -> None:
    def memory(config: TrainConfig) -> float:
        return micro_batch(config) + (0 if config.strategy.accumulate.name != "whole" else 4)  # type: ignore[attr-defined]

    def seconds(config: TrainConfig) -> float:
        return (1.0 if config.strategy.accumulate.name == "whole" else 1.1) / micro_batch(config)  # type: ignore[attr-defined]

    for shard_size, way in ((None, "sharded"), (1, "node")):
        overrides = [] if shard_size is None else [f"strategy.shard_size={shard_size}"]
        machine = Machine(seconds, memory=memory)
        found = search(machine, "strategy=fsdp", "batch.micro_batch_size=4", *overrides)
        found.run()
        row = next(row for row in found.rows if row.knob == "accumulate")
        assert row.overrides == ["batch.micro_batch_size=8", f"strategy.accumulate={way}"]
        assert row.is_taken
        assert micro_batch(found.best_config) == 8
    found = search(Machine(seconds), "strategy=fsdp", "strategy.accumulate=sharded", "batch.micro_batch_size=32")
    found.run()
    assert found.best.setting["strategy.accumulate"].name == "whole"


def test_a_limit_of_memory_is_kept() -> None:
    found = search(
        Machine(lambda config: 1 / micro_batch(config), memory=lambda config: micro_batch(config) / 8),
        "tune.memory_gb=2.5",
    )
    found.run()
    assert micro_batch(found.best_config) == 16
    assert "needs 4.00 GiB, more than tune.memory_gb=2.5" in [row.verdict for row in found.rows]


@pytest.mark.parametrize("is_accepted", [False, True])
def test_what_is_not_exact_is_reported_and_suggested_only_if_asked(is_accepted: bool) -> None:
    def seconds(config: TrainConfig) -> float:
        return 1.0 if config.strategy.compression.name == "none" else 0.5  # type: ignore[attr-defined]

    found = search(Machine(seconds), "tune.compressions=[bf16]", f"tune.accept_inexact={is_accepted}")
    found.run()
    (row,) = (row for row in found.rows if row.is_inexact)
    assert row.ratio == 0.5
    assert row.verdict == "faster"
    assert row.is_taken == is_accepted == (found.best is not found.default)


def test_a_suggestion_that_is_not_confirmed_is_taken_back() -> None:
    turn = 0

    def seconds(config: TrainConfig) -> float:
        # Fast while it is tried, and never again: what a disturbed machine may do.
        nonlocal turn
        turn += 1
        return 0.5 if micro_batch(config) == 16 and turn < 20 else 1.0

    found = search(Machine(seconds))
    found.run()
    assert micro_batch(found.best_config) == 16
    turn = 100
    confirmation = found.confirm()
    assert confirmation is not None
    assert not confirmation.is_faster
    assert found.best is found.default


def test_when_time_is_up_the_rest_is_named() -> None:
    found = search(Machine(lambda _: 1.0), "tune.minutes=1e-9")
    found.run()
    assert len(found.rows) == 1
    assert "micro-batch 16" in found.not_tried


def test_a_configuration_that_cannot_be_trained_is_one_message() -> None:
    with pytest.raises(UserError, match="can't be trained here as it is, so it can't be tuned: out of memory"):
        search(Machine(lambda _: 1.0, memory=lambda _: 99.0)).run()


def test_verdicts() -> None:
    assert verdict_of([0.9, 0.91, 0.92], 0.03) is Verdict.faster
    assert verdict_of([0.98, 0.98, 0.98], 0.03) is Verdict.alike
    assert verdict_of([0.7, 0.8, 1.4], 0.03) is Verdict.alike
    assert verdict_of([1.1, 1.2, 1.3], 0.03) is Verdict.slower
