"""Draws tokens from logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A pytree.

    Attributes:
      key: from `jax.random.key`.
      temperature: float32 [], divides the logits; 0 takes the most likely token.
      top_p: float32 [] or None, the probability that the most likely tokens, to which
        the others are left out, must at least have together.
      top_k: number of most likely tokens to draw from; None is all.
    """

    # jax puts arrays and tracers into a pytree's leaves, so their type is Any.
    key: Any
    temperature: Any
    top_p: Any
    top_k: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        vocab_size: int,
        key: Key[Array, ""] | None,
        temperature: float | int,
        top_k: int | None,
        top_p: float | int | None,
    ) -> "Sampling":
        """Makes it from the options of `generate`.

        Raises:
          ValueError: one is out of range.
        """
        check_sampling(vocab_size, temperature, top_k, top_p)
        return cls(
            jax.random.key(0) if key is None else key,
            jnp.asarray(temperature, jnp.float32),
            None if top_p is None else jnp.asarray(top_p, jnp.float32),
            top_k,
        )

    def draw(
        self, logits: Float[Array, "B V"], number: int | Int[Array, ""]
    ) -> Int[Array, " B"]:
        """Draws the token with this number, counted from 0, of each row."""
        greedy = jnp.argmax(logits, -1)
        scaled = logits / jnp.where(self.temperature > 0, self.temperature, 1)
        if self.top_k is not None:
            least = lax.top_k(scaled, self.top_k)[0][:, -1:]
            scaled = jnp.where(scaled < least, -jnp.inf, scaled)
        if self.top_p is not None:
            scaled = _nucleus(scaled, self.top_p)
        key = jax.random.fold_in(self.key, number)
        drawn = jax.random.categorical(key, scaled, -1)
        return jnp.where(self.temperature > 0, drawn, greedy).astype(jnp.int32)


def check_sampling(
    vocab_size: int,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int | None,
) -> None:
    """Checks the options of `generate`, without using a device.

    Raises:
      ValueError: one is out of range.
    """
    if not temperature >= 0:
        raise ValueError(f"{temperature=} must be 0 or positive")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"{top_k=} must be between 1 and {vocab_size=}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must be greater than 0 and at most 1")


def _nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> Array:
    """Leaves out unlikely tokens (nucleus sampling, arXiv 1904.09751)."""
    ordered = jnp.sort(logits, -1, descending=True)
    probabilities = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
