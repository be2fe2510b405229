"""Sampling from a model: one pass over the prompts, then one token at a time.

The prompts' keys and values stay on the devices that computed them, split over the
sequence (`usp_jax.decode`). Those of the new tokens are split too, in a second page.
Layers with a window keep only the last tokens that it holds.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int, Key

from usp_jax import KVCache
from usp_jax.models.batch import Batch, check_ids
from usp_jax.models.llama import Llama
from usp_jax.models.segments import PerRun
from usp_jax.models.sharding import Split
from usp_jax.models.transformer import Room, Transformer
from usp_jax.models.weights import Weights

# The cache of each run of layers.
Caches = PerRun[KVCache]


def generate(
    model: Llama,
    prompt: Int[Array, "B P"],
    num_tokens: int,
    *,
    key: Key[Array, ""] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    validate_args: bool = False,
) -> Int[Array, "B T"]:
    """Continues prompts with sampled tokens.

    Weights are gathered again for each token, so this is for inspecting a model, not
    for serving it. A mesh with a `pipe` axis is used as one without, which copies the
    parameters. Dynamic RoPE scaling is fixed for the final length, P + num_tokens.

    Args:
      model: on any mesh.
      prompt: int32 [B, P], any B. An id that is not in the vocabulary is embedded as
        zeros, without an error.
      num_tokens: number of tokens to append to each row.
      key: from `jax.random.key`; required unless `temperature` is 0.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: samples only from this many most likely tokens; None is all of them.
      validate_args: whether ids that are not in the vocabulary raise. It reads the
        prompt on the host, so it cannot be used inside `jax.jit`.

    Returns:
      int32 [B, P + num_tokens], the prompts included.

    Raises:
      ValueError: an argument is out of range, or there is no key to sample with; with
        `validate_args`, an id is not in the vocabulary, or the prompt is traced.
    """
    if prompt.ndim != 2 or 0 in prompt.shape or prompt.dtype != jnp.int32:
        raise ValueError(
            f"prompt is {prompt.dtype}{list(prompt.shape)}; it must be int32 [B, P] "
            "with at least one token"
        )
    if validate_args:
        check_ids("prompt", prompt, model.config.vocab_size)
    if num_tokens < 0:
        raise ValueError(f"{num_tokens=} must not be negative")
    if not temperature >= 0:
        raise ValueError(f"{temperature=} must be 0 or positive")
    if temperature > 0 and key is None:
        raise ValueError(f"{temperature=} samples: give key=, or temperature=0")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(
            f"{top_k=} must be between 1 and vocab_size={model.config.vocab_size}"
        )
    if num_tokens == 0:
        return prompt
    graphdef, params = nnx.split(model.without_pipeline(), nnx.Param)
    key = jax.random.key(0) if key is None else key
    heat = jnp.asarray(temperature, jnp.float32)
    return _generate(graphdef, num_tokens, top_k, params, prompt, key, heat)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    graphdef: nnx.GraphDef[Llama],
    num_tokens: int,
    top_k: int | None,
    params: Any,
    prompt: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    model = nnx.merge(graphdef, params)
    rows, start = prompt.shape
    # Cached keys are rotated only once, so all tokens use the final length's
    # frequencies.
    model.config = model.config.at_length(start + num_tokens)
    # The batch may be split: pad it with copies of the last row.
    split = model.split
    padding = -rows % split.size(split.batch)
    prompt = jnp.pad(prompt, ((0, padding), (0, 0)), mode="edge")
    tokens = jnp.pad(prompt, ((0, 0), (0, num_tokens)))
    parts = split.size(split.sequence)
    room = Room(start, -(-max(num_tokens - 1, 1) // parts) * parts, parts)
    specs = Transformer(model.config, split, "contiguous").cache_specs(room)
    logits, caches = _prefill(model, prompt, room, specs)

    def write(
        tokens: jax.Array, logits: jax.Array, length: int | jax.Array
    ) -> jax.Array:
        token = _sample(logits, jax.random.fold_in(key, length), temperature, top_k)
        return lax.dynamic_update_slice(tokens, token[:, None], (0, length))

    def body(
        length: jax.Array, state: tuple[jax.Array, Caches]
    ) -> tuple[jax.Array, Caches]:
        tokens, caches = state
        last = lax.dynamic_slice_in_dim(tokens, length - 1, 1, 1)
        logits, caches = _step(model, last, length - 1, caches, specs)
        return write(tokens, logits, length), caches

    tokens = write(tokens, logits, start)
    state = lax.fori_loop(start + 1, start + num_tokens, body, (tokens, caches))
    return state[0][:rows]


def _prefill(
    model: Llama, prompt: jax.Array, room: Room, specs: Caches
) -> tuple[jax.Array, Caches]:
    """Logits [B, V] after the prompts, and caches with room for more tokens."""
    split = model.split
    batch = Batch.of(split, prompt, None, None, "natural")
    run = partial(_prefill_shards, room)
    last = prompt.shape[1] - 1
    return model.run(run, batch, (_logits_spec(split), specs), (last, jax.P()))


def _prefill_shards(
    room: Room,
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    last: jax.Array,
) -> tuple[jax.Array, Caches]:
    x, caches = transformer.prefill(weights, tokens, positions, segment_ids, room)
    here = positions == last
    if segment_ids is not None:
        here = here & (segment_ids >= 0)
    split = transformer.split
    x = jnp.sum(jnp.where(here[..., None], split.enter(x), 0), 1)
    # Only one shard of the sequence has the token; the others add zeros.
    return split.sum(transformer.logits(weights, x), split.sequence), caches


def _step(
    model: Llama,
    token: jax.Array,
    position: jax.Array,
    caches: Caches,
    specs: Caches,
) -> tuple[jax.Array, Caches]:
    """Logits [B, V] after one more token [B, 1], and the updated caches."""
    split = model.split
    rows = jax.P(split.batch or None)
    return model.run_on(
        _step_shards,
        (_logits_spec(split), specs),
        (token, rows),
        (position, jax.P()),
        (caches, specs),
    )


def _step_shards(
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    position: jax.Array,
    caches: Caches,
) -> tuple[jax.Array, Caches]:
    positions = jnp.zeros_like(tokens) + position
    x, caches = transformer.decode(weights, tokens, positions, caches)
    # All shards of the sequence have the same value: use the first one's.
    split = transformer.split
    x = jnp.where(split.index(split.sequence) == 0, x[:, 0], 0)
    return split.sum(transformer.logits(weights, x), split.sequence), caches


def _logits_spec(split: Split) -> jax.P:
    return jax.P(split.batch or None, split.tensor or None)


def _sample(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: int | None
) -> jax.Array:
    if top_k is not None:
        least = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    greedy = jnp.argmax(logits, -1)
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    drawn = jax.random.categorical(key, scaled, -1)
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
