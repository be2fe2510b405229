"""Text in and out of a model: prompts, ends of texts, and chat templates."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from train.data.vocabulary import Vocabulary
from train.source import Source

GENERATION, TOKENIZER, TEMPLATE = (
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How text goes into a model and comes out.

    Attributes:
      vocabulary: text to token ids and back.
      ends: ids of the tokens that end a text or a turn.
      defaults: the sampling options of generation_config.json: temperature, top_k and
        top_p, where it has them.
      template: the chat template, in Jinja; None if there is none.
      special: texts of special tokens by their names, for the template.
    """

    vocabulary: Vocabulary
    ends: frozenset[int]
    defaults: Mapping[str, Any]
    template: str | None
    special: Mapping[str, str]

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
        generation, settings = (
            {} if folder is None else _read(folder / name)
            for name in (GENERATION, TOKENIZER)
        )
        model = {} if source.run is not None else _read(source.path / "config.json")
        special = _special(settings)
        given = generation.get("eos_token_id", model.get("eos_token_id"))
        ends = {*_ids(given), *vocabulary.around()[1]}
        if vocabulary.tokenizer is not None and "eos_token" in special:
            end = vocabulary.tokenizer.token_to_id(special["eos_token"])
            ends |= set(_ids(end))
        names = ("temperature", "top_k", "top_p")
        defaults = {name: generation[name] for name in names if generation.get(name)}
        text = _text(template) if template is not None else _template(folder, settings)
        return cls(vocabulary, frozenset(ends), defaults, text, special)

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
        text = self.render(messages)
        return self.vocabulary.encode(text.encode(), special=False)

    def render(self, messages: Sequence[Message]) -> str:
        """Applies the chat template, up to the start of the model's turn.

        Raises:
          ValueError: there is no chat template, or it refuses the conversation.
          ImportError: Jinja is not installed.
        """
        if self.template is None:
            raise ValueError(
                "chat=True: the model has no chat template: give --chat-template FILE"
            )
        try:
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(f"{error}: --chat needs pip install '.[train]'") from None
        # What templates of the format expect of their environment.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.template).render(
                messages=list(messages), add_generation_prompt=True, **self.special
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing if the file does not exist."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"chat_template={path} cannot be read: {error}") from None


def _template(folder: Path | None, settings: Mapping[str, Any]) -> str | None:
    if folder is None:
        return None
    if (folder / TEMPLATE).exists():
        return _text(folder / TEMPLATE)
    own = settings.get("chat_template")
    if isinstance(own, list):
        # Several by name.
        named = {entry["name"]: entry["template"] for entry in own}
        own = named.get("default")
    return own


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens; some files have them as objects."""
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [x for x in values if isinstance(x, int)]


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
