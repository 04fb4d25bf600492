from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from command_line import Ended, evaluations, updates
from examples import distance
from launching import assert_passed, cases, forked
from PIL import Image
from safetensors.torch import load_file

VISION = [
    "experiment=vision",
    "data.root=photos",
    "data.image_size=16",
    "data.num_workers=0",
    "data.randaugment=5",
    "data.mixup=0.2",
    "data.cutmix=1",
    "data.on_damaged=skip",
    "model.name=test_vit",
    "+model.arguments={depth:1,embed_dim:32,patch_size:8}",
    "task.class_weights=[1,2,0.5]",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=2",
    "train.epochs=2",
    "train.ema.decay=0.5",
    "precision=fp64",
    "wandb.mode=disabled",
]
"""All that the experiment has, on 21 photographs of 3 classes; the last window of an epoch has 5 of them."""


@cases("checks_images", world_sizes=(2, 4))
def test_images(module: str, world_size: int, check: str) -> None:
    assert_passed(module, world_size, check)


def _write_photos(root: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(24):
        (root / f"class {number % 3}").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"class {number % 3}" / f"photo ä{number}.jpg")
    (root / "class 1" / "zzz.jpg").write_bytes(b"no photograph")


def test_a_model_of_timm_is_the_same_on_two_ranks(train: Callable[..., Ended], tmp_path: Path) -> None:
    _write_photos(tmp_path / "photos")
    alone = train(*VISION, "run_dir=alone")
    assert (alone.status, alone.err) == (0, "")
    assert re.search("1 of 25 images of photos can't be read and are left out: photos/class 1/zzz.jpg: ", alone.out)
    done = forked(2, "-m", "distaccum.train", *VISION, "run_dir=two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("can't be read and are left out") == 1
    lines = [[line["loss"] for line in updates(Path(name))] for name in ("alone", "two")]
    assert len(lines[0]) == 6
    assert distance(*lines) < 1e-12
    assert {"loss", "accuracy", "ema/loss", "ema/accuracy"} <= evaluations(Path("two"))[-1]["eval"].keys()
    for file in ("model.safetensors", "model-ema.safetensors"):
        one, other = (load_file(Path(name, file)) for name in ("alone", "two"))
        assert all(tensor.dtype == torch.float64 for tensor in one.values())
        joined = [torch.cat([found[name].flatten() for name in sorted(one)]) for found in (one, other)]
        assert distance(*joined) < 1e-12, file
