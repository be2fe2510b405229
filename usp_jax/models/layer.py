"""One layer of the transformer, as a function of one device's shards.

    x [b, s, D]
      |- norm, enter -> q, k, v [b, t, n, H], rotated -> attention -> o -> leave -|
      +---------------------------------------------------------------------------+
      |- norm, enter -> gate, up [b, t, f] -> down ---------------------> leave --|
      +---------------------------------------------------------------------------+
    x [b, s, D]

Lower-case letters are this device's sizes; s is t, or t/tensor with `tensor_sequence`:
`Split.enter` gathers the tokens, and `Split.leave` sums and splits what is added to x.
"""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from usp_jax import KVCache, usp_attention_per_shard
from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.feed_forward import feed_forward
from usp_jax.models.remat import HEADS, INPUT, MIDDLE
from usp_jax.models.rope import rotate
from usp_jax.models.sharding import Split
from usp_jax.models.weights import is_small

State = TypeVar("State")
# (q, k, v, this layer's cache) -> (attention's output, the layer's state).
Attend = Callable[[Array, Array, Array, KVCache | None], tuple[Array, State]]
Angles = tuple[Float[Array, "#b t h"], Float[Array, "#b t h"]]


def layer(
    config: LlamaConfig,
    split: Split,
    weights: dict[str, Array],
    x: Float[Array, "b s D"],
    angles: Angles,
    attend: Attend[State],
    cache: KVCache | None,
) -> tuple[Float[Array, "b s D"], State]:
    """Returns x after one layer, and the state that `attend` returns.

    Args:
      config: the model's configuration.
      split: how the mesh splits arrays.
      weights: this layer's shards, keyed by the names of `sharding.TABLE`.
      x: the residual stream.
      angles: cosine and sine of RoPE.
      attend: computes attention from q, k, v and the cache.
      cache: this layer's cache, or None.
    """
    x = checkpoint_name(x, INPUT)
    w = {
        name: shard if is_small(name) else split.gather(shard, name, split.each)
        for name, shard in weights.items()
    }
    eps = config.rms_norm_eps

    y = split.enter(rms_norm(x, w["attention_norm"], eps))
    q, k, v = (_heads(y, w, name, eps) for name in "qkv")
    q, k = rotate(q, *angles), rotate(k, *angles)
    out, state = attend(q, k, v, cache)
    out = jnp.einsum("BTNH,NHD->BTD", out, w["o"])
    x = checkpoint_name(x + split.leave(out), MIDDLE)

    y = split.enter(rms_norm(x, w["mlp_norm"], eps))
    out = feed_forward(y, (w["gate"], w["up"], w["down"]), config.mlp_tile)
    return x + split.leave(out), state


def self_attention(
    config: LlamaConfig,
    layout: str,
    positions: Int[Array, "#b t"],
    segment_ids: Int[Array, "b t"] | None,
) -> Attend[None]:
    """Returns the `Attend` for causal attention of whole sequences to themselves."""

    def attend(q: Array, k: Array, v: Array, _: KVCache | None) -> tuple[Array, None]:
        out = usp_attention_per_shard(
            q,
            k,
            v,
            is_causal=True,
            layout=layout,
            segment_ids=segment_ids,
            positions=(
                jnp.broadcast_to(positions, q.shape[:2]) if layout == "data" else None
            ),
            implementation=config.implementation,
            ring_schedule=config.ring_schedule,
            ulysses_chunks=config.ulysses_chunks,
        )
        assert not isinstance(out, tuple)
        return out, None

    return attend


def _heads(y: Array, w: dict[str, Array], name: str, eps: float) -> Array:
    """Projects to q, k or v before RoPE, with the bias or norm some models have."""
    x = jnp.einsum("BTD,DNH->BTNH", y, w[name])
    if f"{name}_bias" in w:
        x = x + w[f"{name}_bias"].astype(x.dtype)[None, None]
    if f"{name}_norm" not in w:
        return x
    return rms_norm(checkpoint_name(x, HEADS), w[f"{name}_norm"], eps)


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Applies RMSNorm (arXiv 1910.07467), computed in at least float32."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    weight = lax.expand_dims(weight, range(x.ndim - 1))
    return (y * weight).astype(x.dtype)
