"""How often a passkey is found, by the text's length and the key's depth in it."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from train.data.passkey import DIGITS, document
from usp_jax.models.generate import generate
from usp_jax.models.llama import Llama

# (prompts [B, P], number of tokens n) -> [B, P + n], both int32.
Continue = Callable[[np.ndarray, int], np.ndarray]


def greedy(model: Llama) -> Continue:
    """Takes the likeliest token each time."""

    def go_on(prompts: np.ndarray, number: int) -> np.ndarray:
        found = generate(model, jnp.asarray(prompts), number, temperature=0)
        return np.asarray(found)

    return go_on


def accuracy(
    go_on: Continue, *, length: int, depth: float, examples: int, seed: int
) -> float:
    """The part of `examples` documents whose five digits are all told right."""
    draw = np.random.default_rng((seed, length, round(depth * 1000)))
    texts = [document(draw, length, depth) for _ in range(examples)]
    tokens = np.stack([np.frombuffer(text, np.uint8) for text in texts])
    tokens = tokens.astype(np.int32)
    told = go_on(tokens[:, :-DIGITS], DIGITS)
    return float((told == tokens).all(1).mean())


def accuracies(
    go_on: Continue,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    examples: int,
    seed: int,
) -> dict[int, dict[float, float]]:
    """`accuracy` at every length and depth."""
    return {
        length: {
            depth: accuracy(
                go_on, length=length, depth=depth, examples=examples, seed=seed
            )
            for depth in depths
        }
        for length in lengths
    }
