from __future__ import annotations

from pathlib import Path

import hydra
import pytest
import yaml

from distaccum.config import BatchConfig, ByLengthBatchConfig, DDPConfig, conf_dir
from distaccum.config.compose import compose
from distaccum.config.enums import Compression
from distaccum.config.tools import TuneConfig
from distaccum.errors import UserError
from distaccum.tools.tune.settings import (
    applied,
    base_of,
    command_of,
    experiment_of,
    merged,
    micro_batch_of,
    overrides_of,
    with_micro_batch,
)


def config_of(*overrides: str) -> TuneConfig:
    config = compose(overrides, "tune")
    assert isinstance(config, TuneConfig)
    return config


def test_a_setting_is_applied_and_the_configuration_stays() -> None:
    config = config_of("experiment=text", "batch.drop_last=true")
    setting = {"batch.micro_batch_size": 32, "batch": "by_length", "data.num_workers": 2, "model.num_layers": 1}
    changed = applied(config, setting)
    assert changed.batch == ByLengthBatchConfig(global_batch_size=64, micro_batch_size=32, drop_last=True)
    assert (changed.data.num_workers, changed.model.num_layers) == (2, 1)
    assert config.batch == BatchConfig(global_batch_size=64, micro_batch_size=8, drop_last=True)
    assert config.data.num_workers == 0
    assert applied(changed, {"batch": "uniform"}).batch == BatchConfig(
        global_batch_size=64, micro_batch_size=32, drop_last=True
    )


def test_a_setting_reaches_somebodys_own_model() -> None:
    config = config_of("model=custom", "model._target_=mine.Net", "+model.activation_checkpointing=false")
    changed = applied(config, {"model.activation_checkpointing": True})
    assert changed.model["activation_checkpointing"] is True
    assert config.model["activation_checkpointing"] is False


def test_single_becomes_ddp_for_several_ranks() -> None:
    config = config_of()
    assert base_of(config, 1).strategy == config.strategy
    assert base_of(config, 2).strategy == DDPConfig()
    assert base_of(config_of("strategy=ddp", "strategy.bucket_cap_mb=3"), 2).strategy == DDPConfig(bucket_cap_mb=3)


def test_a_micro_batch_takes_the_place_of_what_contradicts_it() -> None:
    assert micro_batch_of(config_of("batch.accumulation_steps=3"), 2) == 43
    assert with_micro_batch(config_of(), 32) == {"batch.micro_batch_size": 32}
    assert with_micro_batch(config_of("batch.accumulation_steps=3"), 32) == {
        "batch.micro_batch_size": 32,
        "batch.accumulation_steps": None,
    }
    by_length = config_of("experiment=text", "batch=by_length", "batch.max_tokens=99")
    assert with_micro_batch(by_length, 4)["batch.max_tokens"] is None


def test_what_is_to_be_pasted() -> None:
    setting = {"batch.micro_batch_size": 32, "batch": "by_length", "strategy.compression": Compression.bf16}
    setting |= {"batch.accumulation_steps": None, "model.activation_checkpointing": True, "strategy.bucket_cap_mb": 5.0}
    overrides = overrides_of(setting)
    assert overrides == [
        "batch.micro_batch_size=32",
        "batch=by_length",
        "strategy.compression=bf16",
        "batch.accumulation_steps=null",
        "model.activation_checkpointing=true",
        "strategy.bucket_cap_mb=5",
    ]
    given = ["experiment=text", "strategy=ddp", "batch.micro_batch_size=4", "tune.minutes=1", "run_dir=x", "seed=3"]
    words = command_of(setting, given, 2)
    assert words == [
        *["torchrun", "--nproc_per_node=2", "-m", "distaccum.train"],
        *["experiment=text", "strategy=ddp", "seed=3", *overrides],
    ]
    # The words mean what the setting does to the configuration.
    pasted = compose(words[4:])
    wanted = applied(base_of(config_of("experiment=text", "strategy=ddp", "seed=3"), 2), setting)
    for section in ("batch", "strategy", "model", "data", "seed"):
        assert getattr(pasted, section) == getattr(wanted, section)


def test_what_only_a_cut_by_length_knows_goes_with_it() -> None:
    """A larger micro-batch has put max_tokens aside, and then the uniform cut wins."""
    given = ["experiment=text", "batch=by_length", "batch.max_tokens=4096", "batch.measure_costs=false"]
    base = config_of(*given)
    setting = merged(with_micro_batch(base, 16), {"batch": "uniform"})
    assert type(applied(base, setting).batch) is BatchConfig
    words = command_of(setting, given, 1)
    assert type(compose(words[3:]).batch) is BatchConfig
    assert merged(with_micro_batch(base, 16), {"data.num_workers": 1})["batch.max_tokens"] is None, "it stays by length"


def test_a_command_for_several_ranks_trains_as_it_was_measured() -> None:
    given = ["strategy=single", "seed=3"]
    assert isinstance(base_of(config_of(*given), 2).strategy, DDPConfig)
    assert command_of({}, given, 2)[-1] == "seed=3"
    assert "strategy=single" not in command_of({}, given, 2)
    assert "strategy=single" in command_of({}, given, 1)


def test_numbers_are_not_taken_for_yes_and_no() -> None:
    setting = {
        "data.num_workers": 1,
        "batch.micro_batch_size": 1,
        "model.on": True,
        "model.off": False,
        "batch.x": None,
    }
    assert overrides_of(setting) == [
        "data.num_workers=1",
        "batch.micro_batch_size=1",
        "model.on=true",
        "model.off=false",
        "batch.x=null",
    ]


def test_an_experiment_file_means_the_same(tmp_path: Path) -> None:
    setting = {"batch.micro_batch_size": 32, "batch": "by_length", "data.num_workers": 2}
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "tuned.yaml"
    file.write_text(experiment_of(setting, "text", "made by a test"))
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        found = hydra.compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=tuned"])
    wanted = applied(config_of("experiment=text"), setting)
    assert found.batch.micro_batch_size == 32
    assert set(found.batch) == set(ByLengthBatchConfig.__slots__) | set(BatchConfig.__slots__)
    assert found.data.num_workers == 2
    assert found.model._target_ == wanted.model._target_ == "distaccum.models.GPT"
    assert yaml.safe_load(experiment_of({}, None, "nothing")) is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tune.minutes=0", "tune.minutes=0"),
        ("batch.micro_batch_size=auto", "tune needs a given size of micro-batches"),
        ("tune.compressions=[none]", "tune.compressions holds none"),
        ("tune.link_mbits=[0]", "tune.link_mbits=[0.0] is impossible"),
        ("tune.write=tuned", "tune.write=tuned must be the path of a .yaml file"),
        ("batch.global_batch_size=null", "batch.global_batch_size is null"),
        ("tune.roundz=3", "Did you mean tune.rounds?"),
    ],
)
def test_a_mistake_is_named(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([override], "tune")
    assert said in str(caught.value)
