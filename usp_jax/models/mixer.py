"""The mixer of a layer: its inputs from the residual stream, and the calls of the op.

    y [b, t, D] -> q [b, t, n, H], k, v [b, t, m, H], rotated by RoPE

or, for latent attention, instead of k, v the latent [b, t, C] of which they are made.
`delta_mixer.py` has the gated delta rule, which takes the place of attention.
Lower-case letters are this device's sizes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from usp_jax import KVCache, decode_attention, usp_attention_per_shard
from usp_jax.latent_attention import (
    latent_attention_per_shard,
    latent_decode_attention,
    latent_key,
)
from usp_jax.models.adapters import matrix_of, times
from usp_jax.models.config import LlamaConfig
from usp_jax.models.delta_mixer import (
    DeltaHeads,
    DeltaState,
    delta_heads,
    delta_output,
    delta_rule,
)
from usp_jax.models.latent import Latent
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


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """The inputs of latent attention on one device.

    Attributes:
      q: queries; RoPE is applied to their last dims.
      latent: the latent vectors of keys and values.
      rope_key: the last dims of keys, which all heads share, after RoPE.
      k_up: makes the other dims of keys.
      v_up: makes values.
    """

    q: Float[Array, "b t n H"]
    latent: Float[Array, "b t C"]
    rope_key: Float[Array, "b t h"]
    k_up: Float[Array, "C n _"]
    v_up: Float[Array, "C n X"]


Inputs = Heads | LatentHeads | DeltaHeads
# What a layer keeps of the tokens before those that it computes.
Cache = KVCache | DeltaState
# (The inputs, this layer's cache) -> (the output of each head, the layer's state).
Attend = Callable[[Inputs, Cache | None], tuple[Array, State]]


def inputs_of(
    config: LlamaConfig,
    split: Split,
    weights: dict[str, Array],
    y: Float[Array, "b t D"],
    angles: Angles,
) -> Inputs:
    """Returns the inputs of attention, or of what takes its place.

    Args:
      config: the configuration of the layer's kind.
      split: how the mesh splits arrays.
      weights: the layer's weights, keyed by the names of `parameters.TABLE`.
      y: the tokens.
      angles: cosine and sine of RoPE.
    """
    if config.delta is not None:
        return delta_heads(config, weights, y)
    if config.latent is not None:
        return _latent_heads(config, config.latent, weights, y, angles)
    q, k, v = (_projected(config, split, weights, name, y) for name in "qkv")
    if angles:
        q, k = rotate(q, *angles), rotate(k, *angles)
    return Heads(q, k, v, weights.get("sinks"))


def _latent_heads(
    config: LlamaConfig,
    latent: Latent,
    w: dict[str, Array],
    y: Array,
    angles: Angles,
) -> LatentHeads:
    matrix = partial(matrix_of, config.lora, w)
    if latent.q_rank is None:
        q = times("BTD,DNH->BTNH", y, matrix("q"))
    else:
        low = checkpoint_name(times("BTD,DR->BTR", y, matrix("q_down")), HEADS)
        low = norm(config, low, w["q_down_norm"])
        q = times("BTR,RNH->BTNH", low, matrix("q_up"))
    kv = checkpoint_name(times("BTD,DJ->BTJ", y, matrix("kv_down")), HEADS)
    vector, rope_key = kv[..., : latent.kv_rank], kv[..., latent.kv_rank :]
    plain, rotated = q[..., : -latent.rope_size], q[..., -latent.rope_size :]
    return LatentHeads(
        jnp.concatenate([plain, rotate(rotated, *angles)], -1),
        norm(config, vector, w["kv_down_norm"]),
        rotate(rope_key[:, :, None], *angles)[:, :, 0],
        w["k_up"],
        w["v_up"],
    )


def output_of(
    config: LlamaConfig,
    weights: dict[str, Array],
    y: Float[Array, "b t D"],
    out: Float[Array, "b t n X"],
) -> Float[Array, "b t D"]:
    """Returns the mixer's output without a bias, to be summed over `tensor`.

    Args:
      config: the configuration of the layer's kind.
      weights: the layer's weights, keyed by the names of `parameters.TABLE`.
      y: the tokens.
      out: the output of each head.
    """
    if config.delta is not None:
        return delta_output(config, weights, y, out)
    matrix = partial(matrix_of, config.lora, weights)
    if config.output_gate:
        gate = times("BTD,DNH->BTNH", y, matrix("output_gate"))
        out = out * jax.nn.sigmoid(checkpoint_name(gate, HEADS))
    return times("BTNH,NHD->BTD", out, matrix("o"))


def self_attention(
    config: LlamaConfig,
    layout: str,
    positions: Int[Array, "#b t"],
    segment_ids: Int[Array, "b t"] | None,
) -> Attend[None]:
    """Returns the `Attend` for whole sequences, whose tokens see those before them."""

    def attend(heads: Inputs, _: Cache | None) -> tuple[Array, None]:
        if isinstance(heads, DeltaHeads):
            return delta_rule(heads, segment_ids=segment_ids, layout=layout)[0], None
        options = attention_options(config) | Options(
            is_causal=True,
            layout=layout,
            segment_ids=segment_ids,
            positions=(
                jnp.broadcast_to(positions, heads.q.shape[:2])
                if layout == "data"
                else None
            ),
            ring_schedule=config.ring_schedule,
        )
        if isinstance(heads, LatentHeads):
            out = latent_attention_per_shard(
                heads.q,
                heads.latent,
                heads.rope_key,
                heads.k_up,
                heads.v_up,
                **options,
            )
        else:
            own = Options(sinks=heads.sinks, ulysses_chunks=config.ulysses_chunks)
            out = usp_attention_per_shard(heads.q, heads.k, heads.v, **(options | own))
        assert not isinstance(out, tuple)
        return out, None

    return attend


def cached(heads: Heads | LatentHeads) -> tuple[Array, Array | None]:
    """Returns the keys and values that a cache holds."""
    if isinstance(heads, LatentHeads):
        return latent_key(heads.latent, heads.rope_key), None
    return heads.k, heads.v


def cached_attention(
    config: LlamaConfig,
    positions: Int[Array, "b t"],
    heads: Heads | LatentHeads,
    cache: KVCache,
) -> Float[Array, "b t n H"]:
    """Attends to the tokens of a cache, the queries' own included.

    Args:
      config: the configuration of the layer's kind.
      positions: positions of the queries.
      heads: the inputs of attention; of keys and values, the cache's are used.
      cache: the layer's cache.
    """
    options = attention_options(config) | Options(positions=positions)
    if isinstance(heads, LatentHeads):
        out = latent_decode_attention(heads.q, cache, heads.k_up, heads.v_up, **options)
    else:
        own = Options(sinks=heads.sinks)
        out = decode_attention(heads.q, cache, **(options | own))
    assert not isinstance(out, tuple)
    return out


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
    x = times("BTD,DNH->BTNH", y, matrix_of(config.lora, w, name))
    if f"{name}_bias" in w:
        x = x + w[f"{name}_bias"].astype(x.dtype)[None, None]
    if f"{name}_norm" in w:
        return norm(config, checkpoint_name(x, HEADS), w[f"{name}_norm"])
    if f"whole_{name}_norm" in w:
        x = checkpoint_name(x, HEADS)
        return whole_norm(config, split, x, w[f"whole_{name}_norm"])
    return x
