"""How right, how fast and how large is the fine-tuning of a language model under distaccum and its peers?

    python benchmarks/finetune.py

A LLaMA-shaped model of transformers with random weights, on prompts (a loss that doesn't count them) and completions of
very unequal lengths: halves of the paragraphs of Python's own documentation. One epoch in windows of 32 samples, the
last of which is smaller, in micro-batches of 4, by distaccum (`CausalLM` with `Accumulator` and `WindowLoader`, cut at
random and by length), transformers' `Trainer`, and TRL's `SFTTrainer` with its own defaults, activation checkpointing
and bfloat16 autocast. All see the same windows.

- error: how far the final weights are from those of one batch a window, as part of the way that training has led.
  Float64, plain SGD, a small model: Adam would hide an update of a wrong size.
- seconds per update and resident memory beyond what it was before training, of a larger one in float32 with AdamW, each
  run in a process of its own; the least of interleaved rounds.

Needs the extra: pip install "distaccum[bench]".
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from peers_contenders import quieten, transformers_trained
from torch import Tensor, nn
from torch.utils.data import Subset

from distaccum import Accumulator, WindowLoader
from distaccum.data import LanguageData
from distaccum.data.language.text import paragraphs
from distaccum.runtime.torchvision_operators import tolerate_missing_operators
from distaccum.tasks import CausalLM

tolerate_missing_operators()
WINDOW, MICRO_BATCH_SIZE = 32, 4


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A model, and what it is trained on."""

    width: int
    num_layers: int
    samples: int
    max_length: int


SMALL = Extent(width=32, num_layers=2, samples=70, max_length=64)
FULL = Extent(width=256, num_layers=6, samples=166, max_length=256)
QUICK = Extent(width=64, num_layers=2, samples=70, max_length=64)


def write_tokenizer(folder: str, texts: Sequence[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(folder)


@functools.cache
def data(extent: Extent) -> LanguageData:
    texts = paragraphs("train")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder, texts)
        file = Path(folder, "rows.jsonl")
        halves = ((text[: len(text) // 2], text[len(text) // 2 :]) for text in texts[: extent.samples])
        file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in halves))
        return LanguageData(str(file), folder, evaluation_fraction=0.0, max_length=extent.max_length)


def model_of(extent: Extent, vocab_size: int) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=extent.width,
        intermediate_size=3 * extent.width,
        num_hidden_layers=extent.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.train()


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What each contender is given."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    samples: LanguageData
    micro_batch_size: int = MICRO_BATCH_SIZE

    def loader(self, **options: Any) -> WindowLoader:
        return WindowLoader(
            self.samples, global_batch_size=WINDOW, micro_batch_size=self.micro_batch_size, seed=1, **options
        )

    def in_order(self) -> Subset[Any]:
        """The samples in the order in which the windows have them."""
        loader = self.loader()
        indices = [
            index
            for window in range(len(loader))
            for micro_batch in loader.cuts.micro_batches(0, window)
            for index in micro_batch
        ]
        return Subset(self.samples, indices)


def distaccum(job: Job, **options: Any) -> None:
    accumulator = Accumulator(job.model, job.optimizer)
    task = CausalLM()
    for window in job.loader(**options):
        accumulator.run(window, lambda batch: task(job.model, batch))


def distaccum_by_length(job: Job) -> None:
    distaccum(job, lengths=job.samples.lengths)


def by_transformers(job: Job) -> None:
    transformers_trained(job.model, job.optimizer, job.in_order(), collate(job), **trainer_options(job))


def by_trl(job: Job) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = [{name: values.tolist() for name, values in sample.items()} for sample in job.in_order()]
    transformers_trained(
        job.model,
        job.optimizer,
        datasets.Dataset.from_list(rows).with_format("torch"),
        collate(job),
        classes=(SFTConfig, functools.partial(SFTTrainer, processing_class=job.samples.tokenizer)),
        dataset_kwargs={"skip_prepare_dataset": True},
        **trainer_options(job),
    )


def collate(job: Job) -> Callable[[list[Any]], dict[str, Tensor]]:
    return job.samples.collate_fn


def trainer_options(job: Job) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": WINDOW // job.micro_batch_size,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }


REFERENCE, TRL = "Transformers Trainer", "TRL SFTTrainer"
CONTENDERS: dict[str, Callable[[Job], None]] = {
    "distaccum": distaccum,
    "distaccum, by length": distaccum_by_length,
    REFERENCE: by_transformers,
    TRL: by_trl,
}


def error(name: str) -> float:
    """The distance of the final weights from those of one batch a window, over the way from the initial ones."""
    samples = data(SMALL)
    initial = model_of(SMALL, samples.vocab_size).double()

    def trained(contender: Callable[[Job], None], size: int = MICRO_BATCH_SIZE) -> Tensor:
        model = copy.deepcopy(initial)
        contender(Job(model, torch.optim.SGD(model.parameters(), lr=0.5), samples, size))
        return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    start = torch.cat([parameter.detach().reshape(-1) for parameter in initial.parameters()])
    wanted = trained(distaccum, WINDOW)
    return float((trained(CONTENDERS[name]) - wanted).norm() / (wanted - start).norm())


def cost(name: str, extent: Extent) -> tuple[float, float]:
    """Returns the seconds per update, and the megabytes that training takes."""
    samples = data(extent)
    model = model_of(extent, samples.vocab_size)
    job = Job(model, torch.optim.AdamW(model.parameters(), lr=1e-4), samples)
    if name == REFERENCE:
        import transformers.trainer  # noqa: F401  what is imported doesn't count
    if name == TRL:
        import trl  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    CONTENDERS[name](job)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds / len(job.loader()), (after - before) / 1e3


def in_a_process(name: str, extent: Extent) -> tuple[float, float]:
    command = [sys.executable, __file__, "--cost-of", name, json.dumps(dataclasses.asdict(extent))]
    done = subprocess.run(command, capture_output=True, text=True, env=common.ENVIRONMENT, check=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def rows(
    names: Sequence[str], extent: Extent, rounds: int, costs_of: Callable[[str, Extent], tuple[float, float]]
) -> Iterator[common.Row]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in common.rounds(rounds, "round"):
        for name in names if number % 2 else names[::-1]:
            found[name].append(costs_of(name, extent))
    best = {name: (min(s for s, _ in costs), min(m for _, m in costs)) for name, costs in found.items()}
    for name, (seconds, megabytes) in best.items():
        yield {
            "contender": name,
            "error of the weights": error(name),
            "s/update": seconds,
            f"/ {REFERENCE}": seconds / best[REFERENCE][0],
            "MB for training": megabytes,
        }


def main() -> None:
    if sys.argv[1:2] == ["--cost-of"]:
        quieten()
        torch.set_num_threads(1)
        print(json.dumps(cost(sys.argv[2], Extent(**json.loads(sys.argv[3])))))
        return
    options = common.begin(common.arguments(__doc__, quick="20 seconds", full="4 minutes"))
    quieten()
    torch.set_num_threads(1)
    what = (("distaccum", REFERENCE), QUICK, 1, cost) if options.quick else (tuple(CONTENDERS), FULL, 3, in_a_process)
    title = f"Windows of {WINDOW} samples in micro-batches of {MICRO_BATCH_SIZE}"
    found = common.show(title, rows(*what))
    if options.write:
        common.write(__doc__, found)


if __name__ == "__main__":
    main()
