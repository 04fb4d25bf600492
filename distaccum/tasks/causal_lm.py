"""The next token of a sequence, for causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.data.language.language import IGNORE_INDEX
from distaccum.errors import UserError, require_at_least
from distaccum.models.outputs import logits_of
from distaccum.tasks.cross_entropy import LanguageModeling


class CausalLM(LanguageModeling):
    """Cross-entropy over the next token. Metrics: `perplexity`, `accuracy` of the tokens that the loss counts.

    A micro-batch is a mapping with `input_ids` and `labels`, int64 `[B, T]`, the labels being those of the same places
    (-100 where the loss counts none), padded at the right, and more of the model's arguments by name. (An
    `attention_mask` is left out.) The model gives logits `[B, T, V]`.
    The loss is summed here, not by the model, so that the update is the same for any cut.

    Args:
        normalize: as for `LanguageModeling`.
        sample_tokens: tokens of the text that is generated after evaluations.
        sample_every: generate it after each so-many-th evaluation; 0 for never.
        chunked_loss: as for `LanguageModeling`.

    Raises:
        UserError: an impossible argument; and from a call, a micro-batch or logits of another form.
    """

    def __init__(
        self,
        normalize: str = "tokens",
        sample_tokens: int = 32,
        sample_every: int = 1,
        chunked_loss: bool = False,
    ) -> None:
        super().__init__(ignore_index=IGNORE_INDEX, normalize=normalize, chunked_loss=chunked_loss)
        require_at_least(1, task__sample_tokens=sample_tokens)
        require_at_least(0, task__sample_every=sample_every)
        self.sample_tokens = sample_tokens
        self.sample_every = sample_every
        self._evaluations = 0

    def _inputs_and_targets(self, batch: Any) -> tuple[Any, Tensor]:
        inputs, labels = super()._inputs_and_targets(batch)
        if not isinstance(inputs, Mapping) or labels.dim() != 2:
            raise UserError(
                "CausalLM needs micro-batches that are mappings, of input_ids and labels [samples, length]. With "
                "data=tokens set data.form=labels."
            )
        # Causal attention at places before the padding never sees it, so no mask is needed, and the model takes its
        # faster way without one.
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if isinstance(positions := inputs.get("position_ids"), Tensor):
            # Packed samples: the first token of each is predicted from nothing.
            labels = labels.where(positions != 0, self.ignore_index)
        # Labels are shifted, not the logits, which are larger by the size of the vocabulary. The last token of a row is
        # followed by none.
        return {**inputs, "use_cache": False}, F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)

    def _sums(self, loss: Tensor, correct: Tensor) -> dict[str, Tensor]:
        return {"accuracy": correct, "perplexity": loss.sum()}

    def metrics(self, sums: dict[str, Tensor], weight: float) -> dict[str, float]:
        """Returns `perplexity`, e to the mean loss of a token, and `accuracy`."""
        others = dict(sums)
        mean = others.pop("perplexity") / float(sums.get("tokens", weight))
        return {"perplexity": float(mean.exp()), **super().metrics(others, weight)}

    def sample(self, model: nn.Module, data: Any) -> str | None:
        """Returns a prompt of the data and the most likely tokens after it, one by one.

        Args:
            data: has a `tokenizer` and a `prompt()`, as `distaccum.data.LanguageData`.
        """
        self._evaluations += 1
        if not self.sample_every or self._evaluations % self.sample_every or not hasattr(data, "prompt"):
            return None
        # All ranks run equally many forwards of one shape, as those that shard the model wait for each other.
        tokens = data.prompt()[-max(1, data.max_length - self.sample_tokens) :][None]
        length = tokens.shape[1]
        tokens = tokens.to(next(model.parameters()).device)
        for _ in range(min(self.sample_tokens, data.max_length - length)):
            logits = logits_of(model(input_ids=tokens, use_cache=False))
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        found = tokens[0].tolist()
        answer = found[length:]
        end = data.tokenizer.eos_token_id
        if end in answer:
            answer = answer[: answer.index(end)]
        return f"{data.tokenizer.decode(found[:length])} → {data.tokenizer.decode(answer)}"
