"""Trains `experiment=segmentation` and draws the photograph, its mask and the prediction, side by side.

python benchmarks/picture_of_segmentation.py
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import common
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from safetensors.torch import load_model
from torch import Tensor

from distaccum.data.images.coins import FIRST_TRAINING_COLUMN, IGNORED, coins_and_mask
from distaccum.models import UNet

SIZE = 64
CHANNELS = [8, 16, 32]


def predicted(model: UNet, pixels: Tensor) -> Tensor:
    """Returns the class of each pixel, of patches as in training, side by side."""
    height, width = pixels.shape
    rows, columns = -(-height // SIZE), -(-width // SIZE)
    padded = torch.zeros(rows * SIZE, columns * SIZE)
    padded[:height, :width] = pixels
    patches = padded.view(rows, SIZE, columns, SIZE).transpose(1, 2).reshape(-1, 1, SIZE, SIZE)
    with torch.no_grad():
        classes = model(patches).argmax(dim=1)
    return classes.view(rows, columns, SIZE, SIZE).transpose(1, 2).reshape(rows * SIZE, -1)[:height, :width]


def main() -> None:
    parser = common.arguments(__doc__, quick="15 seconds", full="2 minutes")
    parser.add_argument("path", type=Path, nargs="?", default=common.RESULTS / "segmentation.png")
    options = common.begin(parser)
    path = options.path
    shortened = ["train.max_updates=2", "schedule.warmup_updates=0"] if options.quick else []
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = ["distaccum.train", "experiment=segmentation", "wandb.mode=disabled", f"run_dir={run_dir}"]
        subprocess.run(common.torchrun(2, "-m", *command, *shortened), check=True, env=common.ENVIRONMENT)
        model = UNet(input_shape=[1, SIZE, SIZE], num_classes=2, channels=CHANNELS)
        load_model(model, run_dir / "model.safetensors")
        *_, last = (
            line for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "eval" in line
        )
    pixels, mask = coins_and_mask()
    classes = ListedColormap(["#20324d", "#e8b04a", "#9aa3ad"])
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained")
    panels = (
        ("photograph", pixels, "gray"),
        ("mask", mask, classes),
        ("prediction", predicted(model, pixels), classes),
    )
    for axis, (title, values, colours) in zip(axes, panels, strict=True):
        shown = torch.where(values == IGNORED, 2, values) if title == "mask" else values
        limits = {} if title == "photograph" else {"vmin": 0, "vmax": 2}
        axis.imshow(shown, cmap=colours, interpolation="nearest", **limits)
        axis.axvline(FIRST_TRAINING_COLUMN - 0.5, color="white", linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.suptitle(
        f"left of the line held out: mean IoU {last['eval']['mean_iou']:.3f}", fontsize=10, x=0.99, ha="right"
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"{path}: held-out mean IoU {last['eval']['mean_iou']:.4f}, accuracy {last['eval']['accuracy']:.4f}")


if __name__ == "__main__":
    main()
