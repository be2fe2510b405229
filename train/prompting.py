"""Text in and out of a model: prompts, ends of texts, and conversations."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.chat_template import Chat, Message, read_object
from train.data.vocabulary import Vocabulary
from train.source import Source

CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How text goes into a model and comes out.

    Attributes:
      vocabulary: text to token ids and back.
      ends: ids of the tokens that end a text or a turn.
      defaults: the sampling options of generation_config.json: temperature, top_k and
        top_p, where it has them.
      chat: how conversations become text.
    """

    vocabulary: Vocabulary
    ends: frozenset[int]
    defaults: Mapping[str, Any]
    chat: Chat

    @classmethod
    def of(cls, source: Source, template: Path | None = None) -> "Prompting":
        """Reads the tokenizer's files of a model.

        Args:
          source: the model.
          template: a file with a chat template, instead of the model's own.

        Raises:
          ValueError: there is no tokenizer, or a file is damaged.
        """
        vocabulary, folder = source.vocabulary(), source.folder
        generation = {} if folder is None else read_object(folder / GENERATION)
        model = {} if source.run is not None else read_object(source.path / CONFIG)
        chat = Chat.of(folder, template or source.template)
        given = generation.get("eos_token_id", model.get("eos_token_id"))
        ends = {*_ids(given), *vocabulary.around()[1]}
        if vocabulary.tokenizer is not None and "eos_token" in chat.special:
            end = vocabulary.tokenizer.token_to_id(chat.special["eos_token"])
            ends |= set(_ids(end))
        names = ("temperature", "top_k", "top_p")
        defaults = {name: generation[name] for name in names if generation.get(name)}
        return cls(vocabulary, frozenset(ends), defaults, chat)

    def encode(self, text: str) -> np.ndarray:
        """Encodes a prompt, int32 [P], with the tokens that begin a text.

        Raises:
          ValueError: it has no tokens.
        """
        ids = self.vocabulary.encode_start(text)
        if not ids.size:
            raise ValueError(f"prompt={text!r} has no tokens: give another")
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> np.ndarray:
        """Encodes a conversation and the start of the model's turn, int32 [P].

        Raises:
          ValueError: there is no chat template, or it refuses the conversation.
          ImportError: Jinja is not installed.
        """
        text = self.chat.prompt(messages)
        return self.vocabulary.encode(text.encode(), special=False)


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [x for x in values if isinstance(x, int)]
