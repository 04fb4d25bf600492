"""In which format the model computes, and how it is placed on devices."""

from __future__ import annotations

from dataclasses import dataclass, field

from distaccum.config.basics import MISSING, require_name
from distaccum.config.enums import Compression, PrecisionName
from distaccum.errors import require_at_least, require_positive


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """In which floating-point format the model computes. Parameters are float32, unless said otherwise."""

    name: PrecisionName = PrecisionName.fp32
    """Set by the choice of the group. `fp32`; `bf16` or `fp16`: autocast; `bf16_params`: parameters in bfloat16
    themselves, gradients accumulated in float32; `fp64`: everything in double precision, for proofs."""

    def __post_init__(self) -> None:
        require_name("precision", self.name.name, *(entry.name for entry in PrecisionName if entry.name != "fp16"))


@dataclass(kw_only=True, slots=True)
class Fp16Config(PrecisionConfig):
    """Autocast to float16 with a gradient scaler, which steps, skips and adapts per update."""

    name: PrecisionName = PrecisionName.fp16
    init_scale: float = 65536.0
    """First loss scale."""
    growth_interval: int = 2000
    """Updates without an overflow after which the loss scale doubles."""

    def __post_init__(self) -> None:
        require_name("precision", self.name.name, "fp16")
        require_positive(precision__init_scale=self.init_scale, precision__growth_interval=self.growth_interval)


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """How the model is placed on devices."""

    name: str = MISSING
    """`single`, `dp`, `ddp` or `fsdp`. Without `strategy=…` on the command line: `ddp` under torchrun with more than
    one process, else `single`."""


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
    """Gradients live in the buckets: less memory and no copies."""
    find_unused_parameters: bool = False
    """Search the graph for parameters that took no part in the loss. Needed only if there are any."""
    static_graph: bool = False
    """Promise that the graph never changes. All ranks then take equal numbers of micro-steps, and the first micro-step
    of the run is synchronised too, which DDP needs and which changes no result."""
    broadcast_buffers: bool = True
    """Copy rank 0's buffers (BatchNorm statistics) to all ranks at the start of each window and before evaluations."""
    sync_batchnorm: bool = False
    """Replace BatchNorm by SyncBatchNorm, whose statistics run over the ranks' micro-batches of one micro-step. CUDA
    only."""
    shard_optimizer: bool = False
    """Each rank keeps the optimizer's state for a part of the parameters, and sends its part of the update to the
    others (ZeRO stage 1)."""
    compression: Compression = Compression.none
    """Gradients cross the network as `fp16`, `bf16` or low-rank factors (`powersgd`). The update is then no longer
    exact."""
    powersgd_rank: int = 1
    """Rank of PowerSGD's factors."""
    powersgd_start_update: int = 10
    """Updates that PowerSGD leaves uncompressed at the start (at least 2)."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "ddp")
        require_positive(strategy__bucket_cap_mb=self.bucket_cap_mb)
        require_at_least(1, strategy__powersgd_rank=self.powersgd_rank)
        require_at_least(2, strategy__powersgd_start_update=self.powersgd_start_update)


@dataclass(kw_only=True, slots=True)
class DPConfig(StrategyConfig):
    """One process, several replicas: `torch.nn.DataParallel` on two or more GPUs, threads on a CPU.

    Each micro-batch is scattered over the replicas, their outputs are gathered, and the loss is taken of them together.
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
    """Class names of the modules that are gathered and sharded as one. Empty: the members of each `ModuleList`, or the
    model's own children if it has none."""
    reshard_in_window: bool = True
    """Free gathered parameters after each forward and backward: least memory. `false`: keep them for the window's
    micro-steps, and gather once per update."""

    def __post_init__(self) -> None:
        require_name("strategy", self.name, "fsdp")
