"""Configuration of the floating-point format and of the placement on devices."""

from __future__ import annotations

from dataclasses import dataclass, field

from distaccum.config.basics import MISSING, require_name
from distaccum.config.enums import Accumulate, Compression, Offload, PrecisionName
from distaccum.errors import require, require_at_least, require_positive


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """The floating-point format in which the model computes. Parameters are float32, unless stated otherwise."""

    name: PrecisionName = PrecisionName.fp32
    """Set by the choice of the group. `fp32`; `bf16` or `fp16`: autocast; `bf16_params`: parameters in bfloat16 and
    gradients accumulated in float32; `fp64`: everything in double precision, for proofs."""

    def __post_init__(self) -> None:
        require_name("precision", self.name.name, *(entry.name for entry in PrecisionName if entry.name != "fp16"))


@dataclass(kw_only=True, slots=True)
class Fp16Config(PrecisionConfig):
    """Autocast to float16 with a gradient scaler, which steps, skips and adapts per update."""

    name: PrecisionName = PrecisionName.fp16
    init_scale: float = 65536.0
    """Loss scale at the start."""
    growth_interval: int = 2000
    """Updates without an overflow after which the loss scale doubles."""

    def __post_init__(self) -> None:
        require_name("precision", self.name.name, "fp16")
        require_positive(precision__init_scale=self.init_scale, precision__growth_interval=self.growth_interval)


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """The placement of the model on devices."""

    name: str = MISSING
    """`single`, `dp`, `ddp` or `fsdp`. The default is `ddp` under torchrun with several processes, else `single`."""


@dataclass(kw_only=True, slots=True)
class SingleConfig(StrategyConfig):
    """One process, one device."""

    name: str = "single"

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "single")


@dataclass(kw_only=True, slots=True)
class DDPConfig(StrategyConfig):
    """One process per device, each with a whole model: `torch.nn.parallel.DistributedDataParallel`."""

    name: str = "ddp"
    bucket_cap_mb: float = 25.0
    """Size in MiB of the buckets in which gradients are all-reduced."""
    gradient_as_bucket_view: bool = True
    """Gradients are views of the buckets, which saves memory and copies."""
    find_unused_parameters: bool = False
    """Search the graph for parameters that the loss doesn't depend on. Needed only if there are any."""
    static_graph: bool = False
    """Assure DDP that the graph never changes. All ranks then take equal numbers of micro-steps, and DDP synchronises
    the first micro-step of the run too, which changes no result."""
    broadcast_buffers: bool = True
    """Copy rank 0's buffers (BatchNorm statistics) to all ranks at the start of each window and before evaluations."""
    sync_batchnorm: bool = False
    """Replace BatchNorm by SyncBatchNorm, whose statistics are those of all ranks' micro-batches of a micro-step. CUDA
    only."""
    shard_optimizer: bool = False
    """Each rank keeps the optimizer's state of a part of the parameters, updates those, and sends them to the others
    (ZeRO stage 1)."""
    compression: Compression = Compression.none
    """Send gradients as `fp16`, `bf16` or low-rank factors (`powersgd`). The update is then no longer exact."""
    powersgd_rank: int = 1
    """Rank of PowerSGD's factors."""
    powersgd_start_update: int = 10
    """Updates at the start that PowerSGD leaves uncompressed; at least 2."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "ddp")
        require_positive(strategy__bucket_cap_mb=self.bucket_cap_mb)
        require_at_least(1, strategy__powersgd_rank=self.powersgd_rank)
        require_at_least(2, strategy__powersgd_start_update=self.powersgd_start_update)


@dataclass(kw_only=True, slots=True)
class DPConfig(StrategyConfig):
    """One process, several replicas: `torch.nn.DataParallel` on two or more GPUs, threads on a CPU.

    Each micro-batch is scattered over the replicas, and the loss is computed from their gathered outputs.
    """

    name: str = "dp"
    replicas: int | None = None
    """Number of replicas. `null`: one per GPU, or two on a CPU."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "dp")
        require_at_least(1, strategy__replicas=self.replicas)


@dataclass(kw_only=True, slots=True)
class FSDPConfig(StrategyConfig):
    """One process per device, each with a shard of the model: FSDP2, `torch.distributed.fsdp.fully_shard`."""

    name: str = "fsdp"
    wrap: list[str] = field(default_factory=list)
    """Class names of the modules that are each gathered and sharded as a unit. Empty: the members of each `ModuleList`,
    or the model's children if it has none."""
    reshard_in_window: bool = True
    """Free gathered parameters after each forward and backward, which needs least memory. `false`: gather once per
    update, and keep them for all micro-steps of the window."""
    accumulate: Accumulate = Accumulate.whole
    """Where the gradients of a window are added up. `whole`: on each rank as a whole, and reduce-scattered once per
    window: least traffic. `sharded`: reduce-scattered in each micro-step, so that a rank keeps its shard alone: least
    memory. `node`: the same among the ranks of a node, and all-reduced between nodes once per window."""
    shard_size: int | None = None
    """Number of ranks with consecutive numbers that share the parameters; ranks beyond them hold replicas. `null`: all
    ranks, or those of a node with `strategy.accumulate=node`."""
    offload: Offload = Offload.none
    """`cpu`: keep parameters, gradients and the optimizer's state in the memory of the host, and copy each block's
    parameters to the GPU when it is needed."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "fsdp")
        require_at_least(1, strategy__shard_size=self.shard_size)
        require(
            self.shard_size is None or self.accumulate is not Accumulate.sharded,
            f"strategy.accumulate=sharded shards over all ranks, and strategy.shard_size is {self.shard_size}. Set "
            "strategy.accumulate=node to shard over some of them, or leave strategy.shard_size out.",
        )
