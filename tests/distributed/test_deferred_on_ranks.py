from __future__ import annotations

from pathlib import Path

import pytest
from launching import assert_passed, cases, forked


@cases("checks_deferred")
def test_deferred(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)


RUN = [
    "data=synthetic",
    "data.input_shape=[6]",
    "data.num_samples=32",
    "model=mlp",
    "model.hidden_sizes=[16,8]",
    "batch.global_batch_size=16",
    "strategy=fsdp",
    "precision=bf16_params",
    "wandb.mode=disabled",
    "train.epochs=1",
]


def test_a_run_is_the_same_byte_for_byte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def weights(run_dir: str, *overrides: str) -> bytes:
        done = forked(2, "-m", "distaccum.train", *RUN, f"run_dir={run_dir}", *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        return Path(run_dir, "model.safetensors").read_bytes()

    whole = weights("whole")
    assert weights("deferred", "model.init_on_meta=true") == whole
    words = ("model.init_from=whole", "seed=5", "optim.lr=0")
    assert weights("continued", "model.init_on_meta=true", *words) == whole
    assert weights("other", "model.init_on_meta=true", "seed=5") != whole
