"""Texts, prompts with their completions, and chats, as tokens for causal language models of transformers."""

from __future__ import annotations

import io
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.language.marked_tokens import MarkedTokens, write_samples
from distaccum.data.language.tokenization import COLUMNS, Marked, Tokenization, identity_of, load_tokenizer
from distaccum.data.rows.tables import rows_of
from distaccum.data.splits import EVALUATION, TRAIN, check_split
from distaccum.data.storage.files import files_of_splits
from distaccum.data.storage.made_once import made_once
from distaccum.errors import UserError, listed

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
"""The label of tokens that the loss doesn't count, as in transformers."""
LOSS_ON = ("completion", "all")
_ROWS_AT_ONCE = 1000


class LanguageData(Dataset[dict[str, Tensor]]):
    """Samples for a causal language model, of the rows of files (see `rows_of`), tokenised at the start.

    Rows have `messages` (through the tokenizer's chat template), `prompt` and `completion`, or `text`; see
    `Tokenization`. A text of more than `max_length` tokens is cut into consecutive samples; of anything else what is
    beyond is left out. What has no token then that the loss counts is no sample. Both are logged in numbers.

    A sample is `{"input_ids", "labels"}`, int64 `[T]` each with 2 <= T <= max_length, the labels being those of the
    same places (transformers' convention: token i is predicted from those before it), -100 where the loss counts none.

    Args:
        files: paths or patterns.
        tokenizer: a folder that holds one, or a name on the Hugging Face hub.
        split: `train` or `evaluation`.
        evaluation_files: files of the evaluation. None: a part of `files` is held out.
        evaluation_fraction: part of the rows to hold out, chosen by their numbers; 0 for none.
        max_length: longest sample in tokens.
        loss_on: `completion`: completions and the assistant's messages alone; `all`: every token.
        columns: names of the columns that are called otherwise, by `messages`, `prompt`, `completion`, `text`.
        chat_template: a file with a Jinja template, in place of the tokenizer's.
        cache: keep the tokens in a file that is made once and mapped into memory.

    Attributes:
        tokenizer: as loaded.
        vocab_size: least size of the model's vocabulary.
        max_length: as given.
        lengths: T of each sample.
        collate_fn: pads at the right, so that with causal attention no token sees padding; with an `attention_mask`.

    Raises:
        UserError: the files, the tokenizer or an argument don't fit.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        tokenizer: str,
        split: str = TRAIN,
        *,
        evaluation_files: str | Sequence[str] | None = None,
        evaluation_fraction: float = 0.05,
        max_length: int = 1024,
        loss_on: str = "completion",
        columns: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        cache: bool = False,
    ) -> None:
        check_split(split, type(self).__name__)
        check_options(max_length, loss_on)
        if not 0 <= evaluation_fraction < 1:
            raise UserError(f"data.evaluation_fraction={evaluation_fraction} must lie in [0, 1).")
        self.tokenizer = load_tokenizer(tokenizer, chat_template)
        self.vocab_size = len(self.tokenizer)
        self.max_length = max_length
        self.collate_fn = Padding(padding_of(self.tokenizer))
        tokenization = Tokenization(self.tokenizer, columns or {}, counts_all=loss_on == "all")
        key = "data.files" if evaluation_files is None or split == TRAIN else "data.evaluation_files"
        held_out = evaluation_fraction if evaluation_files is None else None
        paths = files_of_splits(files, evaluation_files)[key]

        def write(file: BinaryIO) -> str:
            rows = _checked(_part(rows_of(paths, key), held_out, split), columns or {})
            counts: Counter[str] = Counter()
            write_samples(file, self._samples(rows, tokenization, counts, split), counts)
            return f"{counts['tokens']:,} tokens"

        if cache:
            part = [split, held_out] if held_out is not None else []
            depends_on = [identity_of(self.tokenizer), max_length, loss_on, dict(columns or {}), part]
            self._tokens = MarkedTokens(made_once(paths, "tokens", write, depends_on=depends_on))
        else:
            content = io.BytesIO()
            write(content)
            self._tokens = MarkedTokens(content.getvalue())
        self.lengths = self._tokens.lengths
        self._log(self._tokens.counts, split)

    def _samples(
        self, rows: Iterable[tuple[str, Any]], tokenization: Tokenization, counts: Counter[str], split: str
    ) -> Iterator[Marked]:
        for batch in _batched(rows):
            for form, marked in tokenization.tokens_of(batch):
                counts["rows"] += 1
                for piece in self._pieces(form, marked, counts):
                    counts["samples"] += 1
                    counts["tokens"] += len(piece[0])
                    counts["counted"] += sum(piece[1])
                    yield piece
        if not counts["samples"]:
            raise UserError(
                f"the {split} data has {counts['rows']} rows and no sample: nothing is left that the loss would count. "
                "Give other data.files, a larger data.max_length, or another data.evaluation_fraction."
            )

    def _pieces(self, form: str, marked: Marked, counts: Counter[str]) -> Iterator[Marked]:
        """Yields a row's samples: cut or shortened to `max_length`, without those that have nothing to learn."""
        tokens, marks = marked
        most = self.max_length
        if len(tokens) > most:
            counts["long"] += 1
            if form != "text":
                counts["lost tokens"] += len(tokens) - most
                counts["shortened"] += 1
                tokens, marks = tokens[:most], marks[:most]
        for start in range(0, len(tokens), most):
            piece = tokens[start : start + most], marks[start : start + most]
            if any(piece[1][1:]):  # the first token is predicted from nothing
                yield piece
            else:
                counts["dropped"] += 1

    def _log(self, counts: Counter[str], split: str) -> None:
        said = [f"{len(self):,} samples, {counts['tokens']:,} tokens, of which the loss counts {counts['counted']:,}"]
        if counts["shortened"]:
            share = counts["lost tokens"] / (counts["tokens"] + counts["lost tokens"])
            said.append(
                f"{counts['shortened']:,} were longer than data.max_length={self.max_length} and are cut off there "
                f"({counts['lost tokens']:,} tokens, {share:.1%} of all)"
            )
        if cut := counts["long"] - counts["shortened"]:
            said.append(f"{cut:,} texts were longer than data.max_length={self.max_length} and are several samples")
        if counts["dropped"]:
            said.append(f"{counts['dropped']:,} were left out, as nothing in them is left that the loss counts")
        logger.info("%s data: %s", split, "; ".join(said))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        tokens, marks = map(torch.from_numpy, self._tokens.sample(index))
        return {"input_ids": tokens, "labels": tokens.where(marks, IGNORE_INDEX)}

    def prompt(self) -> Tensor:
        """Returns the tokens of the first sample up to what the loss counts, or its first half: int64 `[T]`, T >= 1."""
        sample = self[0]
        before = int((sample["labels"] != IGNORE_INDEX).int().argmax())
        return sample["input_ids"][: before or max(1, len(sample["input_ids"]) // 2)]


def check_options(max_length: int, loss_on: str) -> None:
    """Refuses impossible arguments."""
    if max_length < 2:
        raise UserError(f"data.max_length={max_length} is impossible: a token and the next one are 2.")
    if loss_on not in LOSS_ON:
        raise UserError(f"data.loss_on={loss_on} is none of {', '.join(LOSS_ON)}.")


class Padding:
    """Makes a micro-batch of samples, padded at the right: `input_ids`, `labels` and `attention_mask`, `[B, T]`."""

    def __init__(self, padding: int) -> None:
        self._values = {"input_ids": padding, "labels": IGNORE_INDEX}

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        found = {
            name: torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], True, value)
            for name, value in self._values.items()
        }
        lengths = torch.tensor([len(sample["labels"]) for sample in samples])
        return {**found, "attention_mask": (torch.arange(found["labels"].shape[1]) < lengths[:, None]).long()}


def padding_of(tokenizer: Any) -> int:
    """Returns any token: no other one sees it, and the loss doesn't count it."""
    known = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if known is None else int(known)


def _part(rows: Iterable[tuple[str, Any]], fraction: float | None, split: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a split, all if no part is held out.

    Whether a row is held out follows from its number alone: the first always is.
    """
    if fraction == 0 and split == EVALUATION:
        raise UserError("data.evaluation_fraction=0 leaves nothing to evaluate on: set data.evaluation=null as well.")
    for number, row in enumerate(rows):
        is_held_out = bool(fraction) and (number == 0 or zlib.crc32(str(number).encode()) < (fraction or 0) * 2**32)
        if fraction is None or is_held_out == (split == EVALUATION):
            yield row


def _checked(rows: Iterable[tuple[str, Any]], columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yields the rows; refuses names of columns that the first one doesn't have, which would be of no effect."""
    for number, (place, row) in enumerate(rows):
        for name, column in columns.items() if number == 0 else ():
            if name not in COLUMNS or column not in row:
                raise UserError(
                    f"data.columns={{{name}:{column}}}: {place} has the columns {listed(sorted(map(str, row)), 8)}. "
                    f"Give the name of one of them for {', '.join(COLUMNS)}."
                )
        yield place, row


def _batched(rows: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, _ROWS_AT_ONCE)):
        yield batch
