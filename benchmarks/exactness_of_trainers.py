"""Whose update is that of the window, whatever it is cut into?

    python benchmarks/exactness_of_trainers.py

What `python -m distaccum.check --trainer` compares, of trainers of others, in one process and in two with DDP over
gloo: each as its documentation has it, and where that gives one, by its recipe for samples of unequal lengths. A window
of 12 sequences, of which each token counts alike in the loss (for the classifier: each sequence); 2, 3 and more
micro-batches, equal and unequal ones. Plain SGD without clipping, in float64, without autocast.

The error is the largest relative difference of a gradient, of the first cut that shows one.

Needs the extra: pip install "distaccum[bench]".
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import common
import torch
import torch.nn.functional as F
from peers_contenders import IGNORE_INDEX, Sequences, TokenClassifier, WithLoss, mean_loss, quieten, require_peers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from distaccum import Accumulator
from distaccum.runtime.world import joined_world
from distaccum.testing import Loop, loop_of, loops
from distaccum.testing.same_update import Step, comparisons
from distaccum.testing.trainers import ranks

VOCABULARY, LONGEST = 32, 16
LENGTHS = (3, 16, 5, 9, 2, 14, 7, 11, 16, 4, 8, 6)
DATA = Sequences(LENGTHS, LONGEST, VOCABULARY)
Batch = tuple[Tensor, Tensor]
Made = Callable[[], Any]
"""Makes a trainer or a loop, for `loop_of`."""


def token_classifier() -> TokenClassifier:
    return TokenClassifier(VOCABULARY, width=16, num_layers=2)


def mean(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return mean_loss(model(inputs), targets)


def total(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    logits = model(inputs).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def tokens(batch: Batch) -> Tensor:
    return (batch[1] != IGNORE_INDEX).sum()


def looped(step: Step) -> Made:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = token_classifier()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    return lambda: Loop(build=build, samples=[DATA[number] for number in range(len(DATA))], step=step)


def in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if ranks() > 1 else model


def tutorial(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    """The loop of most tutorials."""
    placed = in_ddp(model)
    for number, batch in enumerate(micro_batches, 1):
        with placed.no_sync() if ranks() > 1 and number < len(micro_batches) else nullcontext():  # type: ignore[operator]
            (mean(placed, batch) / len(micro_batches)).backward()
    optimizer.step()


def distaccum(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch]) -> None:
    placed = in_ddp(model)
    accumulator = Accumulator(placed, optimizer)
    with accumulator.window(micro_batches) as window:
        for batch in window:
            accumulator.backward(total(placed, batch), weight=tokens(batch))
    accumulator.step()


def lightning_trainer() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = token_classifier()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return mean(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    strategy = "ddp" if ranks() > 1 else "auto"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=ranks(), strategy=strategy, **quiet)  # type: ignore[arg-type]
    return trainer, Module(), DataLoader(DATA)


class MeanLoss(nn.Module):
    """A model with a loss of its own that knows nothing of `num_items_in_batch`, as many have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": mean_loss(self.model(input_ids), labels)}


OF_TRANSFORMERS = {
    "output_dir": tempfile.gettempdir(),
    "use_cpu": True,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "disable_tqdm": True,
}


def transformers_trainer(model: nn.Module, collate: Callable[[Tensor, Tensor], dict[str, Tensor]], **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    return Trainer(
        model,
        TrainingArguments(**OF_TRANSFORMERS),  # type: ignore[arg-type]
        data_collator=lambda samples: collate(*map(torch.stack, zip(*samples, strict=True))),  # type: ignore[arg-type]
        train_dataset=DATA,
        **more,
    )


def with_loss(wrapped: Callable[[nn.Module], nn.Module]) -> Made:
    def collate(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"input_ids": inputs, "labels": targets}

    return lambda: transformers_trainer(wrapped(token_classifier()), collate)


def bert(**more: Any) -> Any:
    """Bert's classifier of sequences, of which each has one label."""
    from transformers import BertConfig, BertForSequenceClassification

    def collate(inputs: Tensor, _: Tensor) -> dict[str, Tensor]:
        return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": inputs[:, 0] % 2}

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))
    return transformers_trainer(model, collate, **more)


def by_count(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def sft() -> Any:
    """TRL's trainer, of a LLaMA-shaped model that predicts each token from those before."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)),
        SFTConfig(bf16=False, **OF_TRANSFORMERS),
        train_dataset=Dataset.from_dict({"input_ids": [row[row != 0].tolist() for row in DATA.inputs]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>"),
    )


CONTENDERS: dict[str, tuple[str, str, Made]] = {
    "the tutorials' loop": ("torch", "mean of each micro-batch / K", looped(tutorial)),
    "distaccum": ("torch", "Accumulator", looped(distaccum)),
    "Accelerate": ("accelerate", "accumulate()", looped(loops.accelerate(mean))),
    "Accelerate, recipe": ("accelerate", "variable-size samples", looped(loops.accelerate_by_count(total, tokens))),
    "Fabric": ("lightning", "no_backward_sync()", looped(loops.fabric(mean))),
    "Lightning Trainer": ("lightning", "accumulate_grad_batches", lightning_trainer),
    "Transformers Trainer": ("transformers", "loss without num_items_in_batch", with_loss(MeanLoss)),
    "Transformers Trainer, count": ("transformers", "loss with num_items_in_batch", with_loss(WithLoss)),
    "Transformers' Bert": ("transformers", "BertForSequenceClassification", bert),
    "Transformers' Bert, recipe": (
        "transformers",
        "the same, compute_loss_func",
        lambda: bert(compute_loss_func=by_count),
    ),
    "TRL SFTTrainer": ("trl", "LlamaForCausalLM", sft),
}
"""Package whose version counts, what it is, and what makes it."""


def verdict(name: str) -> common.Row:
    package, what, made = CONTENDERS[name]
    wrong = next((one for one in comparisons(loop_of(made, len(DATA))) if one.cause), None)
    return {
        "ranks": ranks(),
        "trainer": name,
        "version": version(package),
        "its way": what,
        "same update": "no" if wrong else "yes",
        "error": max(wrong.gradients.values()) if wrong else None,
        "likeliest cause": wrong.cause.kind.replace("_", " ") if wrong and wrong.cause else None,
    }


def on_ranks(names: list[str]) -> None:
    quieten()
    torch.set_num_threads(1)
    with joined_world() as world:
        if world.world_size > 1:
            world.init_process_group(torch.device("cpu"))
        for name in names:
            common.progress(name)
            common.send(verdict(name))


def rows(names: list[str]) -> Iterator[common.Row]:
    for count in (1, 2):
        yield from common.on_ranks(count, __file__, *names)


def main() -> None:
    if words := common.rank_words():
        on_ranks(words)
        return
    options = common.begin(common.arguments(__doc__, quick="30 seconds", full="1 minute"))
    require_peers("trl")
    # Importing and setting up the others' trainers is what takes long.
    names = ["the tutorials' loop", "distaccum", "Accelerate, recipe"] if options.quick else list(CONTENDERS)
    found = common.show(f"A window of {len(LENGTHS)} sequences, of which every token counts alike", rows(names))
    if options.write:
        common.write(__doc__, found)


if __name__ == "__main__":
    main()
