"""Is what `distaccum.tune` suggests faster, and does what it predicts come true over a slow link?

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
from pathlib import Path
from typing import Any

import common
import torch
from emulated_hosts import start_ranks, two_hosts, why_impossible

from distaccum.config.compose import compose
from distaccum.runtime.world import joined_world
from distaccum.tools.bench.measurements import Measuring
from distaccum.tools.bench.network import SIZES
from distaccum.tools.tune.forecast import predicted_seconds
from distaccum.tools.tune.network_model import fit_compute, fit_link
from distaccum.tools.tune.report import Forecast

TRAINING = ["experiment=text", "strategy=ddp", "wandb.mode=disabled"]
RATES = ("100mbit", "1gbit")
STEPS = (1, 2, 4, 8)


def tuned(folder: Path, is_quick: bool) -> dict[str, Any]:
    extent = ["tune.minutes=0.2", "tune.rounds=2", "tune.confirm_rounds=2"] if is_quick else ["tune.minutes=2"]
    own = ["tune.world_size=2", f"run_dir={folder / 'tune'}", *extent]
    done = subprocess.run(
        [sys.executable, "-m", "distaccum.tune", *TRAINING, *own], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    print(done.stdout)
    report: dict[str, Any] = json.loads((folder / "tune" / "tune.json").read_text())
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
        if world.is_main:
            print(json.dumps(answer))


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        on_a_rank(int(sys.argv[2]), sys.argv[3:])
        return
    options = common.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = tuned(Path(name), options.quick)
    confirmation, forecast = report["confirmation"], Forecast(**report["forecast"])
    gain = 1.0 if confirmation is None or not confirmation["is_faster"] else 1 / confirmation["ratio"]
    rows: list[dict[str, Any]] = [
        {
            "what": "suggested against configured, on this machine",
            "setting": " ".join(report["suggestion"]) or "as configured",
            "s/update": forecast.measured_seconds,
            "times as fast": gain,
            "predicted (s)": None,
            "predicted / measured": None,
        }
    ]
    reason = why_impossible()
    for rate in () if reason else RATES:
        with two_hosts(rate) as hosts:
            words = [*TRAINING, *report["suggestion"]]
            said = start_ranks(hosts, sys.executable, __file__, "rank", "2" if options.quick else "9", *words)
        found = json.loads(said.splitlines()[-1])
        link = fit_link({int(size): seconds for size, seconds in found["link"].items()}, 2)
        medians = [statistics.median(column) for column in zip(*(t["compute"] for t in found["turns"]), strict=True)]
        compute = fit_compute(dict(zip(STEPS, medians, strict=True)))
        there = dataclasses.replace(
            forecast, **dataclasses.asdict(compute), micro_batch=statistics.median(t["samples"] for t in found["turns"])
        )
        predicted = predicted_seconds(there, 2, report["config"]["batch"]["global_batch_size"], link)
        seconds = statistics.median(turn["seconds"] for turn in found["turns"])
        rows.append(
            {
                "what": f"2 hosts, {rate}",
                "setting": rows[0]["setting"],
                "s/update": seconds,
                "times as fast": None,
                "predicted (s)": predicted,
                "predicted / measured": predicted / seconds,
            }
        )
    if reason:
        print(f"hosts can't be emulated here: {reason}")
    common.show("What tune suggests and predicts", rows)
    if options.write:
        common.write("tuning", (__doc__ or "").splitlines()[0], rows)


if __name__ == "__main__":
    main()
