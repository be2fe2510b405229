"""Rotary position embeddings (RoPE, arXiv 2104.09864) as the LLaMA models use them.

The two halves of a head are rotated against each other: dim i with dim i + H/2, the
convention of the published LLaMA weights in the Hugging Face format.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from usp_jax.models.rope_scaling import (
    DynamicNTKScaling,
    RopeScaling,
    YarnScaling,
    plain_frequencies,
)


def rope_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Angle a position of each pair of dims: float64 [H/2], highest first.

    theta^(-2i/H), or what `scaling` makes of it.

    Raises:
      ValueError: a dynamic scaling, which `at_length` fixes.
    """
    if scaling is None:
        return plain_frequencies(head_size, theta)
    return scaling.frequencies(head_size, theta)


def rope_amplitude(scaling: RopeScaling | None) -> float:
    """What cosine and sine are multiplied by: 1, but for YaRN."""
    return scaling.amplitude if isinstance(scaling, YarnScaling) else 1.0


def at_length(scaling: RopeScaling | None, length: int) -> RopeScaling | None:
    """The scaling of sequences of `length` tokens."""
    return scaling.at(length) if isinstance(scaling, DynamicNTKScaling) else scaling


def rope_angles(
    positions: Int[Array, "B T"],
    frequencies: np.ndarray,
    amplitude: float = 1.0,
    dtype: str = "float32",
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """Cosine and sine of position · frequency, times amplitude: [B, T, H/2].

    Exact to `dtype`, float32 or float64, at any int32 position. The float32 product
    that is usual instead is off by 0.06 radians at a million tokens.
    """
    # Turns in units of 2^-32, so that integers drop whole turns by overflowing; what
    # rounding leaves of each frequency is too small to need that.
    units = frequencies / (2 * math.pi) * 2.0**32
    whole = np.round(units)
    rest = jnp.asarray(units - whole, dtype)[None, None]
    positions = positions[..., None]
    turned = positions.astype(jnp.uint32) * jnp.asarray(whole, jnp.uint32)[None, None]
    part = turned.astype(jnp.int32).astype(dtype)
    angles = (part + positions.astype(dtype) * rest) * (2 * math.pi / 2.0**32)
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "#B T h"],
    sin: Float[Array, "#B T h"],
) -> Float[Array, "B T N H"]:
    """Applies RoPE to the heads of q or k: the angles' dtype inside, x's outside."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
