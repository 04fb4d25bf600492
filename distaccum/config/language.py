"""Typed sections of language models of transformers: `model`, `data` and `task`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distaccum.config import MISSING, DataConfig
from distaccum.config.components import LanguageModelingConfig, ModelConfig
from distaccum.config.lora import LoraConfig, require_four_bit


@dataclass(kw_only=True, slots=True)
class CausalLMConfig(ModelConfig):
    """Causal language model of transformers, from a folder or the Hugging Face hub."""

    _target_: str = "distaccum.models.causal_lm"
    name_or_path: str = MISSING
    """Folder that holds the model, or its name on the hub."""
    from_config: bool = False
    """Read its configuration alone, and begin with random weights."""
    attn_implementation: str | None = None
    """`eager`, `sdpa`, `flex_attention`, …. `null`: transformers' choice."""
    gradient_checkpointing: bool = False
    """The model's own activation checkpointing, in place of `activation_checkpointing`."""
    load_in_4bit: bool = False
    """Keep the weights of linear layers in 4 bits (NF4) by bitsandbytes, frozen under the adapters of `model.lora`
    (QLoRA)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    vocab_size: int | None = None
    """Least size of the vocabulary. `null`: the number of the tokenizer's tokens."""
    max_length: int | None = None
    """Least number of positions. `null`: the data's `max_length`."""

    def __post_init__(self) -> None:
        if self.load_in_4bit:
            require_four_bit(
                self.lora, from_config=self.from_config, init_on_meta=self.init_on_meta, init_from=self.init_from
            )


@dataclass(kw_only=True, slots=True)
class CausalLMTaskConfig(LanguageModelingConfig):
    """Cross-entropy over the next token, for causal language models of transformers; metrics: perplexity, accuracy of
    tokens."""

    _target_: str = "distaccum.tasks.CausalLM"
    sample_tokens: int = 32
    """Tokens of the text that is generated after evaluations, from the first prompt of the evaluation data."""
    sample_every: int = 1
    """Generate it after each so-many-th evaluation. 0: never."""


@dataclass(kw_only=True, slots=True)
class MixtureLMConfig(CausalLMTaskConfig):
    """Cross-entropy over the next token as `causal_lm`, and a loss that balances the experts of each sequence."""

    _target_: str = "distaccum.tasks.MixtureLM"
    coefficient: float | None = None
    """Of that loss. `null`: the model's own `router_aux_loss_coef`."""


@dataclass(kw_only=True, slots=True)
class LanguageDataConfig(DataConfig):
    """Chats, prompts with completions, or texts from files, as tokens."""

    files: Any = MISSING
    """Path, address in an object store or pattern of files, or a list of them: `.jsonl`, `.json`, `.csv`, `.parquet`,
    `.txt`, or a folder that `save_to_disk` of datasets has written. Rows have `messages`, `prompt` and `completion`, or
    `text`."""
    evaluation_files: Any = None
    """Files to evaluate on. `null`: a part of `files` is held out."""
    evaluation_fraction: float = 0.05
    """Fraction of the rows to hold out for evaluation when there are no `evaluation_files`."""
    tokenizer: str = MISSING
    """Folder that holds the tokenizer, or its name on the hub. Default: the model's."""
    max_length: int = 1024
    """Longest sample in tokens. Longer texts are cut into several samples; of others the rest is cut off, which the log
    says in numbers."""
    loss_on: str = "completion"
    """`completion`: the loss counts completions and the assistant's messages; `all`: every token."""
    columns: Any = None  # a dict[str, str], which OmegaConf can't replace as a whole where it is typed
    """Names of columns that are called otherwise, as in `{prompt:question,completion:answer}`."""
    chat_template: str | None = None
    """File with a Jinja template for `messages`, in place of the tokenizer's own."""
    cache: bool = False
    """Keep the tokens in a file, made once by one rank and mapped into memory by all, in place of memory of each."""
