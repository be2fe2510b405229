"""One layer of the transformer, as a function of one device's shards.

    x [b, s, D]
      |- norm, enter -> q, k, v [b, t, n, H], rotated -> attention -> o -> leave -|
      +---------------------------------------------------------------------------+
      |- norm, enter -> gate, up [b, t, f] -> down ---------------------> leave --|
      +---------------------------------------------------------------------------+
    x [b, s, D]

Lower-case letters are this device's sizes; s is t, or t/tensor with `tensor_sequence`:
`Split.enter` gathers the tokens, and `Split.leave` sums and splits what is added to x.
Some models have norms after `leave`, instead of the others or as well. A layer's
configuration is that of its kind, from `of_kind`.
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
from usp_jax.models.parameters import is_small
from usp_jax.models.remat import HEADS, INPUT, MIDDLE, OUT
from usp_jax.models.rope import rotate
from usp_jax.models.sharding import Split
from usp_jax.options import Options

State = TypeVar("State")
# (q, k, v, this layer's cache) -> (attention's output, the layer's state).
Attend = Callable[[Array, Array, Array, KVCache | None], tuple[Array, State]]
# Cosine and sine; nothing without RoPE.
Angles = tuple[Float[Array, "#b t h"], Float[Array, "#b t h"]] | tuple[()]


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
      config: the configuration of the layer's kind.
      split: how the mesh splits arrays.
      weights: this layer's shards, keyed by the names of `parameters.TABLE`.
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

    y = split.enter(_before(config, w, "attention_norm", x))
    q, k, v = (_heads(config, split, w, name, y) for name in "qkv")
    if angles:
        q, k = rotate(q, *angles), rotate(k, *angles)
    out, state = attend(q, k, v, cache)
    out = split.leave(jnp.einsum("BTNH,NHD->BTD", out, w["o"]))
    x = checkpoint_name(x + _after(config, w, "attention_out_norm", out), MIDDLE)

    y = split.enter(_before(config, w, "mlp_norm", x))
    matrices = w["gate"], w["up"], w["down"]
    out = split.leave(feed_forward(y, matrices, config.mlp_tile, config.activation))
    return x + _after(config, w, "mlp_out_norm", out), state


def self_attention(
    config: LlamaConfig,
    layout: str,
    positions: Int[Array, "#b t"],
    segment_ids: Int[Array, "b t"] | None,
) -> Attend[None]:
    """Returns the `Attend` for causal attention of whole sequences to themselves."""

    def attend(q: Array, k: Array, v: Array, _: KVCache | None) -> tuple[Array, None]:
        options = attention_options(config) | Options(
            is_causal=True,
            layout=layout,
            segment_ids=segment_ids,
            positions=(
                jnp.broadcast_to(positions, q.shape[:2]) if layout == "data" else None
            ),
            ring_schedule=config.ring_schedule,
            ulysses_chunks=config.ulysses_chunks,
        )
        out = usp_attention_per_shard(q, k, v, **options)
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


def _before(config: LlamaConfig, w: dict[str, Array], name: str, x: Array) -> Array:
    """Applies the norm before a part of the layer, if the model has it."""
    return norm(config, x, w[name]) if name in w else x


def _after(config: LlamaConfig, w: dict[str, Array], name: str, x: Array) -> Array:
    """Applies the norm after a part of the layer, if the model has it."""
    return norm(config, checkpoint_name(x, OUT), w[name]) if name in w else x


def _heads(
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
        return _whole_norm(config, split, x, w[f"whole_{name}_norm"])
    return x


def _whole_norm(
    config: LlamaConfig, split: Split, x: Array, weight: Array
) -> Float[Array, "b t n H"]:
    """Applies one norm to all heads, of which this device has some."""
    y = x.astype(wide(x.dtype))
    total = split.sum(jnp.sum(jnp.square(y), (-2, -1), keepdims=True), split.tensor)
    number = x.shape[-2] * x.shape[-1] * split.size(split.tensor)
    y = y * lax.rsqrt(total / number + config.rms_norm_eps)
    return (y * _factor(config, weight)[None, None]).astype(x.dtype)


def norm(
    config: LlamaConfig, x: Float[Array, "... D"], weight: Float[Array, " D"]
) -> Float[Array, "... D"]:
    """Applies a model's RMSNorm."""
    return rms_norm(x, _factor(config, weight), config.rms_norm_eps)


def _factor(config: LlamaConfig, weight: Array) -> Array:
    return 1 + weight if config.zero_centered_norms else weight


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Applies RMSNorm (arXiv 1910.07467), computed in at least float32."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    weight = lax.expand_dims(weight, range(x.ndim - 1))
    return (y * weight).astype(x.dtype)
