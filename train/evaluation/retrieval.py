"""Accuracy of passkey retrieval, by length of the text and depth of the key."""

from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from train.data.passkey import DIGITS, SHORTEST, document
from train.data.vocabulary import Vocabulary
from usp_jax.models.generate import generate
from usp_jax.models.llama import Llama


class Continue(Protocol):
    """Continues prompts [B, P] with n tokens each, [B, P + n], all int32.

    With lengths [B], tokens after them in a prompt are ignored, and new ones follow
    them.
    """

    def __call__(
        self, prompts: np.ndarray, number: int, lengths: np.ndarray | None = None, /
    ) -> np.ndarray: ...


def greedy(model: Llama) -> Continue:
    """Returns a function that continues prompts with the most likely tokens."""

    def go_on(
        prompts: np.ndarray, number: int, lengths: np.ndarray | None = None, /
    ) -> np.ndarray:
        ends = None if lengths is None else jnp.asarray(lengths)
        tokens = generate(
            model, jnp.asarray(prompts), number, lengths=ends, temperature=0
        )
        return np.asarray(tokens)

    return go_on


def accuracy(
    go_on: Continue,
    *,
    length: int,
    depth: float,
    examples: int,
    seed: int,
    vocabulary: Vocabulary | None = None,
) -> float:
    """The fraction of `examples` documents with all five digits right.

    Args:
      go_on: continues prompts.
      length: tokens in a document; at most, with a tokenizer.
      depth: position of the key, from 0 (start) to 1 (end).
      examples: number of documents.
      seed: seed of the documents.
      vocabulary: text to token ids and back; None is bytes.

    Raises:
      ValueError: `length` is too short for key and question.
    """
    vocabulary = Vocabulary() if vocabulary is None else vocabulary
    draw = np.random.default_rng((seed, length, round(depth * 1000)))
    if vocabulary.tokenizer is not None:
        texts = [_fitting(vocabulary, draw, length, depth) for _ in range(examples)]
        return _share_found(go_on, vocabulary, texts, length)
    texts = [document(draw, length, depth) for _ in range(examples)]
    tokens = np.stack([vocabulary.encode(text) for text in texts])
    continued = go_on(tokens[:, :-DIGITS], DIGITS)
    return float((continued == tokens).all(1).mean())


def _share_found(
    go_on: Continue, vocabulary: Vocabulary, texts: Sequence[bytes], length: int
) -> float:
    """The fraction of documents whose continuation begins with their digits."""
    prompts = [vocabulary.encode_start(text[:-DIGITS].decode()) for text in texts]
    tokens = np.stack([np.pad(x, (0, length - x.size)) for x in prompts])
    lengths = np.array([x.size for x in prompts], np.int32)
    # A digit is at most one token, and a space may precede them.
    number = DIGITS + 1
    continued = go_on(tokens, number, lengths)
    right = []
    for text, row, end in zip(texts, continued, lengths, strict=True):
        answer = vocabulary.decode(row[end : end + number]).lstrip()
        right.append(answer.startswith(text[-DIGITS:].decode()))
    return float(np.mean(right))


def _fitting(
    vocabulary: Vocabulary, draw: np.random.Generator, length: int, depth: float
) -> bytes:
    """A document of at most `length` tokens, and about as many."""
    size = length
    for _ in range(8):
        text = document(draw, size, depth)
        tokens = vocabulary.encode_start(text.decode()).size
        if 0.95 * length <= tokens <= length:
            break
        size = max(SHORTEST, int(size * 0.98 * length / tokens))
    if tokens > length:
        raise ValueError(
            f"length={length} must be at least the {tokens} tokens of a key"
        )
    return text


def accuracies(
    go_on: Continue,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    examples: int,
    seed: int,
    vocabulary: Vocabulary | None = None,
) -> dict[int, dict[float, float]]:
    """Returns `accuracy` by length and depth."""
    return {
        length: {
            depth: accuracy(
                go_on,
                length=length,
                depth=depth,
                examples=examples,
                seed=seed,
                vocabulary=vocabulary,
            )
            for depth in depths
        }
        for length in lengths
    }
