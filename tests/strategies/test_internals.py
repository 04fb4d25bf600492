"""What the package uses of torch that torch keeps private is there: a release that drops it breaks these tests."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distaccum.strategies import _ddp_internals, _fsdp_internals


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def private_names(module: Any) -> set[str]:
    """Attributes with an underscore in front that a module reads or sets of others than itself."""
    tree = ast.parse(Path(module.__file__).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    others = [node for node in nodes if not (isinstance(node.value, ast.Name) and node.value.id == "self")]
    return {node.attr for node in others if node.attr.startswith("_") and not node.attr.startswith("__")}


def require(owner: Any, *names: str) -> None:
    for name in names:
        kind = owner.__name__ if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner).__name__
        assert hasattr(owner, name), f"torch {torch.__version__} has no {kind}.{name}"


def test_what_is_used_of_ddp(group: Any) -> None:
    model = DistributedDataParallel(nn.Linear(2, 2))
    require(model, "_comm_hooks", "_sync_buffers", "will_sync_module_buffers", "require_forward_param_sync", "reducer")
    require(model.reducer, "_rebuild_buckets", "_check_reducer_finalized", "prepare_for_backward")
    rebuilt = {"_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper"}
    require(model, *rebuilt)
    require(model.reducer, "_remove_autograd_hooks")
    require(group, "_get_backend", "allreduce_coalesced")
    require(group._get_backend(torch.device("cpu")).options, "_timeout")
    known = {"_comm_hooks", "_sync_buffers", "_rebuild_buckets", "_check_reducer_finalized", "_get_backend", "_timeout"}
    assert private_names(_ddp_internals) == known | rebuilt | {"_remove_autograd_hooks"}
    arguments = inspect.signature(DistributedDataParallel).parameters
    assert arguments.keys() & {"forward_sync_buffers", "broadcast_buffers"}
    assert _ddp_internals.buffer_arguments(False).keys() <= arguments.keys()


def test_what_is_used_of_zero(group: Any) -> None:
    with warnings.catch_warnings(action="ignore"):
        from torch.distributed.optim import ZeroRedundancyOptimizer
    optimizer = ZeroRedundancyOptimizer(nn.Linear(2, 2).parameters(), torch.optim.SGD, lr=0.1)
    require(optimizer, "_is_trainable_mask", "_get_is_trainable_mask", "optim")


def test_what_is_used_of_powersgd(group: Any) -> None:
    require(powersgd, "dist", "powerSGD_hook")
    state = powersgd.PowerSGDState(process_group=group, matrix_approximation_rank=1)
    require(state, "error_dict", "p_memory_dict", "q_memory_dict", "iter", "start_powerSGD_iter", "rng")


def test_what_is_used_of_fsdp(group: Any) -> None:
    model: Any = fully_shard(nn.Linear(2, 2))
    require(model, "_get_fsdp_state", "unshard", "reshard", "set_custom_reduce_scatter")
    state = model._get_fsdp_state()
    assert hasattr(state, "_fsdp_param_groups") or hasattr(state, "_fsdp_param_group"), torch.__version__
    model(torch.ones(1, 2)).sum().backward()
    (entries,) = _fsdp_internals._groups_of(model)
    for entry in entries:
        require(entry, "sharded_param", "_unsharded_param", "unsharded_accumulated_grad")
    known = {"_get_fsdp_state", "_fsdp_param_groups", "_unsharded_param"}
    assert private_names(_fsdp_internals) - {"_fully_shard", "_fsdp_api"} == known


def test_what_is_used_of_optimizers_modules_and_tensors() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    require(optimizer, "_optimizer_step_pre_hooks")
    require(torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True), "_step_supports_amp_scaling")
    require(nn.Module(), "_buffers", "_parameters", "_modules", "_non_persistent_buffers_set", "_apply")
    require(torch.zeros(1), "_version")
    require(torch.zeros(1).untyped_storage(), "_cdata")
    require(torch, "_foreach_norm", "_foreach_mul_", "_foreach_zero_")


def test_a_missing_name_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"torch .* has no Linear\._gone"):
        require(nn.Linear(1, 1), "_gone")
