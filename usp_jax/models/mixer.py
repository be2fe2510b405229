"""Attention in a layer: its inputs from the residual stream, and the calls of the op.

    y [b, t, D] -> q [b, t, n, H], k, v [b, t, m, H], rotated by RoPE

Lower-case letters are this device's sizes.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from usp_jax import KVCache, usp_attention_per_shard
from usp_jax.models.config import LlamaConfig
from usp_jax.models.norms import norm, whole_norm
from usp_jax.models.remat import HEADS
from usp_jax.models.rope import rotate
from usp_jax.models.sharding import Split
from usp_jax.options import Options

State = TypeVar("State")
# Cosine and sine; nothing without RoPE.
Angles = tuple[Float[Array, "#b t h"], Float[Array, "#b t h"]] | tuple[()]


@dataclasses.dataclass(frozen=True)
class Heads:
    """The inputs of attention on one device.

    Attributes:
      q: queries.
      k: keys.
      v: values.
      sinks: the sink of each query head, or None.
    """

    q: Float[Array, "b t n H"]
    k: Float[Array, "b t m H"]
    v: Float[Array, "b t m H"]
    sinks: Float[Array, " n"] | None


# (The inputs, this layer's cache) -> (attention's output, the layer's state).
Attend = Callable[[Heads, KVCache | None], tuple[Array, State]]


def heads_of(
    config: LlamaConfig,
    split: Split,
    weights: dict[str, Array],
    y: Float[Array, "b t D"],
    angles: Angles,
) -> Heads:
    """Returns the inputs of attention.

    Args:
      config: the configuration of the layer's kind.
      split: how the mesh splits arrays.
      weights: the layer's weights, keyed by the names of `parameters.TABLE`.
      y: the tokens.
      angles: cosine and sine of RoPE.
    """
    q, k, v = (_projected(config, split, weights, name, y) for name in "qkv")
    if angles:
        q, k = rotate(q, *angles), rotate(k, *angles)
    return Heads(q, k, v, weights.get("sinks"))


def self_attention(
    config: LlamaConfig,
    layout: str,
    positions: Int[Array, "#b t"],
    segment_ids: Int[Array, "b t"] | None,
) -> Attend[None]:
    """Returns the `Attend` for causal attention of whole sequences to themselves."""

    def attend(heads: Heads, _: KVCache | None) -> tuple[Array, None]:
        options = attention_options(config) | Options(
            is_causal=True,
            layout=layout,
            segment_ids=segment_ids,
            sinks=heads.sinks,
            positions=(
                jnp.broadcast_to(positions, heads.q.shape[:2])
                if layout == "data"
                else None
            ),
            ring_schedule=config.ring_schedule,
            ulysses_chunks=config.ulysses_chunks,
        )
        out = usp_attention_per_shard(heads.q, heads.k, heads.v, **options)
        assert not isinstance(out, tuple)
        return out, None

    return attend


def attention_options(config: LlamaConfig) -> Options:
    """Returns the options of attention that training and decoding share."""
    return Options(
        local_window_size=None if config.window is None else (config.window - 1, 0),
        scale=config.attention_scale,
        logits_soft_cap=config.logits_soft_cap,
        implementation=config.implementation,
    )


def _projected(
    config: LlamaConfig, split: Split, w: dict[str, Array], name: str, y: Array
) -> Array:
    """Projects to q, k or v before RoPE, with the bias or norm some models have."""
    x = jnp.einsum("BTD,DNH->BTNH", y, w[name])
    if f"{name}_bias" in w:
        x = x + w[f"{name}_bias"].astype(x.dtype)[None, None]
    if f"{name}_norm" in w:
        return norm(config, checkpoint_name(x, HEADS), w[f"{name}_norm"])
    if f"whole_{name}_norm" in w:
        x = checkpoint_name(x, HEADS)
        return whole_norm(config, split, x, w[f"whole_{name}_norm"])
    return x
