"""Sampling from a model by computing the whole sequence again for each token.

The simplest thing that is right: one program at one length, in which what is not yet
written is padding. There is no cache of keys and values, so a token costs a full
forward pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int, Key

from usp_jax.models.batch import Batch
from usp_jax.models.llama import Llama


def generate(
    model: Llama,
    prompt: Int[Array, "B P"],
    num_tokens: int,
    *,
    key: Key[Array, ""] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
) -> Int[Array, "B T"]:
    """Continues prompts: int32 [B, P + num_tokens], the prompt included.

    Every new token runs the model on the whole row (no cache of keys and values): meant
    for a look at what a model has learnt.

    Args:
      prompt: int32 [B, P], any B.
      key: from `jax.random.key`; needed unless `temperature` is 0.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: samples among this many likeliest tokens only.

    Raises:
      ValueError: an argument out of its range, or no key to sample with.
    """
    if prompt.ndim != 2 or 0 in prompt.shape or prompt.dtype != jnp.int32:
        raise ValueError(
            f"prompt is {prompt.dtype}{list(prompt.shape)}, it must be int32 [B, P] "
            "with at least one token"
        )
    if num_tokens < 0:
        raise ValueError(f"{num_tokens=} must not be negative")
    if not temperature >= 0:
        raise ValueError(f"{temperature=} must be 0 or positive")
    if temperature > 0 and key is None:
        raise ValueError(f"{temperature=} samples: give key=, or temperature=0")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(
            f"{top_k=} must be between 1 and the vocabulary, {model.config.vocab_size}"
        )
    graphdef, params = nnx.split(model, nnx.Param)
    key = jax.random.key(0) if key is None else key
    temperature = jnp.asarray(temperature, jnp.float32)
    return _generate(graphdef, num_tokens, top_k, params, prompt, key, temperature)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, num_tokens, top_k, params, prompt, key, temperature):
    model = nnx.merge(graphdef, params)
    rows, start = prompt.shape
    # Rows of the batch may be split: fill up with copies of the last one.
    ways = model.split.size(model.split.batch)
    widths = ((0, -rows % ways), (0, num_tokens))
    tokens = jnp.pad(prompt, widths, mode="edge")

    def body(length, tokens):
        logits = _next_logits(model, tokens, length)
        token = _sample(logits, jax.random.fold_in(key, length), temperature, top_k)
        return lax.dynamic_update_slice(tokens, token[:, None], (0, length))

    return lax.fori_loop(start, start + num_tokens, body, tokens)[:rows]


def _next_logits(model, tokens, length):
    """Logits [B, V] of what follows the first `length` tokens."""
    places = jnp.broadcast_to(lax.iota(jnp.int32, tokens.shape[1])[None], tokens.shape)
    segment_ids = jnp.where(places < length, 0, -1)
    batch = Batch.of(model.mesh, tokens, segment_ids, places, "natural")
    split = model.split
    out_specs = jax.P(split.batch or None, split.tensor or None)
    return model.run(_last_logits, batch, out_specs, (length - 1, jax.P()))


def _last_logits(transformer, weights, tokens, positions, segment_ids, last):
    x = transformer.hidden(weights, tokens, positions, segment_ids)
    here = (positions == last) & (segment_ids >= 0)
    x = jnp.sum(jnp.where(here[..., None], x, 0), 1)
    # One shard of the sequence has the token, the others add zeros.
    split = transformer.split
    return split.sum(transformer.logits(weights, x), split.sequence)


def _sample(logits, key, temperature, top_k):
    if top_k is not None:
        least = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    greedy = jnp.argmax(logits, -1)
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    drawn = jax.random.categorical(key, scaled, -1)
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
