"""The choices that a configuration offers by name."""

from __future__ import annotations

from enum import Enum


class DeviceChoice(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class PrecisionName(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"
    bf16_params = "bf16_params"


class Compression(Enum):
    none = "none"
    fp16 = "fp16"
    bf16 = "bf16"
    powersgd = "powersgd"


class Implementation(Enum):
    auto = "auto"
    fused = "fused"
    foreach = "foreach"
    forloop = "forloop"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"


class Goal(Enum):
    min = "min"
    max = "max"


class WandbMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class Balance(Enum):
    even = "even"
    speed = "speed"


class BatchSchedule(Enum):
    constant = "constant"
    table = "table"
    ramp = "ramp"
    noise = "noise"


class TableUnit(Enum):
    update = "update"
    epoch = "epoch"


class LrRule(Enum):
    linear = "linear"
    sqrt = "sqrt"
    none = "none"


class WhichCheckpoint(Enum):
    newest = "newest"
    best = "best"
    all = "all"


class Weights(Enum):
    raw = "raw"
    ema = "ema"
    swa = "swa"


class Combination(Enum):
    probabilities = "probabilities"
    outputs = "outputs"
    weights = "weights"
