from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distaccum import Accumulator
from distaccum.config import DPConfig
from distaccum.config.components import CNNConfig, GPTConfig, ModelConfig
from distaccum.config.schemas import SCHEMAS
from distaccum.errors import UserError
from distaccum.models import CNN, GPT, Encoder, UNet
from distaccum.strategies import place
from distaccum.strategies.dp import DPStrategy
from distaccum.training.model import build_model, checkpoint_blocks, freeze


class Block(nn.Module):
    """With all that a second forward could spoil: dropout, running statistics, a buffer that a forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor, *, gain: float = 1.0) -> Tensor:
        self.calls += 1
        return inputs + gain * self.calls * self.dropout(torch.tanh(self.norm(self.linear(inputs))))


class Net(nn.Module):
    def __init__(self, blocks: int = 3, **_: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            inputs = block(inputs, gain=1.0 + number)
        return self.out(inputs).squeeze(-1)


class WithItsOwn(nn.Module):
    """Its constructor knows the key itself."""

    def __init__(self, freeze: str = "no", activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.told = (freeze, activation_checkpointing)


def gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(**{"vocab_size": 11, "max_length": 24, "num_layers": 2, "num_heads": 2, "width": 16, **changes})


def trained(model: nn.Module, batch: Tensor, *, updates: int = 2) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses, state and kept bytes of some updates of two micro-steps."""
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.05), strategy=_strategy(model))
    torch.manual_seed(1)
    losses, kept = [], 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    for _ in range(updates):
        with accumulator.window([batch, 0.5 * batch if batch.is_floating_point() else batch]) as micro_batches:
            for micro_batch in micro_batches:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    loss = model(micro_batch).square().sum()
                accumulator.backward(loss, len(micro_batch))
        losses.append(accumulator.step().loss)
    return losses, model.state_dict(), kept


def _strategy(model: nn.Module) -> Any:
    return DPStrategy(model) if type(model).__name__ == "ThreadedReplicas" else None


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (gpt(), torch.randint(11, (3, 20))),
        (gpt(dropout=0.4), torch.randint(11, (3, 20))),
        (CNN(input_shape=[1, 8, 8], num_classes=3, channels=[8, 8]), torch.randn(4, 1, 8, 8)),
        (UNet(input_shape=[1, 16, 16], num_classes=2, channels=[8, 8, 16]), torch.randn(3, 1, 16, 16)),
        (Encoder(input_shape=[1, 8, 8], channels=[8, 8], width=8, embedding_size=4), torch.randn(4, 1, 8, 8)),
        (Net(), torch.randn(5, 6)),
        (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)), torch.randn(5, 6)),
    ],
    ids=["gpt", "gpt with dropout", "cnn", "unet", "encoder", "batchnorm, dropout and buffers", "sequential"],
)
def test_checkpointing_keeps_less_and_changes_no_bit(model: nn.Module, batch: Tensor) -> None:
    twin = copy.deepcopy(model)
    blocks = checkpoint_blocks(twin)
    assert len(blocks) >= 2
    losses, state, kept = trained(model, batch)
    same_losses, same_state, fewer = trained(twin, batch)
    assert losses == same_losses
    assert same(state, same_state)
    assert fewer < kept


@pytest.mark.parametrize("schema", SCHEMAS["model"].values())
def test_every_model_of_the_package_takes_the_options(schema: type) -> None:
    assert issubclass(schema, ModelConfig)


def test_a_forward_that_is_made_twice_without_care_would_be_noticed() -> None:
    class Careless(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            for number, block in enumerate(self.blocks):
                inputs = torch.utils.checkpoint.checkpoint(block, inputs, gain=1.0 + number, use_reentrant=False)
            return self.out(inputs).squeeze(-1)

    torch.manual_seed(0)
    model = Net()
    careless = Careless()
    careless.load_state_dict(model.state_dict())
    batch = torch.randn(5, 6)
    losses, state, _ = trained(model, batch)
    other_losses, other_state, _ = trained(careless, batch)
    assert losses != other_losses
    assert not same(state, other_state)


def test_checkpointing_of_replicas() -> None:
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    checkpoint_blocks(twin)
    batch = torch.randn(6, 6)
    cpu = torch.device("cpu")
    losses, state, _ = trained(place(model, DPConfig(replicas=2), cpu).model, batch)
    same_losses, same_state, _ = trained(place(twin, DPConfig(replicas=2), cpu).model, batch)
    assert losses == same_losses
    assert same(state, same_state)


def test_a_copy_computes_with_its_own_parameters() -> None:
    model = gpt()
    checkpoint_blocks(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    tokens = torch.randint(11, (1, 5))
    assert not twin(tokens).any()
    assert model(tokens).any()


def test_blocks_by_name_and_models_without_blocks() -> None:
    assert len(checkpoint_blocks(Net(), ["Linear"])) == 4
    with pytest.raises(UserError, match=r"\['Missing'\]: the model has no such module. It has: .*Block"):
        checkpoint_blocks(Net(), ["Missing"])
    with pytest.raises(UserError, match="Linear has no submodules"):
        checkpoint_blocks(nn.Linear(2, 2))
    model = Net()
    checkpoint_blocks(model)
    with pytest.raises(UserError, match="can't be done twice"):
        checkpoint_blocks(model)


def test_sections_of_all_kinds() -> None:
    built = build_model(GPTConfig(vocab_size=5, max_length=4, activation_checkpointing=True, freeze=["norm.*"]), None)
    assert "forward" in vars(built.blocks[0])
    assert [name for name, p in built.named_parameters() if not p.requires_grad] == ["norm.weight", "norm.bias"]
    plain = build_model(CNNConfig(input_shape=[1, 8, 8], num_classes=2), None)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    custom = {"_target_": f"{__name__}.Net", "blocks": 1, "activation_checkpointing": True, "freeze": ["out.*"]}
    model = build_model(custom, None)
    assert "forward" in vars(model.blocks[0])
    assert not model.out.weight.requires_grad
    null = {"_target_": f"{__name__}.Net", "activation_checkpointing": None, "freeze": None}
    assert "forward" not in vars(build_model(null, None).blocks[0])


def test_building_reads_no_weights() -> None:
    """Whoever builds the model of a checkpoint must not be led to another file by it."""
    build_model({"_target_": f"{__name__}.Net", "init_from": "nowhere.safetensors"}, None)


def test_a_constructor_that_knows_the_key_gets_it() -> None:
    target = {"_target_": f"{__name__}.WithItsOwn"}
    assert build_model({**target, "freeze": "yes", "activation_checkpointing": True}, None).told == ("yes", True)
    assert build_model({**target, "freeze": None, "activation_checkpointing": None}, None).told == ("no", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["embedding.*"]}, "no parameter has a name like embedding.*. Near it are .*token_embedding.weight"),
        ({"freeze": ["*"]}, "freezes all .* parameters, so there is nothing to train"),
        ({"freeze": "norm.*"}, "must be a list of patterns"),
        ({"activation_checkpointing": 2}, "must be true or false"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    section = {"_target_": "distaccum.models.GPT", "vocab_size": 5, "max_length": 4, **options}
    with pytest.raises(UserError, match=f"model.*{message}"):
        build_model(section, None)


def test_a_name_of_a_tied_parameter_will_do() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2), "third": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    freeze(model, ["second.weight"])
    assert not model["first"].weight.requires_grad
    assert model["second"].bias.requires_grad
