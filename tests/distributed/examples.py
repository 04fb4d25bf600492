"""Small models, data and loops that the distributed checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum import Accumulator, UpdateResult, WindowLoader
from distaccum.config import StrategyConfig
from distaccum.config.optimizers import AdamConfig
from distaccum.data import DocumentationText
from distaccum.runtime.compilation import Compilation
from distaccum.strategies import SingleStrategy, Strategy, needs_equal_micro_steps, place, shards_optimizer
from distaccum.tasks import LanguageModeling, TaskOutput
from distaccum.training.optim import build_optimizer

VOCABULARY = 11


class RaggedTokens(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Sequences of 1 to 12 tokens; long ones are easy, short ones are noise; some targets are left out of the loss.

    With `length`, all are of that length, and every target counts.
    """

    def __init__(self, num_samples: int = 41, length: int | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.samples = []
        for _ in range(num_samples):
            drawn = length or int(torch.randint(1, 13, (), generator=generator))
            inputs = torch.randint(0, VOCABULARY, (drawn,), generator=generator)
            noise = torch.randint(0, VOCABULARY, (drawn,), generator=generator)
            targets = torch.zeros_like(inputs) if drawn > 6 else noise
            if length is None:
                targets[torch.rand(drawn, generator=generator) < 0.2] = -100
            self.samples.append((inputs, targets))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]

    @staticmethod
    def collate_fn(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*samples, strict=True)
        pad = nn.utils.rnn.pad_sequence
        return pad(list(inputs), batch_first=True), pad(list(targets), batch_first=True, padding_value=-100)


class FewTexts(DocumentationText):
    """The first samples of the documentation's texts."""

    def __init__(self, split: str, max_length: int, num_samples: int) -> None:
        super().__init__(split, max_length)
        self.lengths = self.lengths[:num_samples]


class TokenClassifier(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, VOCABULARY)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(tokens))))

    def get_output_embeddings(self) -> nn.Module:
        return self.out


class Normalized(nn.Module):
    """Digits with BatchNorm, whose statistics are other ones on each rank unless they are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(images))


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    loss_sum = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="sum")
    return loss_sum, (targets != -100).sum()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-2)


def placed(module: nn.Module, config: StrategyConfig | None, compilation: Compilation | None = None) -> Strategy:
    if config is None:
        return SingleStrategy(module)
    return place(module, config, torch.device("cpu"), compilation=compilation)


def train_tokens(
    config: StrategyConfig | None,
    *,
    updates: int = 4,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float64,
    loss: Callable[[nn.Module, Any], tuple[Tensor, Tensor | float]] = token_loss,
    model: Callable[[torch.dtype], nn.Module] = TokenClassifier,
    clip_norm: float | None = 0.05,
    equal_micro_steps: bool | None = None,
    data: RaggedTokens | None = None,
    seed: int = 1,
    compilation: Compilation | None = None,
    **batch: Any,
) -> tuple[list[UpdateResult], Tensor]:
    """Trains the token classifier, by default over an epoch, whose last window is ragged, and into the next.

    Returns the results and the parameters.
    """
    strategy = placed(model(dtype), config, compilation)
    optimizer = build_optimizer(
        AdamConfig(_target_="torch.optim.AdamW", lr=3e-2, weight_decay=0.01),
        strategy.model.parameters(),
        torch.device("cpu"),
        shard=config is not None and shards_optimizer(config),
    )
    accumulator = Accumulator(strategy.model, optimizer, clip_norm=clip_norm, strategy=strategy)
    loader = WindowLoader(
        data or RaggedTokens(),
        rank=rank,
        world_size=world_size,
        seed=seed,
        equal_micro_steps=(
            needs_equal_micro_steps(config) if equal_micro_steps is None and config else bool(equal_micro_steps)
        ),
        **{"global_batch_size": 16, **batch},
    )
    results: list[UpdateResult] = []
    while len(results) < updates:
        for window in loader:
            with accumulator.window(window) as micro_batches:
                for micro_batch in micro_batches:
                    accumulator.backward(*loss(strategy.model, micro_batch))
            results.append(accumulator.step())
            if len(results) == updates:
                break
    return results, flat(strategy.module)


def flat(module: nn.Module) -> Tensor:
    """All parameters in one vector; shards are gathered, so every rank must ask."""
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in map(torch.detach, module.parameters()))
    return torch.cat([parameter.reshape(-1) for parameter in whole])


def distance(found: Any, wanted: Any) -> float:
    """‖difference‖ / ‖value‖."""
    found, wanted = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
    return float((found - wanted).norm() / wanted.norm())


def curves(results: list[UpdateResult]) -> tuple[list[float], list[float]]:
    return [result.loss for result in results], [result.grad_norm for result in results]


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives and host syncs where torch dispatches them, whatever the package says it did."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.host_syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket._qualified_op_name
        if name.startswith("c10d::"):
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.collectives.append((name, sum(t.nbytes for t in tensors if isinstance(t, Tensor))))
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero"):
            self.host_syncs += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def calls_in(owner: Any, name: str, run: Callable[[], Any]) -> int:
    """Returns how often a method of a class is called while something runs."""
    original, calls = getattr(owner, name), []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(self, *args, **kwargs)

    with replaced(owner, name, counting):
        run()
    return len(calls)


class DividedByK(LanguageModeling):
    """What accumulation tutorials do: a mean per micro-batch, each counted alike."""

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        weight = torch.as_tensor(output.weight)
        return TaskOutput(output.loss_sum / weight.clamp(min=1), 1.0) if model.training else output
