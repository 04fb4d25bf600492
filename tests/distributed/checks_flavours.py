"""Checks of FSDP's ways to accumulate, with and without replicas of shards, on real ranks. Float64, to 1e-12."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documents import block_run_by
from examples import (
    RaggedTokens,
    TokenClassifier,
    adamw,
    curves,
    distance,
    flat,
    placed,
    replaced,
    token_loss,
    train_tokens,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distaccum import Accumulator, NoiseScale, UserError, WindowLoader
from distaccum.config import FSDPConfig
from distaccum.config.enums import Accumulate, Offload, PrecisionName
from distaccum.runtime.compilation import Compilation
from distaccum.runtime.world import World
from distaccum.strategies import SingleStrategy, local_parts, place
from distaccum.strategies.fsdp import FSDPStrategy
from distaccum.strategies.replicas import all_reduce_parts
from distaccum.training.memory_line import MemoryLine, logger
from distaccum.training.model import checkpoint_blocks

CPU = torch.device("cpu")
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def flavours(world: World) -> dict[str, FSDPConfig]:
    """Every way to accumulate; `node` and replicas with nodes of half the ranks."""
    half = max(world.world_size // 2, 1)
    found = {
        "sharded": FSDPConfig(accumulate=Accumulate.sharded),
        "sharded, parameters kept": FSDPConfig(accumulate=Accumulate.sharded, reshard_in_window=False),
        "node": FSDPConfig(accumulate=Accumulate.node, shard_size=half),
        "node, parameters kept": FSDPConfig(accumulate=Accumulate.node, shard_size=half, reshard_in_window=False),
        "node of one rank": FSDPConfig(accumulate=Accumulate.node, shard_size=1),
        "whole, in replicas": FSDPConfig(shard_size=half),
    }
    if half == 1:
        del found["node of one rank"]  # which `node` is
    return found


def check_every_flavour_makes_the_same_update(world: World) -> None:
    windows: list[tuple[int, dict[str, Any]]] = [
        (4, {"global_batch_size": 16, "micro_batch_size": 2}),
        (7, {"global_batch_size": 8, "micro_batch_size": 1}),
    ]
    for updates, batch in windows:  # beyond the ragged window that ends the epoch
        whole = {**batch, "micro_batch_size": batch["global_batch_size"]}
        wanted, wanted_parameters = train_tokens(None, updates=updates, **whole)
        for name, config in flavours(world).items():
            here = {"rank": world.rank, "world_size": world.world_size, "updates": updates}
            found, parameters = train_tokens(config, **here, **batch)
            for mine, reference in zip(curves(found), curves(wanted), strict=True):
                assert distance(mine, reference) < 1e-12, (name, batch)
            assert distance(parameters, wanted_parameters) < 1e-12, (name, batch)


def check_without_the_last_all_reduce_it_misses(world: World) -> None:
    """The negative control: replicas that each make an update of their own."""

    class Alone(FSDPStrategy):
        def finish_sync(self) -> None:
            self.traffic.count(torch.zeros(1))  # else the window is refused, as nothing has crossed the network

    _, wanted = train_tokens(None, micro_batch_size=16, updates=1)
    for cls, misses in ((Alone, True), (FSDPStrategy, False)):
        strategy = place(TokenClassifier(), FSDPConfig(accumulate=Accumulate.node, shard_size=1), CPU)
        strategy.__class__ = cls
        missed_by = distance(_trained(strategy.model, world, strategy, updates=1), wanted)
        assert missed_by > 1e-3 if misses else missed_by < 1e-12
    strategy.__class__ = Alone
    with pytest.raises(UserError, match=r"the gradient's norm was .* so their parameters differ"):
        _trained(strategy.model, world, strategy, updates=2)


def _trained(model: nn.Module, world: World, strategy: Any = None, updates: int = 4, **options: Any) -> Tensor:
    """The parameters after the same updates as `train_tokens` makes by default, by a loop of one's own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.01)
    accumulator = Accumulator(model, optimizer, clip_norm=0.05, strategy=strategy, **options)
    where = {"rank": world.rank, "world_size": world.world_size, "equal_micro_steps": True}
    loader = WindowLoader(RaggedTokens(), global_batch_size=16, micro_batch_size=2, seed=1, **where)
    while accumulator.updates < updates:
        for window in loader:
            with accumulator.window(window) as micro_batches:
                for batch in micro_batches:
                    accumulator.backward(*token_loss(model, batch))
            accumulator.step()
            if accumulator.updates == updates:
                break
    return flat(model)


def check_ones_own_meshes(world: World) -> None:
    _, wanted = train_tokens(None, micro_batch_size=16)
    shape = (2, world.world_size // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))

    def sharded(mesh: Any) -> nn.Module:
        model = TokenClassifier()
        for block in (model.hidden, model):
            fully_shard(block, mesh=mesh)
        return model

    assert distance(_trained(sharded(mesh), world), wanted) < 1e-12
    assert distance(_trained(sharded(mesh["shard"]), world), wanted) < 1e-12
    # Neither rows nor columns of consecutive ranks.
    assert distance(_trained(sharded(mesh["replicate"]), world), wanted) < 1e-12
    model = sharded(mesh["shard"])
    strategy = FSDPStrategy(model, CPU, accumulate="node")
    assert distance(_trained(model, world, strategy), wanted) < 1e-12
    assert {"shard", "replicate"} >= strategy.traffic.by_axis.keys()
    with pytest.raises(UserError, match=r"accumulate=sharded does not support a model on a mesh of two dimensions"):
        FSDPStrategy(sharded(mesh), CPU, accumulate="sharded")


class _Chosen(nn.Module):
    """One of several blocks of the same shape in each forward, and a last one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(5))
        self.double()

    def forward(self, inputs: Tensor, which: int) -> Tensor:
        return self.blocks[which](inputs)


def check_replicas_may_use_other_blocks(world: World) -> None:
    """Their gradients must not meet in each other's place; what none uses keeps no gradient and doesn't decay."""
    inputs = [torch.full((2, 3), rank + 1.0, dtype=torch.float64) for rank in range(world.world_size)]
    for accumulate in (Accumulate.node, Accumulate.whole):
        strategy, alone = place(_Chosen(), FSDPConfig(accumulate=accumulate, shard_size=1), CPU), _Chosen()
        made = []
        for model, ranks in ((strategy.model, [world.rank]), (alone, list(range(world.world_size)))):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
            own = strategy if model is strategy.model else SingleStrategy(model)
            accumulator = Accumulator(model, optimizer, strategy=own)
            for update in range(3):
                with accumulator.window([rank for rank in ranks for _ in range(2)]) as micro_batches:
                    for rank in micro_batches:
                        output = model(inputs[rank], (rank + update) % world.world_size)
                        accumulator.backward(output.square().sum(), len(output))
                made.append(accumulator.step().grad_norm)
        assert distance(made[:3], made[3:]) < 1e-12, accumulate
        assert distance(flat(strategy.module), flat(alone)) < 1e-12, accumulate
        assert torch.equal(flat(alone.blocks[4]), flat(_Chosen().blocks[4]))


def check_replicas_begin_alike(world: World) -> None:
    """Ranks whose seeds differ would else train another model on each node, and nobody would notice."""
    torch.manual_seed(world.rank)
    model = nn.Linear(8, 8)
    strategy = place(model, FSDPConfig(accumulate=Accumulate.node, shard_size=1), CPU)
    assert len({str(entry) for entry in world.gather(flat(strategy.module).tolist())}) == 1


def check_traffic(world: World) -> None:
    """Bytes by axis: inside a node they grow with the micro-steps, between nodes they don't."""

    def traffic(config: FSDPConfig, steps: int) -> dict[str, tuple[int, int]]:
        strategy = place(TokenClassifier(), config, CPU)
        where = {"rank": world.rank, "world_size": world.world_size, "equal_micro_steps": True}
        loader = WindowLoader(
            RaggedTokens(), global_batch_size=world.world_size * steps, micro_batch_size=1, drop_last=True, **where
        )
        accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy)
        with accumulator.window(next(iter(loader))) as micro_batches:
            for batch in micro_batches:
                accumulator.backward(*token_loss(strategy.model, batch))
        update = accumulator.step()
        found = strategy.traffic.by_axis
        assert update.micro_steps == steps
        if found:
            assert update.sync_calls == sum(calls for calls, _ in found.values())
            assert update.sync_bytes == sum(size for _, size in found.values())
        return found or {"all": (update.sync_calls, update.sync_bytes)}

    whole = TokenClassifier()
    size = sum(parameter.nbytes for parameter in whole.parameters())
    half = world.world_size // 2
    for steps in (1, 4):
        node = traffic(FSDPConfig(accumulate=Accumulate.node, shard_size=half), steps)
        calls, between = node["replicate"]
        assert calls == 1
        assert sum(world.gather(between)) == 2 * size  # shards of one replica make the whole
        calls, _ = node.get("shard", (3 * steps, 0))  # nothing crosses a network between the shards of one rank
        assert calls == 3 * steps
        sharded = traffic(FSDPConfig(accumulate=Accumulate.sharded), steps)["all"]
        assert sharded[0] == 3 * steps
        assert steps * size <= sharded[1] < 1.5 * steps * size
        replicas = traffic(FSDPConfig(shard_size=half), steps)
        assert replicas["replicate"] == (1, between)
        assert replicas.get("shard", (3, 0))[0] == 3


def check_no_rank_keeps_whole_gradients(world: World) -> None:
    config = FSDPConfig(accumulate=Accumulate.sharded)
    strategy = place(TokenClassifier(), config, CPU)
    accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy)
    batch = RaggedTokens.collate_fn([RaggedTokens()[i] for i in range(4)])
    with accumulator.window([batch] * 3) as micro_batches:
        for tokens in micro_batches:
            accumulator.backward(*token_loss(strategy.model, tokens))
            for module in strategy.model.modules():
                for group in getattr(getattr(module, "_fsdp_param_group", None), "fsdp_params", []):
                    assert group.unsharded_accumulated_grad is None
            gradients = local_parts([p.grad for p in strategy.model.parameters() if p.grad is not None])
            whole = sum(parameter.numel() for parameter in strategy.model.parameters())
            assert sum(world.gather(sum(part.numel() for part in gradients))) == whole


def check_buckets(world: World) -> None:
    sizes = (3_000_000, 0, 5, 4_000_000)
    parts = [torch.full((size,), world.rank + 1.0, dtype=d) for d in (torch.float32, torch.float64) for size in sizes]
    counted: list[int] = []
    all_reduce_parts(parts, dist.group.WORLD, CPU, lambda flat: counted.append(flat.nbytes))
    total = sum(range(1, world.world_size + 1))
    assert all((part == total).all() for part in parts)
    assert sum(counted) == sum(part.nbytes for part in parts)
    assert len(counted) == 4  # of 12, 16, 24 and 32 MB


class Odd(nn.Module):
    """Tied weights, a frozen part, blocks of several formats, and one that is skipped every other time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight
        self.double()
        self.blocks[0].requires_grad_(False)
        self.blocks[1].float()
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = torch.tanh(self.blocks[0](hidden))
        hidden = hidden + torch.tanh(self.blocks[1](hidden.float())).double()
        if self.calls % 2 == 0:
            hidden = hidden + torch.tanh(self.blocks[2](hidden))
        self.calls += 1
        return self.out(torch.tanh(self.blocks[3](hidden)))


def _odd(config: FSDPConfig | None, world: World, prepare: Callable[[nn.Module], None] = lambda _: None) -> Tensor:
    """One rank's batches are every rank's, so that the sum is a multiple of one rank's."""
    model = Odd()
    prepare(model)
    strategy = placed(model, config)
    accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy)
    batches = [RaggedTokens.collate_fn([RaggedTokens()[i + 3 * k] for i in range(3)]) for k in range(4)]
    for _ in range(2):
        with accumulator.window(batches) as micro_batches:
            for tokens in micro_batches:
                accumulator.backward(*token_loss(strategy.model, tokens))
        accumulator.step()
    return flat(strategy.module)


def check_odd_models(world: World) -> None:
    for prepare in (lambda _: None, lambda model: checkpoint_blocks(model)):
        wanted = _odd(None, world, prepare)
        for name, config in flavours(world).items():
            # The block in float32 rounds its gradients.
            assert distance(_odd(config, world, prepare), wanted) < 1e-6, name


def check_compiled_models(world: World) -> None:
    wanted, wanted_parameters = train_tokens(None, micro_batch_size=16, updates=3)
    # Compiling is dear. Four ranks have a node of two ranks, and two of each.
    found, parameters = train_tokens(
        flavours(world)["sharded" if world.world_size == 2 else "node"],
        rank=world.rank,
        world_size=world.world_size,
        micro_batch_size=2,
        updates=3,
        compilation=Compilation("aot_eager", dynamic=True),
    )
    assert distance(curves(found)[0], curves(wanted)[0]) < 1e-12
    assert distance(parameters, wanted_parameters) < 1e-12


def check_noise_scale(world: World) -> None:
    def measured(strategy: Any) -> list[float]:
        noise = NoiseScale(every_updates=1)
        _trained(strategy.model, world, strategy, noise_scale=noise)
        return [float(value) for value in noise.state_dict().values() if isinstance(value, float)]

    wanted = measured(place(TokenClassifier(), FSDPConfig(), CPU))
    assert any(wanted)
    for name, config in flavours(world).items():
        assert distance(measured(place(TokenClassifier(), config, CPU)), wanted) < 1e-10, name


def check_a_gradient_scaler(world: World) -> None:
    """The scale changes nothing; where one rank's gradient overflows, all skip the update, and halve the scale."""
    _, wanted = train_tokens(None, micro_batch_size=16)
    for name, config in {"whole": FSDPConfig(), **flavours(world)}.items():
        strategy = place(TokenClassifier(), config, CPU)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=3)
        assert distance(_trained(strategy.model, world, strategy, scaler=scaler), wanted) < 1e-12, name
        assert scaler.get_scale() > 2.0**100
        before = flat(strategy.module)
        accumulator = Accumulator(strategy.model, adamw(strategy.model), strategy=strategy, scaler=scaler)
        batch = RaggedTokens.collate_fn([RaggedTokens()[i] for i in range(4)])
        scale = scaler.get_scale()
        with accumulator.window([batch, batch]) as micro_batches:
            for number, tokens in enumerate(micro_batches):
                loss_sum, weight = token_loss(strategy.model, tokens)
                overflow = world.rank == world.world_size - 1 and number == 0
                accumulator.backward(loss_sum * (1e290 if overflow else 1.0), weight)
        assert accumulator.step().skipped, name
        assert torch.equal(flat(strategy.module), before), name
        assert scaler.get_scale() == scale / 2, name


def check_fp16(world: World) -> None:
    def losses(config: FSDPConfig, precision: PrecisionName) -> list[float]:
        strategy = place(TokenClassifier(torch.float32), config, CPU, precision)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if precision is PrecisionName.fp16 else None
        optimizer = adamw(strategy.model)
        accumulator = Accumulator(strategy.model, optimizer, strategy=strategy, scaler=scaler)
        batch = RaggedTokens.collate_fn([RaggedTokens()[i] for i in range(4)])
        found = []
        for _ in range(3):
            with accumulator.window([batch, batch]) as micro_batches:
                for inputs, targets in micro_batches:
                    logits = strategy.model(inputs)
                    loss_sum, weight = token_loss(lambda _, logits=logits: logits.float(), (inputs, targets))  # type: ignore[arg-type]
                    accumulator.backward(loss_sum, weight)
            found.append(accumulator.step().loss)
        return found

    wanted = losses(FSDPConfig(), PrecisionName.fp32)
    for name, config in {"whole": FSDPConfig(), **flavours(world)}.items():
        assert distance(losses(config, PrecisionName.fp16), wanted) < 1e-2, name


def check_what_is_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"shard_size=3 does not divide the \d ranks"):
        place(TokenClassifier(), FSDPConfig(shard_size=3), CPU)
    with pytest.raises(UserError, match=r"strategy.offload=cpu .* already with device=cpu"):
        place(TokenClassifier(), FSDPConfig(offload=Offload.cpu), CPU)
    with pytest.raises(UserError, match=r"accumulate=sharded would add up .* bfloat16, whose digits don't suffice"):
        place(TokenClassifier(torch.bfloat16), FSDPConfig(accumulate=Accumulate.sharded), CPU)
    with pytest.raises(UserError, match=r"strategy.accumulate=sharded shards over all ranks"):
        FSDPConfig(accumulate=Accumulate.sharded, shard_size=2)
    ignored = TokenClassifier()
    fully_shard(ignored.hidden)
    fully_shard(ignored, ignored_params={ignored.out.bias})
    with pytest.raises(UserError, match=r"not sharded over all .* ranks alike"):
        FSDPStrategy(ignored, CPU)


def check_parameters_are_shards_of_a_node(world: World) -> None:
    """As LOCAL_WORLD_SIZE says, which here is the number of ranks."""
    strategy = place(TokenClassifier(), FSDPConfig(accumulate=Accumulate.node), CPU)
    parameter = next(strategy.module.parameters())
    assert isinstance(parameter, DTensor)
    assert parameter.device_mesh.size() == world.ranks_on_host


def check_the_line_about_memory_knows_which_gradients_a_rank_keeps(world: World) -> None:
    def said(config: FSDPConfig) -> float:
        strategy = place(nn.Linear(500, 600, bias=False), config, CPU)
        line = MemoryLine(strategy, adamw(strategy.model), is_compiled=True)
        with replaced(logger, "info", lambda text, *args: found.append(text % args)):
            line.log_once()
        return float(found[-1].partition("gradients ")[2].partition(" MB")[0])

    found: list[str] = []
    assert said(FSDPConfig()) == 1.2
    assert said(FSDPConfig(accumulate=Accumulate.sharded)) == 1.2 / world.world_size


def check_the_block_in_the_documentation(world: World) -> None:
    if world.world_size == 4:
        found: dict[str, Any] = {}
        exec(block_run_by("distributed/checks_flavours.py"), found)
        calls = {axis: count for axis, (count, _) in found["strategy"].traffic.by_axis.items()}
        assert calls == {"shard": 8, "replicate": 1}  # two layers in four micro-steps
