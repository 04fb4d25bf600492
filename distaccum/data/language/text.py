"""Paragraphs of documentation, from Python's own standard library."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distaccum.data.splits import EVALUATION, check_split
from distaccum.errors import UserError
from distaccum.loaders.collate import PadCollate

IGNORE_INDEX = -100
"""Padding of the targets: the value that `torch.nn.functional.cross_entropy` ignores."""


class DocumentationText(Dataset[tuple[Tensor, Tensor]]):
    """The texts behind `help('topic')`, cut into paragraphs of very unequal lengths; bytes of UTF-8 are the tokens.

    The first byte of a paragraph is predicted from a newline, which precedes it in the document, so each byte of the
    text is the target of exactly one prediction. A paragraph of more than `max_length` bytes is cut into consecutive
    samples of `max_length` and a shorter last one; the first input of each is the last byte of the one before.

    Whole topics are held out, about a tenth of the text, chosen by their names alone. Some paragraphs are in several
    topics: each is taken once, and those of held-out topics are in no training sample.

    A sample is `(inputs, targets)`, both int64 `[T]` with 1 <= T <= max_length, the targets being one byte ahead.

    Args:
        split: `train` or `evaluation`.
        max_length: longest sample in bytes.

    Attributes:
        vocab_size: 256.
        max_length: as given.
        lengths: T of each sample.
        reference_losses: losses to compare with, in nats per byte. `unigram entropy`: the entropy of this split's own
            byte frequencies, which no model that ignores the context gets below.
        collate_fn: pads inputs with 0 and targets with -100, which the loss ignores.

    Raises:
        UserError: another split, or `max_length` below 1.
    """

    vocab_size = 256

    def __init__(self, split: str, max_length: int = 512) -> None:
        check_split(split, type(self).__name__)
        if max_length < 1:
            raise UserError(f"DocumentationText: max_length={max_length} is impossible: it must be at least 1.")
        self.max_length = max_length
        self.collate_fn = PadCollate((0, IGNORE_INDEX))
        encoded = [paragraph.encode() for paragraph in paragraphs(split)]
        self._starts: list[int] = []
        self.lengths: list[int] = []
        end = 0
        for text in encoded:
            for start, stop in cut(len(text), max_length):
                self._starts.append(end + start)
                self.lengths.append(stop - start)
            end += 1 + len(text)
        # Each paragraph with its newline in front: a sample's inputs are a slice, its targets the slice one further.
        self._bytes = torch.frombuffer(bytearray(b"".join(b"\n" + text for text in encoded)), dtype=torch.uint8)
        self.reference_losses = {"unigram entropy": _byte_entropy(b"".join(encoded))}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start, length = self._starts[index], self.lengths[index]
        piece = self._bytes[start : start + length + 1].long()
        return piece[:-1], piece[1:]


def paragraphs(split: str) -> list[str]:
    """Returns the different paragraphs of one split, stripped and not empty, by topic in alphabetical order."""
    from pydoc_data.topics import topics  # half a megabyte, imported only when needed

    held_out: dict[str, None] = {}  # a dict keeps the order; a set would not
    others: dict[str, None] = {}
    for name in sorted(topics):
        texts = (text.strip() for text in topics[name].split("\n\n"))
        (held_out if is_held_out(name) else others).update((text, None) for text in texts if text)
    return list(held_out) if split == EVALUATION else [text for text in others if text not in held_out]


def is_held_out(topic: str) -> bool:
    """Returns whether a topic belongs to the evaluation, which follows from its name, in each Python release alike."""
    return zlib.crc32(topic.encode()) % 10 == 1


def cut(length: int, max_length: int) -> Iterator[tuple[int, int]]:
    """Cuts a paragraph of `length` bytes into consecutive `(start, stop)` of at most `max_length`."""
    for start in range(0, length, max_length):
        yield start, min(start + max_length, length)


def _byte_entropy(text: bytes) -> float:
    """Returns the entropy of the frequencies of bytes, in nats per byte."""
    counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8), minlength=256).double()
    frequencies = counts / counts.sum()
    return float(torch.special.entr(frequencies).sum())
