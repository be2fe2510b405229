"""Conversations, completions and pairs of answers, as documents with a mask.

A line of JSON has `messages`, which a chat template renders, and the assistant's turns
are learnt; or it has `prompt` and `completion`, and the completion is learnt, with the
token that ends a text; or it has `prompt`, `chosen` and `rejected`, and becomes two
documents, of the prompt with either answer, of which only the answers count.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.chat_template import ASSISTANT, Chat, Message, Rendered
from train.data.corpus import Lesson, hash_of
from train.data.documents import Record, in_groups, json_records
from train.data.vocabulary import Vocabulary

TEXT, MESSAGES, COMPLETION, PAIRS = "text", "messages", "completion", "pairs"
SIDES = ("chosen", "rejected")
# The fields of a line that show its form.
FIELDS: dict[str, tuple[str, ...]] = {
    MESSAGES: ("messages",),
    COMPLETION: ("prompt", "completion"),
    PAIRS: ("prompt", *SIDES),
}
FORMS = (TEXT, *FIELDS)


class _Text(NamedTuple):
    """A text that is learnt in part.

    Attributes:
      rendered: the text and its parts.
      is_plain: whether no template made it, so that it lacks the tokens around a text.
      key: a hash that all texts of a line share.
    """

    rendered: Rendered
    is_plain: bool
    key: int


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
          form: one of `FIELDS`. Of pairs, the lesson with the chosen answer is followed
            by that with the rejected one.

        Raises:
          ValueError: while reading, for a line that has another form, no answer, or a
            conversation that the template refuses; it names the file and the line.
        """
        around = self._around()
        texts = self._texts(files, form)
        for group in in_groups(texts, lambda x: len(x.rendered.text)):
            encoded = self.vocabulary.encode_spans([x.rendered.text for x in group])
            for text, (ids, first, last) in zip(group, encoded, strict=True):
                learnt = np.zeros(ids.size, bool)
                for start, stop in text.rendered.spans:
                    learnt |= (first < stop) & (last > start)
                begin, end = around if text.is_plain else ([], [])
                yield _surrounded(ids, learnt, begin, end, text.key)

    def _texts(self, files: Sequence[Path], form: str) -> Iterator[_Text]:
        """Yields the texts of each line."""
        forms: dict[str, Callable[[dict[str, Any]], list[Rendered]]] = {
            MESSAGES: self._messages,
            COMPLETION: self._completion,
            PAIRS: self._pair,
        }
        for file in files:
            if file.suffix != ".jsonl":
                raise ValueError(
                    f"{file} is not a .jsonl file: conversations, completions and "
                    "pairs of answers are read from JSON lines"
                )
            for record in json_records(file):
                try:
                    texts = forms[form](record.content)
                except ValueError as error:
                    raise ValueError(f"{record.place} {error}") from error
                key = hash_of(texts[-1].text.encode(errors="replace"))
                is_plain = form != MESSAGES and isinstance(
                    record.content["prompt"], str
                )
                yield from (_Text(text, is_plain, key) for text in texts)

    def _messages(self, content: dict[str, Any]) -> list[Rendered]:
        messages = content.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f"has no list of messages in 'messages', only {sorted(content)}"
            )
        _check_roles(messages)
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
        return [_completed(prompt, completion)]

    def _pair(self, content: dict[str, Any]) -> list[Rendered]:
        """The prompt with the chosen answer, and with the rejected one."""
        fields: list[Any] = [content.get(name) for name in FIELDS[PAIRS]]
        prompt, *answers = fields
        if not all(x and isinstance(x, str) for x in fields) and not all(
            x and isinstance(x, list) for x in fields
        ):
            raise ValueError(
                "needs three texts, or lists of messages, in 'prompt', 'chosen' and "
                f"'rejected', none of them empty; it has {sorted(content)}"
            )
        if isinstance(prompt, str):
            return [_completed(prompt, answer) for answer in answers]
        return [
            self._answered(prompt, answer, name, content.get("tools"))
            for name, answer in zip(SIDES, answers, strict=True)
        ]

    def _answered(
        self,
        prompt: list[Message],
        answer: list[Message],
        name: str,
        tools: object,
    ) -> Rendered:
        messages = [*prompt, *answer]
        _check_roles(messages)
        if len(answer) > 1 or answer[0]["role"] != ASSISTANT:
            raise ValueError(
                f"has {len(answer)} messages in {name!r}, the first with the role "
                f"{answer[0]['role']!r}: it must be one message with the role "
                f"{ASSISTANT!r}, and those before it belong in 'prompt'"
            )
        found = self.chat.answer(messages, tools, self.vocabulary.special)
        if not any(stop > start for start, stop in found.spans):
            raise ValueError(f"has an answer without text in {name!r}")
        return found

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


def _completed(prompt: str, completion: str) -> Rendered:
    """A prompt and its completion, which is learnt."""
    return Rendered(prompt + completion, ((len(prompt), len(prompt + completion)),))


def _check_roles(messages: Sequence[object]) -> None:
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"has a message without a role: message {number} is {message!r:.80}"
            )


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
