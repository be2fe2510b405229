"""Chat templates: conversations as text, and the parts of it that the model writes.

A template is Jinja, as in the Hugging Face format. It may mark what the model writes by
`{% generation %}` ... `{% endgeneration %}`. In others, an answer is what a template
adds to the text that asks for it.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
ASSISTANT = "assistant"
# Code points that are no characters. They stand around what the model writes.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

# The day that templates write into what is learnt: a run that is resumed on another day
# reads the same text.
DAY = datetime(2024, 7, 26)

# A role, a content, and what else a template uses.
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A text, and the parts of it that the model learns to write.

    Attributes:
      text: the text.
      spans: the first character of each part, and the one after its last.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Chat:
    """How conversations become text.

    Attributes:
      template: the chat template; None if there is none.
      special: texts of special tokens by their names, such as "eos_token".
      source: the file or folder of the template, for errors.
    """

    template: str | None = None
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""

    @classmethod
    def of(cls, folder: Path | None, template: Path | None = None) -> "Chat":
        """Reads the template and the special tokens.

        Args:
          folder: the folder with the tokenizer's files, if there is one.
          template: a file with a chat template, instead of the folder's own.

        Raises:
          ValueError: a file cannot be read.
        """
        settings = {} if folder is None else read_object(folder / TOKENIZER)
        special = _special(settings)
        if template is not None:
            return cls(_text(template), special, str(template))
        return cls(_template(folder, settings), special, str(folder))

    def prompt(self, messages: Sequence[Message]) -> str:
        """Renders a conversation up to the start of the model's turn.

        Raises:
          ValueError: there is no chat template, or it refuses the conversation.
          ImportError: Jinja is not installed.
        """
        return self._rendered(messages, True, today=datetime.now()).text

    def lessons(
        self,
        messages: Sequence[Message],
        tools: object = None,
        ends: Sequence[str] = (),
    ) -> list[Rendered]:
        """Renders a conversation for training on the assistant's turns.

        If the template marks what the model writes, its marks are used. Otherwise an
        answer, with the end of its turn, is what follows the prompt that asks for it.
        Some templates write an earlier turn differently once another follows it (Qwen3
        drops its thoughts). Each answer is then a text of its own, as it is in
        generation, after the conversation before it.

        Args:
          messages: the conversation.
          tools: the tools that the template describes; None is none.
          ends: texts of the tokens that may end a turn. The model stops at one, so the
            spaces that a template adds after it are not part of the answer.

        Raises:
          ValueError: there is no chat template, it refuses the conversation, or it does
            not continue its own prompts.
          ImportError: Jinja is not installed.
        """
        whole = self._rendered(messages, False, tools)
        if whole.spans:
            return [whole]
        answers = list(self._answers(messages, tools, tuple(ends)))
        texts = [whole.text.startswith(answer.text) for answer in answers]
        if not all(texts):
            return answers
        spans = tuple(span for answer in answers for span in answer.spans)
        return [Rendered(whole.text, spans)]

    def answer(
        self,
        messages: Sequence[Message],
        tools: object = None,
        ends: Sequence[str] = (),
    ) -> Rendered:
        """Renders a conversation for training on its last message only.

        The part is found as in `lessons`, and the arguments and errors are those. Of a
        template's marks, the last one counts.

        Args:
          messages: the conversation, whose last message is the assistant's.
          tools: the tools that the template describes; None is none.
          ends: texts of the tokens that may end a turn.
        """
        whole = self._rendered(messages, False, tools)
        if whole.spans:
            return Rendered(whole.text, whole.spans[-1:])
        return self._last(messages, tools, tuple(ends))

    def _answers(
        self, messages: Sequence[Message], tools: object, ends: tuple[str, ...]
    ) -> Iterator[Rendered]:
        """Yields the text up to each assistant's turn, whose part is that turn."""
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            yield self._last(messages[: number + 1], tools, ends)

    def _last(
        self, messages: Sequence[Message], tools: object, ends: tuple[str, ...]
    ) -> Rendered:
        """The text up to the last message, the assistant's, whose part is that."""
        prompt = self._rendered(messages[:-1], True, tools).text
        text = self._rendered(messages, False, tools).text
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template of {self.source} does not continue its own "
                f"prompt at message {len(messages)}, so it is not known which part is "
                "the assistant's: mark it by {% generation %} in a copy of the "
                "template, and give that by --data.chat-template"
            )
        short = text.rstrip()
        end = len(short if short.endswith(ends) else text)
        return Rendered(text, ((len(prompt), end),))

    def _rendered(
        self,
        messages: Sequence[Message],
        asks: bool,
        tools: object = None,
        today: datetime = DAY,
    ) -> Rendered:
        """Applies the template; `asks` adds the start of the model's turn."""
        if self.template is None:
            raise ValueError(
                "the model has no chat template: give --chat-template FILE to "
                "train.generate, or --data.chat-template FILE to train"
            )
        for message in messages:
            content = message.get("content")
            if isinstance(content, str) and (_OPEN in content or _CLOSE in content):
                raise ValueError(
                    f"a message has {_OPEN!r} or {_CLOSE!r}, which are no characters"
                )
        options = {} if tools is None else {"tools": tools}
        try:
            import jinja2
        except ImportError as error:
            raise ImportError(
                f"{error}: conversations need pip install '.[train]'"
            ) from None
        try:
            marked = _compiled(self.template).render(
                messages=list(messages),
                add_generation_prompt=asks,
                strftime_now=today.strftime,
                **options,
                **self.special,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses: {error}") from None
        return _unmarked(marked)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> "jinja2.Template":
    """Compiles a template, with what templates of the format expect around them."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block `{% generation %}`, which marks what is inside."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, after = (
                nodes.Output([nodes.TemplateData(mark)], lineno=line)
                for mark in (_OPEN, _CLOSE)
            )
            return [before, *body, after]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _unmarked(marked: str) -> Rendered:
    """Takes the marks out of a rendering, and returns where they were."""
    first, *parts = marked.split(_OPEN)
    texts, spans, at = [first], [], len(first)
    for part in parts:
        inside, closed, after = part.partition(_CLOSE)
        if not closed or _CLOSE in after:
            raise ValueError("the chat template has a generation block inside another")
        spans.append((at, at + len(inside)))
        texts += [inside, after]
        at += len(inside) + len(after)
    return Rendered("".join(texts), tuple(spans))


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object, empty if the file does not exist.

    Raises:
      ValueError: it cannot be read, or is not an object.
    """
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


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
