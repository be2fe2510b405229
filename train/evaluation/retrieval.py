"""Accuracy of passkey retrieval, by length of the text and depth of the key."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from train.data.passkey import DIGITS, document
from usp_jax.models.generate import generate
from usp_jax.models.llama import Llama

# (prompts [B, P], number of tokens n) -> [B, P + n], both int32.
Continue = Callable[[np.ndarray, int], np.ndarray]


def greedy(model: Llama) -> Continue:
    """Returns a function that continues prompts with the most likely tokens."""

    def go_on(prompts: np.ndarray, number: int) -> np.ndarray:
        tokens = generate(model, jnp.asarray(prompts), number, temperature=0)
        return np.asarray(tokens)

    return go_on


def accuracy(
    go_on: Continue, *, length: int, depth: float, examples: int, seed: int
) -> float:
    """The fraction of `examples` documents with all five digits right.

    Args:
      go_on: continues prompts.
      length: tokens in a document.
      depth: position of the key, from 0 (start) to 1 (end).
      examples: number of documents.
      seed: seed of the documents.
    """
    draw = np.random.default_rng((seed, length, round(depth * 1000)))
    texts = [document(draw, length, depth) for _ in range(examples)]
    tokens = np.stack([np.frombuffer(text, np.uint8) for text in texts])
    tokens = tokens.astype(np.int32)
    continued = go_on(tokens[:, :-DIGITS], DIGITS)
    return float((continued == tokens).all(1).mean())


def accuracies(
    go_on: Continue,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    examples: int,
    seed: int,
) -> dict[int, dict[float, float]]:
    """Returns `accuracy` by length and depth."""
    return {
        length: {
            depth: accuracy(
                go_on, length=length, depth=depth, examples=examples, seed=seed
            )
            for depth in depths
        }
        for length in lengths
    }
