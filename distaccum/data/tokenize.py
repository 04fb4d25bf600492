"""Makes files of tokens of texts: `python -m distaccum.data.tokenize FILES… --tokenizer NAME --out FOLDER`."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from distaccum.data.language.tokenization import load_tokenizer, shown
from distaccum.data.rows.tables import rows_of
from distaccum.data.storage.files import list_files, require_named_once, size_and_version
from distaccum.data.tokens.token_folder import Batch, TokenFolder
from distaccum.errors import EXIT_INTERRUPTED, EXIT_STATUS, UserError, listed, require
from distaccum.runtime.cache import fingerprint
from distaccum.runtime.files import without_tilde
from distaccum.runtime.logs import console, flush_output, make_output_safe, print_error
from distaccum.runtime.processes import signal_when_parent_ends

_FORM = 1
_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 1000, 1 << 20
_FIRST_TOO_LARGE = 1 << 16


@dataclass(frozen=True, slots=True)
class Encoder:
    """Makes tokens of texts, each with the end token behind it, unless it ends so already."""

    tokenizer: Any
    end_token: int
    dtype: str

    def __call__(self, texts: list[str]) -> Batch:
        found = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        ended = [tokens if tokens[-1:] == [self.end_token] else [*tokens, self.end_token] for tokens in found]
        lengths = np.array([len(tokens) for tokens in ended], np.int64)
        return np.fromiter(itertools.chain(*ended), self.dtype, int(lengths.sum())), lengths


def tokenize(
    files: str | Sequence[str],
    tokenizer: str,
    out: str | os.PathLike[str],
    *,
    column: str = "text",
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    end_token: int | None = None,
) -> str:
    """Writes the tokens of all rows of files into a folder, for `data=tokens`.

    The folder gets files `tokens-00000.npy`, …, each up to the end of the document that fills it, beside each a file
    that says where documents end, and an `index.json`, which says what is complete. Stopped at any moment, the same
    call goes on behind the last complete file. What it writes depends neither on that nor on the number of workers.

    Args:
        files: as for `rows_of`.
        tokenizer: a folder that holds one, or a name on the Hugging Face hub.
        out: the folder, which is made.
        column: name of the column with the texts.
        workers: processes; None for one on each processor.
        shard_tokens: least number of tokens in a file, but for the last one. One file is held in memory.
        end_token: comes behind each document. None: the tokenizer's own.

    Returns:
        What the folder holds, in numbers.

    Raises:
        UserError: an argument doesn't fit, a file can't be read or written, or the folder holds something else.
    """
    for name, number in {"workers": workers, "shard-tokens": shard_tokens}.items():
        require(number is None or number >= 1, f"--{name}={number} is impossible: it must be at least 1.")
    folder = without_tilde(os.fspath(out))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it is the processes that are parallel
    loaded = load_tokenizer(tokenizer, key="--tokenizer")
    end = loaded.eos_token_id if end_token is None else end_token
    require(
        end is not None and 0 <= end < len(loaded),
        f"--end-token={end} must be one of the {len(loaded)} tokens of the tokenizer. Give it by --end-token.",
    )
    encoder = Encoder(loaded, end, "uint16" if len(loaded) <= _FIRST_TOO_LARGE else "uint32")
    wanted = {
        "files": _identities(files),
        "column": column,
        "tokenizer": fingerprint(loaded.get_vocab()),
        "end_token": end,
        "shard_tokens": shard_tokens,
        "form": _FORM,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder):
            output = TokenFolder(folder, wanted, {"vocab_size": len(loaded), "dtype": encoder.dtype})
            if not output.index["complete"]:
                texts = _batches(files, column, output.documents)
                output.write(_encoded(texts, encoder, workers or len(os.sched_getaffinity(0))), shard_tokens)
            return output.summary()
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror or error}. The same command goes on.") from error


def _identities(files: str | Sequence[str]) -> list[list[Any]]:
    """Returns path, size and version of each file."""
    paths = list_files(files, "FILES")
    require_named_once({"FILES": paths})
    return [[path, *size_and_version(path)] for path in paths]


def _batches(files: str | Sequence[str], column: str, done: int) -> Iterator[list[str]]:
    """Yields the texts of rows behind the first `done`, many at a time."""
    texts: list[str] = []
    characters = 0
    for place, row in itertools.islice(rows_of(files, "FILES"), done, None):
        text = row.get(column)
        if not isinstance(text, str):
            raise UserError(
                f"{place}: {column} is {shown(text)}, and must be a text. "
                f"The columns are {listed(sorted(map(str, row)), 8) or 'none'}: name one by --column."
            )
        texts.append(text)
        characters += len(text)
        if len(texts) >= _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _encoded(batches: Iterable[list[str]], encoder: Encoder, workers: int) -> Iterator[Batch]:
    """Yields the tokens of each batch, in their order; a few are made ahead.

    Raises:
        UserError: a worker has been killed.
    """
    if workers == 1:
        yield from map(encoder, batches)
        return
    ahead: deque[Future[Batch]] = deque()
    fork = multiprocessing.get_context("fork")  # with the tokenizer, which takes seconds to import and load
    pool = ProcessPoolExecutor(workers, fork, _begin_worker, (encoder,))
    try:
        for batch in batches:
            ahead.append(pool.submit(_encode, batch))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        if sys.version_info < (3, 11, 5):
            # Else the thread that hands out work may write into a pipe that nobody reads, and be waited for without end
            # (python/cpython#94777). Later versions close it themselves, and mustn't find it closed.
            with suppress(AttributeError, OSError):
                pool._call_queue._reader.close()  # type: ignore[attr-defined]
        raise UserError(
            "a worker process was killed, perhaps for want of memory. Set fewer --workers; the same command goes on."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder
"""That of a worker process."""


def _begin_worker(encoder: Encoder) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    signal_when_parent_ends(signal.SIGKILL)
    _encoder = encoder


def _encode(texts: list[str]) -> Batch:
    return _encoder(texts)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to the folder."""
    with (folder / ".lock").open("ab") as file:
        try:
            # Not flock, which workers would inherit, and hold for a while after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another process writes to {folder}. Wait for it, or give another --out.") from error
        yield


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print_error(f"{message}. Write: {self.prog} FILES… --tokenizer NAME --out FOLDER; --help shows all.")
        sys.exit(EXIT_STATUS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exit status: 0, 2 for bad input, or 130 after Ctrl-C."""
    make_output_safe()
    try:
        console.print(tokenize(**vars(command_line().parse_args(arguments))))
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        print_error("interrupted; the same command goes on")
        sys.exit(EXIT_INTERRUPTED)
    finally:
        flush_output()


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments, which are those of `tokenize`."""
    parser = _Parser(
        "python -m distaccum.data.tokenize",
        description="Writes the tokens of texts into a folder, for data=tokens: in parallel, the same files for any "
        "number of workers. Stopped at any moment, the same command goes on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    kinds = ".jsonl, .json, .csv, .parquet, .txt, or a folder that save_to_disk of datasets has written"
    add("files", nargs="+", metavar="FILES", help=f"paths or patterns: {kinds}")
    add("--tokenizer", required=True, metavar="NAME", help="folder that holds it, or its name on the Hugging Face hub")
    add("--out", required=True, metavar="FOLDER", help="where to write; give it as data.files")
    add("--column", default="text", help="column with the texts (default: text)")
    add("--workers", type=int, metavar="N", help="processes (default: one on each processor)")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a file (default: 100 million)")
    add("--end-token", type=int, metavar="N", help="comes behind each document (default: the tokenizer's own)")
    return parser


if __name__ == "__main__":
    main()
