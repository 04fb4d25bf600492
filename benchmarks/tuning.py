"""Is what `distaccum.tune` suggests faster, and does what it predicts come true over a slow link?

    python benchmarks/tuning.py

Tunes a small GPT on unequal paragraphs for two ranks on this machine. Then the suggestion trains on two hosts, emulated
as network namespaces with a link of 100 Mbit/s and of 1 Gbit/s between them. The prediction is that of the tuning, for
what its measurements show there: the computing, each host for itself, and bare all-reduces; nothing of the training
over it. Computing and training take turns, as the speed of a shared machine changes within seconds; medians.

The second part needs Linux, root, and `ip` and `tc` (apt-get install iproute2).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from emulated_hosts import on_hosts, two_hosts, why_impossible

from distaccum.config.compose import compose
from distaccum.runtime.world import joined_world
from distaccum.tools.bench.measurements import Measuring
from distaccum.tools.bench.network import SIZES
from distaccum.tools.tune.forecast import predicted_seconds
from distaccum.tools.tune.network_model import fit_compute, fit_link
from distaccum.tools.tune.report import Forecast

TRAINING = ["experiment=text", "strategy=ddp", "wandb.mode=disabled"]
SMALL = ["batch.global_batch_size=16", "batch.micro_batch_size=4", "data.max_length=64", "model.num_layers=1"]
"""What --quick adds to that."""
RATES = ("100mbit", "1gbit")
STEPS = (1, 2, 4, 8)


def tuned(training: list[str], is_quick: bool) -> dict[str, Any]:
    """Runs `distaccum.tune`, which shows its own progress; returns what its tune.json holds."""
    minutes = ["tune.minutes=0.02", "tune.rounds=1", "tune.confirm_rounds=1", "tune.round_seconds=0.1"]
    own = ["tune.world_size=2", *(minutes if is_quick else ["tune.minutes=2"])]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "distaccum.tune", *training, *own, f"run_dir={folder}/tune"]
        if status := subprocess.run(command, check=False).returncode:
            raise SystemExit(status)
        report: dict[str, Any] = json.loads(Path(folder, "tune", "tune.json").read_text())
    return report


def on_a_rank(turns: int, overrides: list[str]) -> None:
    """The link, the computing without it and the training over it, on one of two hosts."""
    torch.set_num_threads(1)
    with joined_world() as world:
        device = torch.device("cpu")
        world.init_process_group(device)
        measuring = Measuring(
            config=compose(overrides),
            device=device,
            rank=world.rank,
            world_size=world.world_size,
            sync_every_step=False,
            reference=Path(os.devnull),
        )
        answer: dict[str, Any] = {"link": measuring.link(sizes=list(SIZES), rounds=7)["seconds"], "turns": []}
        for _ in range(turns):
            computing = world.gather(measuring.compute(steps=list(STEPS), rounds=1))
            training = world.gather(measuring.round(updates=4, warmup_updates=3)["seconds"])
            answer["turns"].append(
                {
                    # An update takes as long as on its slowest rank.
                    "compute": [max(own["seconds"][str(count)] for own in computing) for count in STEPS],
                    "samples": statistics.fmean(own["samples"] for own in computing),
                    "seconds": statistics.median(map(max, zip(*training, strict=True))),
                }
            )
        common.send(answer)


def measured(is_quick: bool) -> Iterator[common.Row]:
    training = [*TRAINING, *(SMALL if is_quick else [])]
    report = tuned(training, is_quick)
    confirmation, forecast = report["confirmation"], Forecast(**report["forecast"])
    setting = " ".join(report["suggestion"]) or "as configured"
    yield {
        "what": "suggested against configured, on this machine",
        "setting": setting,
        "s/update": forecast.measured_seconds,
        "times as fast": 1 / confirmation["ratio"] if confirmation and confirmation["is_faster"] else 1.0,
        "predicted (s)": None,
        "predicted / measured": None,
    }
    if reason := why_impossible():
        common.progress(f"hosts can't be emulated here: {reason}")
        return
    for rate in RATES[-1:] if is_quick else RATES:
        common.progress(f"training over {rate}")
        words = ["1" if is_quick else "9", *training, *report["suggestion"]]
        with two_hosts(rate) as hosts:
            (found,) = on_hosts(hosts, __file__, *words)
        link = fit_link({int(size): seconds for size, seconds in found["link"].items()}, 2)
        medians = [statistics.median(column) for column in zip(*(t["compute"] for t in found["turns"]), strict=True)]
        compute = fit_compute(dict(zip(STEPS, medians, strict=True)))
        there = dataclasses.replace(
            forecast, **dataclasses.asdict(compute), micro_batch=statistics.median(t["samples"] for t in found["turns"])
        )
        predicted = predicted_seconds(there, 2, report["config"]["batch"]["global_batch_size"], link)
        seconds = statistics.median(turn["seconds"] for turn in found["turns"])
        yield {
            "what": f"2 hosts, {rate}",
            "setting": setting,
            "s/update": seconds,
            "times as fast": None,
            "predicted (s)": predicted,
            "predicted / measured": predicted / seconds,
        }


def main() -> None:
    if words := common.rank_words():
        on_a_rank(int(words[0]), words[1:])
        return
    options = common.begin(common.arguments(__doc__, quick="50 seconds", full="6 minutes"))
    rows = common.show("What tune suggests and predicts", measured(options.quick))
    if options.write:
        common.write(__doc__, rows)


if __name__ == "__main__":
    main()
