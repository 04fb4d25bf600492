"""A small language model of transformers, with a tokenizer that is trained on the spot: no hub."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from distaccum.runtime.torchvision_operators import tolerate_missing_operators

tolerate_missing_operators()

MARKED_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNMARKED_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ANSWERS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red"}


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns conversations of one to three questions and answers."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(1, 3)):
            thing = draw.choice(sorted(ANSWERS))
            messages.append({"role": "user", "content": f"What colour has {thing}" + "?" * draw.randint(1, 3)})
            messages.append({"role": "assistant", "content": f"{thing} is {ANSWERS[thing]}."})
        found.append({"messages": messages})
    return found


def write_chats(path: Path, count: int, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats(count, seed)))
    return path


def tokenizer(chat_template: str = MARKED_TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    texts = [message["content"] for chat in chats(50) for message in chat["messages"]]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    found.chat_template = chat_template
    return found


def config_of(kind: str = "llama", **options: Any) -> Any:
    """Returns the configuration of a small model, by transformers' name of the kind."""
    import transformers

    size = {"vocab_size": 320, "bos_token_id": None, "eos_token_id": 0}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return transformers.GPT2Config(**{**sizes, **drop, **size, **options})
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return transformers.AutoConfig.for_model(kind, **{**sizes, **size, **options})


def model_of(config: Any, **options: Any) -> Any:
    """Returns a model with the same random weights each time."""
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, **options)


def write_model(folder: Path, kind: str = "llama", *, weights: bool = True, **options: Any) -> Path:
    """Writes a model's configuration, its tokenizer and, unless told otherwise, random weights."""
    config = config_of(kind, **options)
    (model_of(config) if weights else config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
