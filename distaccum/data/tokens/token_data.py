"""Samples for language models from files of tokens of any size: pieces of a fixed length, or whole documents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.config.enums import TokenForm
from distaccum.data.language.text import IGNORE_INDEX
from distaccum.data.splits import EVALUATION, TRAIN, HeldOut, check_split
from distaccum.data.storage.files import require_named_once
from distaccum.data.tokens.documents import DocumentCut, DocumentSamples
from distaccum.data.tokens.token_files import Found, Tokens, find
from distaccum.errors import UserError, require, require_at_least
from distaccum.loaders.collate import PadCollate, Stacked

logger = logging.getLogger(__name__)

_BLOCK = 16
"""Consecutive samples of a fixed length that are held out together."""
_LOOKED_AT, _LEAST = 4096, 64
_OTHER = {TRAIN: "evaluation", EVALUATION: "training"}


class TokenData(Dataset[tuple[Tensor, Tensor] | Mapping[str, Tensor]]):
    """Samples of files of tokens, which are one sequence in the order of the files.

    With a fixed length L, sample i has the tokens from i·L on, across the ends of files: it doesn't depend on how the
    sequence is split into files. The number of samples is arithmetic over the sizes of the files, so that a start reads
    none of them. With whole documents, each is a sample, and one of more than L tokens several consecutive ones; where
    they are is found once and kept in a file.

    A sample is, by `form`, with T <= L:

    - `targets`: `(inputs, targets)`, int64 `[T]` each, the targets being one token ahead. Every token is the target of
      one prediction, but for the first one (of the sequence, or of each document).
    - `labels`: `{"input_ids", "labels"}`, int64 `[T]` each and equal, as models of transformers take them: the first
      token of each sample is predicted from nothing, and doesn't count.

    Args:
        split: `train` or `evaluation`.
        files: files, patterns or folders. In a folder, files that are named as for an evaluation (`val.bin`) are taken
            for it.
        evaluation_files: those to evaluate on. None: those of folders, or else a part of the samples is held out.
        evaluation_fraction: the part; 0 for none. Of a fixed length in blocks of 16 samples, otherwise by documents.
        max_length: L.
        whole_documents: take documents as samples.
        end_token: ends documents. None: files beside those of tokens say where they end.
        vocab_size: number of different tokens. None: as the folder's index says.
        dtype: of tokens in files that don't say theirs: `uint16` or `uint32`.
        form: as above.

    Attributes:
        vocab_size, max_length: as above.
        lengths: T of each sample.
        collate_fn: pads inputs with 0 and targets or labels with -100, which the loss ignores.

    Raises:
        UserError: the files or an argument don't fit; and from an access, a token that is not below `vocab_size`.
    """

    def __init__(
        self,
        split: str,
        files: str | Sequence[str],
        *,
        evaluation_files: str | Sequence[str] | None = None,
        evaluation_fraction: float = 0.01,
        max_length: int = 1024,
        whole_documents: bool = False,
        end_token: int | None = None,
        vocab_size: int | None = None,
        dtype: str = "uint16",
        form: str = "targets",
    ) -> None:
        check_split(split, type(self).__name__)
        require(form in list(TokenForm), f"data.form={form} is none of {', '.join(TokenForm)}.")
        self._ahead = 1 if form == TokenForm.targets else 0
        require_at_least(2 - self._ahead, data__max_length=max_length)
        require(
            whole_documents or end_token is None,
            f"data.end_token={end_token} has no use with pieces of a fixed length: set data.whole_documents=true too.",
        )
        chosen, part = _chosen(split, files, evaluation_files, dtype)
        self._part = part if evaluation_fraction or split == EVALUATION else None
        self.vocab_size = vocab_size or _required(chosen.vocab_size)
        self.max_length = max_length
        self.collate_fn = PadCollate((0, IGNORE_INDEX))
        self._tokens = Tokens(chosen.files)
        self._is_wide = any(np.dtype(file.dtype).itemsize > 2 for file in chosen.files)
        self._held_out = HeldOut(evaluation_fraction, _BLOCK)
        self._documents: DocumentSamples | None = None
        _check_dtype(self._tokens)
        total = max(0, len(self._tokens) - self._ahead) // max_length
        if whole_documents:
            cut = DocumentCut(
                end_token=end_token,
                max_length=max_length,
                ahead=self._ahead,
                evaluation_fraction=evaluation_fraction,
                split=self._part,
            )
            self._documents = DocumentSamples(self._tokens, cut)
            self._count = len(self._documents)
        else:
            self._count = total if self._part is None else self._held_out.count(total, self._part)
        self._say(split, total)

    def _say(self, split: str, total: int) -> None:
        number = len(self._tokens.files)
        files = f"{number:,} file{'s' * (number != 1)} with {len(self._tokens):,} tokens"
        length = f"data.max_length={self.max_length}"
        if not self._count:
            raise UserError(
                f"the {split} data has no sample: {files} are too few for {length} and this part of them "
                "(data.evaluation_fraction). Give more files, or change one of both; data.evaluation=null needs none."
            )
        said = [f"{self._count:,} samples of {files}"]
        if self._part is not None:
            said.append(f"the others are for the {_OTHER[self._part]}, by data.evaluation_fraction")
        if (documents := self._documents) is not None:
            said.append(f"{documents.documents:,} documents")
            if documents.several:
                said.append(f"{documents.several:,} are longer than {length} and are several samples")
            if documents.none:
                said.append(f"{documents.none:,} are left out, as they have no token and a next one")
            if documents.left_over:
                said.append(f"{documents.left_over:,} leave a last token alone, which is left out")
        elif rest := len(self._tokens) - self._ahead - total * self.max_length:
            said.append(f"the last {rest:,} tokens fill no sample and are left out")
        logger.info("%s data: %s", split, "; ".join(said))

    def __len__(self) -> int:
        return self._count

    @property
    def lengths(self) -> NDArray[np.int64]:
        """T of each sample, int64 `[len(self)]`, of which no copy is held."""
        if self._documents is not None:
            return self._documents.lengths
        return np.broadcast_to(np.int64(self.max_length), (self._count,))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | Mapping[str, Tensor]:
        start, length = self._place(index)
        found = self._tokens.read(start, start + length + self._ahead).astype(np.int64)
        if (largest := int(found.max())) >= self.vocab_size:
            raise UserError(
                f"{self._tokens.place(start + int(found.argmax()))} is {largest}, and data.vocab_size="
                f"{self.vocab_size} has tokens from 0 to {self.vocab_size - 1}. Give the tokenizer's number of tokens; "
                f"or data.dtype, if these are no {np.dtype(self._tokens.files[0].dtype)}."
            )
        tokens = torch.from_numpy(found)
        if self._ahead:
            return tokens[:-1], tokens[1:]
        return {"input_ids": tokens, "labels": tokens}

    def __getitems__(self, indices: Sequence[int]) -> Sequence[tuple[Tensor, Tensor] | Mapping[str, Tensor]]:
        """Returns samples by their numbers, those of a fixed length as one micro-batch already."""
        if self._documents is not None or not len(indices):
            return [self[index] for index in indices]
        rows = np.empty((len(indices), self.max_length + self._ahead), np.uint32 if self._is_wide else np.uint16)
        for row, index in zip(rows, indices, strict=True):
            start, length = self._place(index)
            row[:] = self._tokens.read(start, start + length + self._ahead)
        if int(rows.max()) >= self.vocab_size:
            return [self[index] for index in indices]  # which says where that token is
        length = self.max_length
        inputs, ahead = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :length], rows[:, -length:]))
        return Stacked((inputs, ahead) if self._ahead else {"input_ids": inputs, "labels": ahead})

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the position of a sample's first token, and T."""
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        if self._documents is not None:
            return self._documents[index]
        number = index if self._part is None else self._held_out.place(index, self._part)
        return number * self.max_length, self.max_length


def _chosen(
    split: str, files: str | Sequence[str], evaluation_files: str | Sequence[str] | None, dtype: str
) -> tuple[Found, str | None]:
    """Returns the files of a split, and the part of their samples that it has; None for all of them."""
    found = find(files, "data.files", dtype)
    named, vocab_size = found.evaluation_files, found.vocab_size
    if evaluation_files is not None:
        other = find(evaluation_files, "data.evaluation_files", dtype)
        # Of one folder for both, those that are named so.
        named, vocab_size = other.evaluation_files or other.files, other.vocab_size or vocab_size
    by_key = {"data.files": found.files, "data.evaluation_files": named}
    require_named_once({key: [file.path for file in some] for key, some in by_key.items()})
    if not named:
        return found, split
    return (Found(named, [], vocab_size) if split == EVALUATION else found), None


def _required(vocab_size: int | None) -> int:
    if vocab_size is None:
        raise UserError(
            "data.vocab_size must be given, as the files don't say it: the number of the tokenizer's tokens (50257 for "
            "GPT-2's). Folders that distaccum.data.tokenize has made say it."
        )
    return vocab_size


def _check_dtype(tokens: Tokens) -> None:
    """Refuses uint32 tokens that are read as uint16: every other one is 0.

    Raises:
        UserError: names the file.
    """
    for number, file in enumerate(tokens.files[:1]):
        some = tokens.part(number, 0, min(file.count, _LOOKED_AT))
        if some.itemsize == 2 and len(some) >= _LEAST and some[::2].any() and not some[1::2].any():
            raise UserError(
                f"every other token of {file.path} is 0: it may have been written as uint32. Set data.dtype=uint32."
            )
