"""Draws the terminal output of the README's run into an SVG: a real run, its middle left out."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import common
from rich.console import Console
from rich.text import Text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", default=common.RESULTS / "run.svg")
    path = parser.parse_args().path
    with tempfile.TemporaryDirectory() as folder:
        run_dir = f"{folder}/run"
        output = common.torchrun(4, "-m", "distaccum.train", "wandb.mode=disabled", f"run_dir={run_dir}")
        lines = output.replace(run_dir, "runs/digits").splitlines()
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
