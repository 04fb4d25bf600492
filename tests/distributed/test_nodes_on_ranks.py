"""Two torchruns of two ranks each, as on two nodes: what is to stay on a node is cut by the ranks that a node has."""

from __future__ import annotations

from pathlib import Path

import forking
import pytest
from agents import elastic_options
from command_line import evaluations, updates
from launching import forked

SETTINGS = [
    "data=text",
    "data.max_length=48",
    "data.evaluation._target_=examples.FewTexts",
    "+data.evaluation.num_samples=45",
    "data.num_workers=0",
    "model=gpt",
    "model.width=16",
    "model.num_layers=2",
    "task=language_modeling",
    "batch.global_batch_size=24",
    "batch.micro_batch_size=2",
    "train.clip_norm=0.5",
    "train.epochs=null",
    "train.eval_every=4",
    "schedule=constant",
    "precision=fp64",
    "checkpoint.every_updates=2",
    "wandb.mode=disabled",
]


def test_a_model_is_sharded_over_the_ranks_of_a_node_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["-m", "distaccum.train", *SETTINGS, "run_dir=nodes", "train.max_updates=2"]
    command += ["strategy=fsdp", "strategy.accumulate=node"]
    nodes = [
        forking.start(*forking.torchrun(*options, "--nproc-per-node=2", *command))
        for options in elastic_options(2, nodes="2")
    ]
    ended = [node.ended() for node in nodes]
    said = "\n".join(node.out + node.err for node in ended)
    assert [node.status for node in ended] == [0, 0], said
    assert said.count("parameters are sharded over 2 ranks, in 2 replicas") == 1, "by rank 0 alone"
    assert "; a sync in each micro-step, between replicas 1 per update" in said

    for run_dir in ("undisturbed", "nodes"):
        alone = ["-m", "distaccum.train", *SETTINGS, f"run_dir={run_dir}", "train.max_updates=4", "strategy=single"]
        done = forked(1, *alone, launched=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from nodes/checkpoints/update-00000002" in done.stdout
    found, wanted = updates(Path("nodes")), updates(Path("undisturbed"))
    assert [line["update"] for line in found] == [1, 2, 3, 4]
    assert [line["micro_steps"] for line in found] == [3, 3, 12, 12]
    for key in ("loss", "grad_norm", "weight", "samples"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in wanted], rel=1e-10), key
    loss, expected = (evaluations(Path(name))[-1]["eval"]["loss"] for name in ("nodes", "undisturbed"))
    assert loss == pytest.approx(expected, rel=1e-10)
    # Two blocks and the rest of the model are reduce-scattered in each micro-step, and all of it all-reduced once.
    assert [line["sync_calls"] for line in found[:2]] == [3 * 3 + 1] * 2
    # Negative control: an update shows in what is compared.
    assert len({round(line["loss"], 6) for line in found}) == len(found)
