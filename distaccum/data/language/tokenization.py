"""Makes tokens of texts, prompts and chats, and says which of them a loss counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distaccum.errors import UserError, listed
from distaccum.runtime.cache import fingerprint
from distaccum.runtime.torchvision_operators import tolerate_missing_operators

Tokens = list[int]
Marked = tuple[Tokens, list[bool]]
"""Tokens, and for each whether the loss counts it."""
ASSISTANT = "assistant"
COLUMNS = ("messages", "prompt", "completion", "text")
FORMS = ("messages", "prompt", "text")
"""The columns by which a row's form is recognised, in this order."""


def load_tokenizer(name: str, chat_template: str | None = None, key: str = "data.tokenizer") -> Any:
    """Loads a tokenizer of transformers, from a folder or by its name on the hub.

    Args:
        chat_template: a file with a Jinja template, in place of the tokenizer's own.
        key: configuration key, for messages.

    Raises:
        UserError: it can't be loaded.
    """
    tolerate_missing_operators()
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f'{key} needs transformers, which is missing: pip install "distaccum[hf]".') from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds, by the tokenizer's
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{key}={name} can't be loaded: {reason}. Give a folder that holds one, or a name on the Hugging Face hub."
        ) from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"data.chat_template={chat_template} can't be read: {error}.") from error
    return tokenizer


def identity_of(tokenizer: Any) -> str:
    """Returns a hash of all that a tokenizer's answers depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else [sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
    more = [type(tokenizer).__name__, str(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return fingerprint([rules, *more])


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Makes tokens of rows.

    A row with `messages` goes through the tokenizer's chat template; one with `prompt` and `completion` is the tokens
    of the prompt, those of the completion and the end token, each tokenised by itself, as the prompt will be when the
    model is used; these two may be lists of messages too. One with `text` is its tokens and the end token.

    Attributes:
        columns: names of the columns that are called otherwise, by the names here.
        counts_all: the loss counts every token, instead of those of completions and of the assistant's messages alone
            (of texts it always counts every one).
    """

    tokenizer: Any
    columns: Mapping[str, str]
    counts_all: bool = False

    def tokens_of(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Marked]]:
        """Yields the form of each row (of `FORMS`), and its tokens, the loss counting those that are marked.

        Args:
            rows: with their places, for messages. All texts of a call are tokenised together.

        Raises:
            UserError: a row has none of the forms, or the template can't be applied to it or tell what is whose.
        """
        forms = [self._form(place, row) for place, row in rows]
        texts = [
            self._value(place, row, "text") for (place, row), form in zip(rows, forms, strict=True) if form == "text"
        ]
        tokenized = iter(self._encode(texts)) if texts else iter(())
        for (place, row), form in zip(rows, forms, strict=True):
            if form == "text":
                tokens = self._ended(next(tokenized))
                yield form, (tokens, [True] * len(tokens))
            elif form == "prompt":
                yield form, self._prompt(place, row)
            else:
                yield form, self._chat(place, self._messages(place, row, "messages"))

    def _form(self, place: str, row: Mapping[str, Any]) -> str:
        found = next((form for form in FORMS if self.columns.get(form, form) in row), None)
        if found is None:
            raise UserError(
                f"{place} has the columns {listed(sorted(map(str, row)), 8) or 'none'}. It needs messages, or prompt "
                "and completion, or text; name yours as in data.columns={prompt:question,completion:answer}."
            )
        return found

    def _value(self, place: str, row: Mapping[str, Any], name: str, kinds: Any = str) -> Any:
        column = self.columns.get(name, name)
        value = row.get(column)
        if not isinstance(value, kinds):
            raise UserError(f"{place}: {column} is {shown(value)}, and must be a text.")
        return value

    def _messages(self, place: str, row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
        value = self._value(place, row, name, (list, tuple))
        if not value or not all(isinstance(entry, Mapping) and "role" in entry for entry in value):
            raise UserError(
                f"{place}: {self.columns.get(name, name)} must be a list of messages with role and content."
            )
        return list(value)

    def _encode(self, texts: list[str], **options: Any) -> list[Tokens]:
        found: list[Tokens] = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
        return found

    def _ended(self, tokens: Tokens) -> Tokens:
        """Appends the end token, unless it is there; a tokenizer without one says nowhere that a text is over."""
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]

    def _prompt(self, place: str, row: Mapping[str, Any]) -> Marked:
        prompt = self._value(place, row, "prompt", (str, list, tuple))
        if not isinstance(prompt, str):
            before = self._messages(place, row, "prompt")
            return self._chat(place, [*before, *self._messages(place, row, "completion")], first=len(before))
        completion = self._value(place, row, "completion")
        before_tokens = self._encode([prompt])[0]
        end = self.tokenizer.eos_token_id
        if end is not None and before_tokens[-1:] == [end]:
            del before_tokens[-1]  # of a tokenizer that ends every text
        after = self._ended(self._encode([completion], add_special_tokens=False)[0])
        return [*before_tokens, *after], [self.counts_all] * len(before_tokens) + [True] * len(after)

    def _chat(self, place: str, messages: Sequence[Mapping[str, Any]], first: int = 0) -> Marked:
        """Returns the tokens of a conversation; the loss counts those of the assistant's messages from `first` on."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{place} has messages, and the tokenizer has no chat template. Give a file with one by "
                "data.chat_template, or rows with prompt and completion."
            )
        tokens, counted = self._templated(place, messages)
        if self.counts_all:
            return tokens, counted
        if "generation %}" in self.tokenizer.chat_template and not first:
            return self._templated(place, messages, marks=True)
        marks = [False] * len(tokens)
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT and number >= first:
                start = self._length(place, tokens, messages[:number], opens=True)
                stop = self._length(place, tokens, messages[: number + 1])
                marks[start:stop] = [True] * (stop - start)
        return tokens, marks

    def _length(self, place: str, tokens: Tokens, messages: Sequence[Any], *, opens: bool = False) -> int:
        """Returns how many of a conversation's tokens its first messages are.

        Args:
            opens: with what begins the assistant's answer.
        """
        if not messages:
            raise UserError(f"{place}: the first message is the assistant's, and answers nothing. Leave it out.")
        part, _ = self._templated(place, messages, opens=opens)
        if tokens[: len(part)] != part:
            raise UserError(
                f"{place}: the chat template writes the first {len(messages)} messages otherwise when more follow, so "
                "that it can't be said which tokens are the assistant's. Give a template that marks them with "
                "{% generation %} by data.chat_template, rows with one answer each, or data.loss_on=all."
            )
        return len(part)

    def _templated(self, place: str, messages: Sequence[Any], *, opens: bool = False, marks: bool = False) -> Marked:
        try:
            found = self.tokenizer.apply_chat_template(
                list(messages), return_dict=True, add_generation_prompt=opens, return_assistant_tokens_mask=marks
            )
        except Exception as error:  # a template raises what it likes
            raise UserError(f"{place}: the chat template can't be applied: {type(error).__name__}: {error}.") from error
        tokens = list(found["input_ids"])
        return tokens, [bool(mark) for mark in found["assistant_masks"]] if marks else [True] * len(tokens)


def shown(value: Any) -> str:
    """Says in a message what a row has in place of a text."""
    return "missing" if value is None else f"a {type(value).__name__}"
