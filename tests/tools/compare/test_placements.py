from __future__ import annotations

import pytest

from distaccum.config import DDPConfig, DPConfig, FSDPConfig, SingleConfig
from distaccum.config.compose import compose
from distaccum.config.enums import Accumulate, Compression
from distaccum.config.tools import PlacementName
from distaccum.errors import UserError
from distaccum.tools.compare.placements import cases_of


def test_every_row_has_the_strategy_and_the_cut_that_it_is_named_after() -> None:
    config = compose(
        ["strategy.bucket_cap_mb=3", "compare.world_sizes=[1,2]", "compare.accumulation_steps=[2,8]"], "compare"
    )
    found = {case.key: case.configuration(config) for case in cases_of(config)}
    assert len(found) == 1 + 2 + 11 * 2
    assert isinstance(found["one_shot_1x1"].strategy, SingleConfig)
    assert found["one_shot_1x1"].batch.accumulation_steps == 1
    assert found["single_1x8"].batch.accumulation_steps == 8
    assert found["dp_2x2"].strategy == DPConfig(replicas=2)
    assert found["ddp_2x2"].strategy == DDPConfig(bucket_cap_mb=3)
    assert found["ddp_bf16_2x8"].strategy == DDPConfig(bucket_cap_mb=3, compression=Compression.bf16)
    assert found["zero1_2x8"].strategy == DDPConfig(bucket_cap_mb=3, shard_optimizer=True)
    assert found["fsdp_gathered_2x2"].strategy == FSDPConfig(reshard_in_window=False)
    assert found["fsdp_sharded_2x2"].strategy == FSDPConfig(accumulate=Accumulate.sharded)
    assert found["fsdp_node_2x2"].strategy == FSDPConfig(accumulate=Accumulate.node, shard_size=1)
    assert {config.batch.global_batch_size for config in found.values()} == {256}


def test_a_node_is_half_of_the_ranks_unless_it_is_configured() -> None:
    chosen = ["compare.placements=[fsdp,fsdp_sharded,fsdp_node]", "compare.world_sizes=[4,6]"]
    config = compose(chosen, "compare")
    titles = [case.title.partition(" × ")[0] for case in cases_of(config)]
    assert titles[-2:] == ["FSDP, node of 2 · 4 ranks", "FSDP, node of 3 · 6 ranks"]
    own = ["strategy=fsdp", "strategy.accumulate=node", "strategy.shard_size=4", "strategy.wrap=[Linear]"]
    given = compose([*chosen, *own], "compare")
    commands = {case.key: case.command(given, [*chosen, *own]) for case in cases_of(given)}
    launch = "torchrun --nproc_per_node=4 -m distaccum.train strategy.wrap=[Linear]"
    ends = "batch.accumulation_steps=4"
    assert commands["fsdp_node_4x4"].replace("'", "") == (
        f"{launch} strategy=fsdp strategy.accumulate=node strategy.shard_size=4 {ends}"
    )
    # What an experiment may have set is said too, though it is the default.
    assert commands["fsdp_sharded_4x4"].replace("'", "") == (
        f"{launch} strategy=fsdp strategy.accumulate=sharded strategy.shard_size=null {ends}"
    )
    assert "strategy.shard_size=4" in commands["fsdp_4x4"]
    assert "strategy.accumulate=whole" in commands["fsdp_4x4"]


def test_a_placement_that_no_world_size_fits_is_a_row_that_says_so() -> None:
    config = compose(["compare.placements=[ddp,single]", "compare.world_sizes=[1]"], "compare")
    single, ddp = cases_of(config)
    assert (single.placement.name, single.impossible) == (PlacementName.single, None)
    assert ddp.impossible == "DDP, no_sync needs two or more ranks, and compare.world_sizes=[1]"


def test_a_placement_that_the_configuration_refuses_is_a_row_that_says_so() -> None:
    chosen = ["experiment=text", "batch=packed", "compare.placements=[dp,ddp]", "compare.world_sizes=[2]"]
    by_name = {case.placement.name: case.impossible for case in cases_of(compose(chosen, "compare"))}
    assert by_name[PlacementName.ddp] is None
    assert str(by_name[PlacementName.dp]).startswith("batch=packed is not supported with strategy=dp")


def test_the_command_of_a_row_trains_what_was_compared() -> None:
    overrides = ["experiment=text", "strategy=ddp", "strategy.bucket_cap_mb=3", "optim.lr=1e-3"]
    given = [*overrides, "compare.rounds=1", "run_dir=a b", "+data.x=[1, 2]"]
    config = compose(overrides, "compare")
    commands = {case.key: case.command(config, given) for case in cases_of(config)}
    shared = "experiment=text optim.lr=1e-3 '+data.x=[1, 2]'"
    own = "experiment=text strategy.bucket_cap_mb=3 optim.lr=1e-3 '+data.x=[1, 2]'"
    steps = "batch.accumulation_steps=4 batch.micro_batch_size=null"  # the experiment gives a micro-batch
    many = "torchrun --nproc_per_node=2 -m distaccum.train"
    assert commands["single_1x4"] == f"python -m distaccum.train {shared} strategy=single {steps}"
    assert commands["dp_2x4"] == f"python -m distaccum.train {shared} strategy=dp strategy.replicas=2 {steps}"
    assert commands["zero1_2x4"] == f"{many} {own} strategy=ddp strategy.shard_optimizer=true {steps}"
    assert commands["fsdp_2x4"] == f"{many} {shared} strategy=fsdp {steps}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("compare.placements=[dpp]", "dpp"),
        ("compare.placements=[]", "compare.placements is empty"),
        ("compare.world_sizes=[2,0]", "compare.world_sizes=[2, 0] is impossible"),
        ("compare.rounds=0", "compare.rounds=0 is impossible"),
        ("compare.roundz=3", "Did you mean compare.rounds?"),
        ("batch.global_batch_size=null", "batch.global_batch_size is null"),
    ],
)
def test_a_mistake_is_named(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([override], "compare")
    assert said in str(caught.value)
