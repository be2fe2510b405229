"""The norms of a model: RMSNorm (arXiv 1910.07467), computed in at least float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.sharding import Split


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
    """Applies RMSNorm with a given factor."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    weight = lax.expand_dims(weight, range(x.ndim - 1))
    return (y * weight).astype(x.dtype)


def whole_norm(
    config: LlamaConfig, split: Split, x: Array, weight: Array
) -> Float[Array, "b t n H"]:
    """Applies one norm to all heads, of which this device has some."""
    y = x.astype(wide(x.dtype))
    total = split.sum(jnp.sum(jnp.square(y), (-2, -1), keepdims=True), split.tensor)
    number = x.shape[-2] * x.shape[-1] * split.size(split.tensor)
    y = y * lax.rsqrt(total / number + config.rms_norm_eps)
    return (y * _factor(config, weight)[None, None]).astype(x.dtype)
