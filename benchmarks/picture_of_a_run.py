"""Draws the terminal output of the README's run into an SVG: a real run, its middle left out.

python benchmarks/picture_of_a_run.py
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import common
from rich.console import Console
from rich.text import Text


def main() -> None:
    parser = common.arguments(__doc__, quick="10 seconds", full="30 seconds")
    parser.add_argument("path", type=Path, nargs="?", default=common.RESULTS / "run.svg")
    options = common.begin(parser)
    path = options.path
    ranks, shortened = (2, ["train.epochs=1"]) if options.quick else (4, [])
    with tempfile.TemporaryDirectory() as folder:
        run_dir = f"{folder}/run"
        command = ["-m", "distaccum.train", "wandb.mode=disabled", f"run_dir={run_dir}", *shortened]
        done = subprocess.run(
            common.torchrun(ranks, *command), stdout=subprocess.PIPE, text=True, check=True, env=common.ENVIRONMENT
        )
        lines = done.stdout.replace(run_dir, "runs/digits").splitlines()
    shown = [*lines[:8], "…", *lines[-12:]]
    console = Console(record=True, width=118, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text("$ torchrun --nproc_per_node=4 -m distaccum.train", style="bold"))
    for line in shown:
        name, gap, rest = line.partition("  ")
        is_row = (bool(gap) and name.isalpha()) or name in ("training time", "peak memory")
        console.print(Text.assemble((name, "cyan"), gap, rest) if is_row else Text(line))
    path.parent.mkdir(exist_ok=True)
    console.save_svg(str(path), title="distaccum")


if __name__ == "__main__":
    main()
