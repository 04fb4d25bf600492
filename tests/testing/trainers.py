"""Trainers as people configure them, for `distaccum.check --trainer trainers:NAME`."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tiny_language_model import tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from distaccum.testing import Loop
from distaccum.testing.loops import accelerate, accelerate_by_count, fabric

warnings.filterwarnings("ignore")

IGNORED = -100
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
TOKENIZER = tokenizer()
TOKENIZER.pad_token = TOKENIZER.eos_token
FOLDER = tempfile.gettempdir()

_draw = random.Random(0)
TEXTS = [{"input_ids": [_draw.randrange(300) for _ in range(_draw.randint(3, 20))]} for _ in range(14)]


def _arguments(**more: Any) -> Any:
    return {"output_dir": FOLDER, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2, **more}


def config() -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaConfig(vocab_size=len(TOKENIZER), num_attention_heads=2, num_key_value_heads=2, **sizes)


def sft(**options: Any) -> Any:
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    arguments = SFTConfig(**_arguments(max_length=None, **options))
    data = Dataset.from_list(TEXTS)
    return SFTTrainer(model=LlamaForCausalLM(config()), args=arguments, processing_class=TOKENIZER, train_dataset=data)


def sft_of_each_rank() -> Any:
    """Divides by the rank's own number of tokens."""
    return sft(average_tokens_across_devices=False)


def classifier() -> Any:
    """Bert's classifier takes any arguments, so that its mean is taken for a sum divided by the window's count."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(TOKENIZER), **sizes))
    data = [{"input_ids": text["input_ids"], "label": number % 2} for number, text in enumerate(TEXTS)]
    # As the default of 1.0 does with gradients of a real model: clipping hides the wrong factor.
    arguments = TrainingArguments(**_arguments(max_grad_norm=0.01))
    collate = DataCollatorWithPadding(TOKENIZER)
    return Trainer(model, arguments, data_collator=collate, train_dataset=data)  # type: ignore[arg-type]


def lightning() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3, 1)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            inputs, targets = batch
            loss = F.mse_loss(self.net(inputs), targets)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            updates = int(self.trainer.estimated_stepping_batches)
            optimizer = torch.optim.AdamW(self.parameters())
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=updates)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def train_dataloader(self) -> DataLoader[Any]:
            drawn = torch.Generator().manual_seed(0)
            data = TensorDataset(torch.randn(24, 3, generator=drawn), torch.randn(24, 1, generator=drawn))
            return DataLoader(data, batch_size=4, shuffle=True)

    strategy = "ddp" if RANKS > 1 else "auto"
    return lightning.Trainer(accelerator="cpu", devices=RANKS, strategy=strategy, max_epochs=7), Module()


def _built() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Embedding(300, 4), nn.Linear(4, 300))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def _loss(model: nn.Module, batch: Tensor, *, reduction: str) -> Tensor:
    logits = model(batch[:, :-1].clamp_min(0)).flatten(0, 1)
    return F.cross_entropy(logits, batch[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction)


def _loop(step: Any) -> Loop:
    def padded(texts: list[Any]) -> Tensor:
        return pad_sequence([torch.tensor(text["input_ids"]) for text in texts], True, IGNORED)

    return Loop(build=_built, samples=TEXTS, step=step, collate=padded)


def with_accelerate() -> Loop:
    return _loop(accelerate(partial(_loss, reduction="mean")))


def with_accelerates_recipe() -> Loop:
    count = lambda batch: (batch[:, 1:] != IGNORED).sum()  # noqa: E731
    return _loop(accelerate_by_count(partial(_loss, reduction="sum"), count))


def with_fabric() -> Loop:
    return _loop(fabric(partial(_loss, reduction="mean")))


def not_a_trainer() -> int:
    return 3


def lightning_without_module() -> Any:
    return lightning()[0]


def lightning_on_two() -> Any:
    import lightning as package

    return package.Trainer(accelerator="cpu", devices=2, strategy="ddp"), lightning()[1]


NOT_CALLABLE = 3
