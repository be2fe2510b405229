"""Conversations and completions from JSON lines, as documents with a mask.

A line has `messages`, which a chat template renders, and the assistant's turns are
learnt; or it has `prompt` and `completion`, and the completion is learnt, with the
token that ends a text.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.chat_template import Chat, Rendered
from train.data.corpus import Lesson, hash_of
from train.data.documents import Record, in_groups, json_records
from train.data.vocabulary import Vocabulary

TEXT, MESSAGES, COMPLETION = "text", "messages", "completion"
# The fields of a line that show its form.
FIELDS: dict[str, tuple[str, ...]] = {
    MESSAGES: ("messages",),
    COMPLETION: ("prompt", "completion"),
}
FORMS = (TEXT, *FIELDS)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Makes lessons of records.

    Attributes:
      vocabulary: text to token ids.
      chat: how conversations become text.
    """

    vocabulary: Vocabulary
    chat: Chat

    def lessons(self, files: Sequence[Path], form: str) -> Iterator[Lesson]:
        """Iterates over the lessons of files.

        Args:
          files: .jsonl files, read in this order.
          form: one of `FIELDS`.

        Raises:
          ValueError: while reading, for a line that has another form, no answer, or a
            conversation that the template refuses; it names the file and the line.
        """
        rendered = self._messages if form == MESSAGES else self._completion
        begin, end = self._around() if form == COMPLETION else ([], [])
        texts = self._texts(files, rendered)
        for group in in_groups(texts, lambda x: len(x[0].text)):
            encoded = self.vocabulary.encode_spans([text.text for text, _ in group])
            for (text, key), (ids, first, last) in zip(group, encoded, strict=True):
                learnt = np.zeros(ids.size, bool)
                for start, stop in text.spans:
                    learnt |= (first < stop) & (last > start)
                yield _surrounded(ids, learnt, begin, end, key)

    def _texts(
        self,
        files: Sequence[Path],
        rendered: Callable[[dict[str, Any]], list[Rendered]],
    ) -> Iterator[tuple[Rendered, int]]:
        """Yields the texts of each line, with a hash of all that it has."""
        for file in files:
            if file.suffix != ".jsonl":
                raise ValueError(
                    f"{file} is not a .jsonl file: conversations and completions are "
                    "read from JSON lines"
                )
            for record in json_records(file):
                try:
                    texts = rendered(record.content)
                except ValueError as error:
                    raise ValueError(f"{record.place} {error}") from error
                key = hash_of(texts[-1].text.encode(errors="replace"))
                yield from ((text, key) for text in texts)

    def _messages(self, content: dict[str, Any]) -> list[Rendered]:
        messages = content.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f"has no list of messages in 'messages', only {sorted(content)}"
            )
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(
                message.get("role"), str
            ):
                raise ValueError(
                    f"has a message without a role: message {number} is {message!r:.80}"
                )
        ends = self.vocabulary.special
        found = self.chat.lessons(messages, content.get("tools"), ends)
        if not any(stop > start for x in found for start, stop in x.spans):
            raise ValueError(
                "has no answer to learn: no message with the role 'assistant' has text"
            )
        return found

    def _completion(self, content: dict[str, Any]) -> list[Rendered]:
        prompt, completion = content.get("prompt"), content.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(
                f"has no texts in 'prompt' and 'completion', only {sorted(content)}"
            )
        if not completion:
            raise ValueError("has an empty completion: there is nothing to learn")
        span = len(prompt), len(prompt) + len(completion)
        return [Rendered(prompt + completion, (span,))]

    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that begin a text, and those that end it."""
        before, after = self.vocabulary.around()
        tokenizer, end = self.vocabulary.tokenizer, self.chat.special.get("eos_token")
        if not after and tokenizer is not None and end is not None:
            id_ = tokenizer.token_to_id(end)
            after = [] if id_ is None else [id_]
        return before, after


def form_of(files: Sequence[Path], text_field: str) -> str:
    """Returns the form of the first line of JSON in files, one of `FORMS`.

    Raises:
      ValueError: the line has the fields of several forms.
    """
    first = next(_records(files), None)
    if first is None:
        return TEXT
    fields = {TEXT: (text_field,), **FIELDS}
    found = [form for form, names in fields.items() if set(names) <= set(first.content)]
    if len(found) > 1:
        raise ValueError(
            f"{first.place} has the fields of {' and '.join(found)}: give --data.form, "
            "one of the two"
        )
    # A line without any of the fields is reported when it is read.
    return found[0] if found else TEXT


def _records(files: Sequence[Path]) -> Iterator[Record]:
    for file in files:
        if file.suffix == ".jsonl":
            yield from json_records(file)


def _surrounded(
    ids: np.ndarray,
    learnt: np.ndarray,
    begin: Sequence[int],
    end: Sequence[int],
    key: int,
) -> Lesson:
    """A document with the tokens around it, of which those at the end are learnt."""
    tokens = np.concatenate([np.asarray(begin), ids, np.asarray(end)])
    mask = np.concatenate([np.zeros(len(begin)), learnt, np.ones(len(end))])
    return Lesson(tokens.astype(np.int32), mask.astype(bool), key)
