"""Tokenises rows when they are loaded, in place of all at the start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distaccum.data.language.language import IGNORE_INDEX, Padding, check_options, padding_of
from distaccum.data.language.tokenization import Tokenization, identity_of, load_tokenizer

logger = logging.getLogger("distaccum.data")


class TokenizeRow:
    """Makes a sample for a causal language model of a row, as `LanguageData` does: a `transform` of `Rows`.

    A row is one sample, `{"input_ids", "labels"}`, int64 `[T]` each with 2 <= T <= max_length; what is beyond is left
    out, of texts too. One in which the loss counts nothing weighs nothing.

    Args:
        tokenizer, max_length, loss_on, columns, chat_template: as for `LanguageData`.

    Attributes:
        tokenizer, vocab_size, max_length, collate_fn: as those of `LanguageData`.
        lengths_depend_on: all that samples depend on beside the rows.

    Raises:
        UserError: the tokenizer or an argument don't fit; when called, the row.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        max_length: int = 1024,
        loss_on: str = "completion",
        columns: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        check_options(max_length, loss_on)
        self.tokenizer = load_tokenizer(tokenizer, chat_template)
        self.vocab_size = len(self.tokenizer)
        self.max_length = max_length
        self._padding = padding_of(self.tokenizer)
        self.collate_fn = Padding(self._padding)
        self.lengths_depend_on = [identity_of(self.tokenizer), max_length, loss_on, dict(columns or {})]
        self._tokenization = Tokenization(self.tokenizer, columns or {}, counts_all=loss_on == "all")
        logger.info(
            "rows are tokenised when they are loaded; of those of more than %d tokens the rest is left out", max_length
        )

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        ((_, (tokens, marks)),) = self._tokenization.tokens_of([("it", row)])
        missing = max(0, 2 - len(tokens))
        found = torch.tensor([*tokens[: self.max_length], *[self._padding] * missing])
        counted = torch.tensor([*marks[: self.max_length], *[False] * missing])
        return {"input_ids": found, "labels": found.where(counted, IGNORE_INDEX)}
