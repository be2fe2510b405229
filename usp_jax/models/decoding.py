"""What decoding computes on a mesh: the pass over prompts, and one more token.

`generate.py` draws tokens from the logits.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from usp_jax.models.batch import Batch
from usp_jax.models.llama import Llama
from usp_jax.models.mixer import Cache
from usp_jax.models.segments import PerRun
from usp_jax.models.sharding import Split
from usp_jax.models.transformer import Room, Transformer
from usp_jax.models.weights import Weights

# The cache of each run of layers.
Caches = PerRun[Cache]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts [B, P], and their lengths [B] or None."""

    # jax puts arrays and tracers into a pytree's leaves, so their type is Any.
    tokens: Any
    lengths: Any

    def ends(self) -> jax.Array:
        """The number of tokens of each prompt, int32 [B]."""
        rows, length = self.tokens.shape
        if self.lengths is None:
            return jnp.full(rows, length, jnp.int32)
        return self.lengths

    def padded(self, ways: int) -> "Prompts":
        """Adds copies of the last row until `ways` divides the batch."""
        more = -self.tokens.shape[0] % ways
        tokens = jnp.pad(self.tokens, ((0, more), (0, 0)), mode="edge")
        lengths = self.lengths
        if lengths is not None:
            lengths = jnp.pad(lengths, (0, more), mode="edge")
        return Prompts(tokens, lengths)


def prefill(
    model: Llama, prompts: Prompts, room: Room, specs: Caches
) -> tuple[jax.Array, Caches]:
    """Logits [B, V] after the prompts, and caches with room for more tokens."""
    split, ids = model.split, None
    ends = prompts.ends()
    if prompts.lengths is not None:
        places = jnp.arange(prompts.tokens.shape[1], dtype=jnp.int32)
        ids = jnp.where(places[None] < ends[:, None], 0, jnp.int32(-1))
    batch = Batch.of(split, prompts.tokens, ids, None, "natural")
    run = partial(_prefill_shards, room)
    last = ends - 1, jax.P(split.batch or None)
    return model.run(run, batch, (_logits_spec(split), specs), last)


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
    here = positions == last[:, None]
    if segment_ids is not None:
        here = here & (segment_ids >= 0)
    split = transformer.split
    x = jnp.sum(jnp.where(here[..., None], split.enter(x), 0), 1)
    # Only one shard of the sequence has the token; the others add zeros.
    return split.sum(transformer.logits(weights, x), split.sequence), caches


def step(
    model: Llama,
    kept: Weights | None,
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
        (position, rows),
        (caches, specs),
        kept=kept,
    )


def _step_shards(
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    position: jax.Array,
    caches: Caches,
) -> tuple[jax.Array, Caches]:
    x, caches = transformer.decode(weights, tokens, position[:, None], caches)
    # All shards of the sequence have the same value: use the first one's.
    split = transformer.split
    x = jnp.where(split.index(split.sequence) == 0, x[:, 0], 0)
    return split.sum(transformer.logits(weights, x), split.sequence), caches


def _logits_spec(split: Split) -> jax.P:
    return jax.P(split.batch or None, split.tensor or None)
