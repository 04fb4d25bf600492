"""The choices that a configuration offers by name. Each value is the name itself."""

from __future__ import annotations

from enum import StrEnum

DeviceChoice = StrEnum("DeviceChoice", "auto cpu cuda")
PrecisionName = StrEnum("PrecisionName", "fp32 bf16 fp16 fp64 bf16_params")
Compression = StrEnum("Compression", "none fp16 bf16 powersgd")
Accumulate = StrEnum("Accumulate", "whole sharded node")
Offload = StrEnum("Offload", "none cpu")
Implementation = StrEnum("Implementation", "auto fused foreach forloop")
OnNonfinite = StrEnum("OnNonfinite", "stop skip")
OnDamaged = StrEnum("OnDamaged", "stop skip late")
Fit = StrEnum("Fit", "stretch crop")
Goal = StrEnum("Goal", "min max")
WandbMode = StrEnum("WandbMode", "disabled offline online")
Balance = StrEnum("Balance", "even speed")
BatchSchedule = StrEnum("BatchSchedule", "constant table ramp noise")
TableUnit = StrEnum("TableUnit", "update epoch")
Normalize = StrEnum("Normalize", "tokens sequences samples")
TokenForm = StrEnum("TokenForm", "targets labels")
TokenDtype = StrEnum("TokenDtype", "uint16 uint32")
LrRule = StrEnum("LrRule", "linear sqrt none")
DecayShape = StrEnum("DecayShape", "linear cosine one_minus_sqrt")
WhichCheckpoint = StrEnum("WhichCheckpoint", "newest best all")
Weights = StrEnum("Weights", "raw ema swa")
Combination = StrEnum("Combination", "probabilities outputs weights")


def usual_goal(metric: str) -> Goal:
    """Returns whether less or more of a metric is better: less of a `loss`, and of its terms `loss/NAME`."""
    return Goal.min if "loss" in metric.split("/") else Goal.max
