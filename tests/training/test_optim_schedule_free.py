"""`optim=schedule_free`, which trains with other weights than those that it evaluates and exports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Ended, evaluations, metrics, without_measurements
from safetensors.torch import load_file
from torch import Tensor, nn

from distaccum import Accumulator, UserError
from distaccum.checkpoints import load_model, newest_whole
from distaccum.checkpoints.folder import checkpoints_in
from distaccum.config.compose import compose
from distaccum.config.optimizers import ScheduleFreeConfig
from distaccum.models import MLP
from distaccum.strategies import SingleStrategy
from distaccum.tools.memory.run import examine
from distaccum.training.evaluated_weights import check_statistics, evaluated_weights
from distaccum.training.optim import build_optimizer

pytest.importorskip("schedulefree", reason='needs the extra "schedulefree"')
DIGITS = ["wandb.mode=disabled", "model=mlp", "model.hidden_sizes=[16]", "optim=schedule_free"]
DIGITS += ["schedule=constant", "train.epochs=null"]


def _weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def test_evaluated_weights_leave_no_trace() -> None:
    torch.manual_seed(0)
    module = nn.Linear(30, 20)
    optimizer = build_optimizer(ScheduleFreeConfig(lr=0.1), module.parameters(), torch.device("cpu"))
    accumulator = Accumulator(module, optimizer)
    strategy = SingleStrategy(module)
    for seed in range(3):
        with accumulator.window([torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))]) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(module(batch).square().sum(), 4)
        accumulator.step()
    before = _weights(module)
    with evaluated_weights(strategy, optimizer):
        assert not torch.equal(_weights(module), before)
    assert torch.equal(_weights(module), before)
    optimizer.eval()  # type: ignore[attr-defined]
    optimizer.train()  # type: ignore[attr-defined]
    assert not torch.equal(_weights(module), before), "the package alone would round, so the copy is for something"


def test_a_run_evaluates_and_exports_the_average(train: Callable[..., Ended]) -> None:
    more = [
        *DIGITS,
        "train.max_updates=12",
        "checkpoint.every_updates=6",
        "checkpoint.keep_last=9",
        "train.ema.decay=0.5",
    ]
    assert train(*more, "run_dir=often", "train.eval_every=2").status == 0
    assert train(*more, "run_dir=rarely", "train.eval_every=12").status == 0
    for name in ("model", "model-ema"):  # no evaluation has moved a weight
        assert Path(f"often/{name}.safetensors").read_bytes() == Path(f"rarely/{name}.safetensors").read_bytes()
    first, last = (evaluations(Path("often"))[number]["eval"]["loss"] for number in (0, -1))
    assert last < first
    # The checkpoint holds the weights that it trains with: what is evaluated later is made of them.
    checkpoint = newest_whole(Path("often/checkpoints"), rank=0, gather=lambda value: [value])
    assert checkpoint is not None
    module = MLP(input_shape=(1, 8, 8), num_classes=10, hidden_sizes=[16])
    load_model(checkpoint, module)
    exported = load_file("often/model.safetensors")
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, exported[name])
    # A run that goes on does so bit for bit.
    shutil.copytree("often", "cut")
    for folder in checkpoints_in(Path("cut/checkpoints")):
        if folder.name > "update-00000006":
            shutil.rmtree(folder)
    assert train(*more, "run_dir=cut", "train.eval_every=2").status == 0
    found, wanted = ([without_measurements(line) for line in metrics(Path(run))] for run in ("cut", "often"))
    assert found == wanted
    assert Path("cut/model.safetensors").read_bytes() == Path("often/model.safetensors").read_bytes()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="schedule=cosine would make that average one of its early weights"):
        compose(["optim=schedule_free", "schedule=cosine"])
    assert compose([*DIGITS, "train.max_updates=9", "schedule.warmup_updates=3"]).schedule.warmup_updates == 3
    constant = "schedule=constant"
    sqrt = ["batch.lr_rule=sqrt", "batch.schedule=table", "batch.table=[[2,64]]"]
    for more in ([constant, "schedule.warmup_updates=3"], ["schedule=step"], [constant, *sqrt]):
        with pytest.raises(UserError, match=r"optim=rprop takes optim\.lr for its first step alone"):
            compose(["optim=rprop", *more])
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(ScheduleFreeConfig(), module.parameters(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"the running statistics of 1 \(BatchNorm1d\) would be those of the latter"):
        check_statistics(module, optimizer)
    check_statistics(module, torch.optim.SGD(module.parameters()))


@pytest.mark.parametrize(
    ("option", "missing"), [("schedule_free", "strategy.shard_optimizer=true"), ("adafactor", "strategy=fsdp")]
)
def test_memory_leaves_out_placements_that_do_not_support_it(option: str, missing: str) -> None:
    overrides = [f"optim={option}", "schedule=constant", "model=mlp", "model.hidden_sizes=[8]"]
    report = examine(compose([*overrides, "batch.micro_batch_size=64"], "memory"))  # type: ignore[arg-type]
    assert not any(missing in row.overrides for row in report.rows)
    assert any("strategy=ddp" in row.overrides for row in report.rows)
