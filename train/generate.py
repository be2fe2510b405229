"""`python -m train.generate RUN_OR_FOLDER PROMPT ...`: continues texts, or chats.

The model is that of a run's checkpoint or of a folder in the Hugging Face format, on
any mesh. Tokens are printed as they come.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from train.chat_template import Message
from train.config import MeshConfig
from train.prompting import Prompting
from train.source import Source
from train.words import check_no_empty_value, printable
from usp_jax.command_line import alive, readers_may_leave
from usp_jax.models.generate import stream
from usp_jax.models.llama import Llama
from usp_jax.models.sampling import check_sampling

# Prompts are padded to a power of two, so that a conversation seldom compiles anew.
SHORTEST = 64
# Sampling where neither the command nor generation_config.json says how.
TEMPERATURE = 0.7
# What a decoder writes for the bytes of an unfinished character.
UNFINISHED = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues texts with a trained model, or chats with it.

    Attributes:
      source: folder of a run of `python -m train`, or of a model in the Hugging Face
        format.
      prompts: texts to continue.
      file: files with further texts to continue, one each.
      chat: hold a conversation: each line of the input is a turn, answered with the
        model's chat template.
      system: system message that begins the conversation.
      chat_template: file with a chat template in Jinja; None is the model's own.
      length: maximum number of tokens to generate, for each prompt or answer.
      temperature: divides the logits, and 0 takes the most likely token; None is that
        of generation_config.json, or 0.7.
      top_k: sample only from this many most likely tokens; None is that of
        generation_config.json, or all.
      top_p: sample only from the most likely tokens that together have this
        probability; None is that of generation_config.json, or all.
      seed: seed of the samples.
      json: print a line of JSON for each prompt instead of text.
      step: step of the run's checkpoint; None is the newest.
      dtype: dtype of the computation, float32 or bfloat16; None is that of the run or
        of config.json.
      keep_weights: gather the weights once for all tokens; None does if a device's
        memory allows.
      mesh: devices along each mesh axis; all 1 is the mesh of the run, or a ring of all
        devices.
      fake_devices: use this many fake CPU devices; None is as in the run, and 0 is
        real devices.
    """

    source: tyro.conf.Positional[Path]
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    file: tuple[Path, ...] = ()
    chat: bool = False
    system: str | None = None
    chat_template: Path | None = None
    length: int = 200
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    json: bool = False
    step: int | None = None
    dtype: str | None = None
    keep_weights: bool | None = None
    mesh: MeshConfig = MeshConfig()
    fake_devices: int | None = None


@dataclasses.dataclass
class Answer:
    """The text of one row so far.

    Attributes:
      ids: its tokens, without the one that ends it.
      ended: whether a token has ended it.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The sampling options of `usp_jax.models.generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def of(
        cls, options: Generate, defaults: Mapping[str, Any], vocab_size: int
    ) -> "Drawing":
        """Chooses between the command's options and those of generation_config.json.

        Raises:
          ValueError: an option is out of range.
        """
        temperature, top_k, top_p = options.temperature, options.top_k, options.top_p
        if temperature is None:
            temperature = defaults.get("temperature", TEMPERATURE)
        if top_k is None and "top_k" in defaults:
            top_k = min(defaults["top_k"], vocab_size)
        if top_p is None:
            top_p = defaults.get("top_p")
        check_sampling(vocab_size, temperature, top_k, top_p)
        return cls(temperature, top_k, top_p)


class Speaker:
    """A model with its tokenizer and sampling options."""

    def __init__(
        self, options: Generate, model: Llama, prompting: Prompting, drawing: Drawing
    ):
        self._options, self._model, self._drawing = options, model, drawing
        self.prompting = prompting

    def answers(
        self, prompts: Sequence[np.ndarray], turn: int = 0
    ) -> Iterator[list[Answer]]:
        """Yields the texts after each new token; all prompts continue together.

        Args:
          prompts: token ids, int32 [P] each.
          turn: number of the turn, so that each draws other tokens.
        """
        longest = max(map(len, prompts))
        width = max(SHORTEST, 1 << (longest - 1).bit_length())
        tokens = np.stack([np.pad(x, (0, width - len(x))) for x in prompts])
        new = stream(
            self._model,
            jnp.asarray(tokens, jnp.int32),
            self._options.length,
            lengths=jnp.asarray([len(x) for x in prompts], jnp.int32),
            key=jax.random.fold_in(jax.random.key(self._options.seed), turn),
            temperature=self._drawing.temperature,
            top_k=self._drawing.top_k,
            top_p=self._drawing.top_p,
            keep_weights=self._options.keep_weights,
        )
        rows = [Answer() for _ in prompts]
        # Both programs are compiled before anything is printed.
        with alive("reading the prompt", on_stderr=True):
            first = list(islice(new, 2))
        for token in chain(first, new):
            for row, id_ in zip(rows, np.asarray(token).tolist(), strict=True):
                row.ended |= id_ in self.prompting.ends
                if not row.ended:
                    row.ids.append(id_)
            yield rows
            if all(row.ended for row in rows):
                return

    def text(self, answer: Answer, *, whole: bool) -> str:
        """The text of a row; unless `whole`, without an unfinished character."""
        text = self.prompting.vocabulary.decode(np.asarray(answer.ids, np.int32))
        return text if whole else text.rstrip(UNFINISHED)


def continue_texts(speaker: Speaker, texts: Sequence[str]) -> None:
    """Prints each text with its continuation, the first unfinished one as it grows."""
    prompts = [speaker.prompting.encode(text) for text in texts]
    printed, begun, rows = "", time.monotonic(), [Answer() for _ in texts]
    for rows in speaker.answers(prompts):
        printed = _print_more(printed, _so_far(speaker, texts, rows, done=False))
    _print_more(printed, _so_far(speaker, texts, rows, done=True) + "\n")
    seconds, count = time.monotonic() - begun, sum(len(row.ids) for row in rows)
    print(f"{count} tokens in {seconds:.1f} s, with compiling", file=sys.stderr)


def write_json(speaker: Speaker, texts: Sequence[str]) -> None:
    """Prints a line of JSON for each text, with its continuation."""
    prompts = [speaker.prompting.encode(text) for text in texts]
    (*_, rows) = speaker.answers(prompts)
    for prompt, row in zip(texts, rows, strict=True):
        text = speaker.text(row, whole=True)
        entry = {"prompt": prompt, "text": text, "tokens": len(row.ids)}
        print(json.dumps({**entry, "ended": row.ended}, ensure_ascii=False))


def _so_far(
    speaker: Speaker, texts: Sequence[str], rows: Sequence[Answer], *, done: bool
) -> str:
    """The texts up to the first unfinished one."""
    parts = []
    for number, row in enumerate(rows):
        whole = done or row.ended
        parts.append(_head(number, texts) + speaker.text(row, whole=whole))
        if not whole:
            break
    return "".join(parts)


def _head(number: int, texts: Sequence[str]) -> str:
    between = "\n\n" if number else ""
    name = f"== {number + 1}\n" if len(texts) > 1 else ""
    return f"{between}{name}{texts[number]}"


def _print_more(printed: str, text: str) -> str:
    """Prints what is new in a text, and returns the text."""
    new = text[len(printed) :]
    print(printable(new) if sys.stdout.isatty() else new, end="", flush=True)
    return text


def converse(speaker: Speaker, system: str | None) -> None:
    """Answers each line of the input, until it ends or Ctrl-C between answers."""
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    typed = sys.stdin.isatty()
    if typed:
        print("Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    for turn in range(sys.maxsize):
        try:
            question = input("> " if typed else "")
        except EOFError:
            # What comes next, such as the shell's prompt, begins a line.
            print("\n" if typed else "", end="")
            return
        messages.append({"role": "user", "content": question})
        answer, printed = Answer(), ""
        try:
            prompt = speaker.prompting.encode_chat(messages)
            for (answer,) in speaker.answers([prompt], turn):
                printed = _print_more(printed, speaker.text(answer, whole=False))
        except KeyboardInterrupt:
            pass
        text = speaker.text(answer, whole=True)
        _print_more(printed, text + "\n")
        messages.append({"role": "assistant", "content": text})


def run(options: Generate) -> None:
    """Loads the model, and continues texts or chats.

    Raises:
      ValueError: an option or a file is invalid.
      ImportError: a package is not installed.
    """
    texts = list(options.prompts)
    for path in options.file:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"file={path} cannot be read: {error}") from None
    if options.chat and (texts or options.json):
        raise ValueError("chat=True takes neither prompts, files nor --json")
    if not options.chat and not texts:
        raise ValueError("there is no prompt: give texts, --file FILE or --chat")
    if options.length < 1:
        raise ValueError(f"length={options.length} must be positive")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed={options.seed} must be from 0 to 2**32 - 1")
    source = Source.open(options.source, options.step, options.dtype)
    prompting = Prompting.of(source, options.chat_template)
    drawing = Drawing.of(options, prompting.defaults, source.config.vocab_size)
    if options.chat:
        # Without a template, this raises before the weights are read.
        prompting.chat.prompt([{"role": "user", "content": ""}])
    with alive("loading the model", on_stderr=True):
        _, model = source.load(options.mesh, options.fake_devices)
    speaker = Speaker(options, model, prompting, drawing)
    if options.chat:
        converse(speaker, options.system)
    elif options.json:
        write_json(speaker, texts)
    else:
        continue_texts(speaker, texts)


def main() -> None:
    """Runs the command; exits with 2 for errors that the user can fix."""
    try:
        check_no_empty_value(sys.argv[1:])
        options = tyro.cli(Generate, prog="python -m train.generate")
        with readers_may_leave():
            run(options)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
