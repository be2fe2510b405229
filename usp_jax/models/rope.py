"""Rotary position embeddings (RoPE, arXiv 2104.09864) as the LLaMA models use them.

Dim i of a head is rotated with dim i + H/2, the convention of the published LLaMA
weights in the Hugging Face format.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from usp_jax.models.rope_scaling import (
    DynamicNTKScaling,
    LongRopeScaling,
    PairScaling,
    RopeScaling,
    YarnScaling,
    plain_frequencies,
)


def rope_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Returns RoPE's frequencies: radians per position of each pair of dims.

    They are theta^(-2i/H), changed by `scaling`.

    Args:
      head_size: H.
      theta: the base.
      scaling: a RoPE scaling, or None.

    Returns:
      float64 [H/2], highest first.

    Raises:
      ValueError: the scaling is dynamic; fix its length with `at_length` first.
    """
    if scaling is None:
        return plain_frequencies(head_size, theta)
    return scaling.frequencies(head_size, theta)


def rope_amplitude(scaling: RopeScaling | None) -> float:
    """Returns the factor of cosine and sine, which YaRN and LongRoPE have."""
    if isinstance(scaling, YarnScaling | PairScaling | LongRopeScaling):
        return scaling.amplitude
    return 1.0


def at_length(scaling: RopeScaling | None, length: int) -> RopeScaling | None:
    """Returns the scaling for sequences of `length` tokens; fixes a dynamic one."""
    if isinstance(scaling, DynamicNTKScaling | LongRopeScaling):
        return scaling.at(length)
    return scaling


def rope_angles(
    positions: Int[Array, "B T"],
    frequencies: np.ndarray,
    amplitude: float = 1.0,
    dtype: str = "float32",
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """Returns amplitude · cos and amplitude · sin of position · frequency.

    The angles are accurate to `dtype` at any int32 position. The usual float32 product
    is off by 0.06 radians at a million tokens.

    Args:
      positions: int32 [B, T].
      frequencies: float64 [H/2], radians per position.
      amplitude: factor of cosine and sine.
      dtype: float32 or float64.

    Returns:
      Cosine and sine, each [B, T, H/2].
    """
    # In units of 2^-32 turns, integer overflow drops whole turns. The rounding
    # remainder of each frequency is too small to need that.
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
    """Applies RoPE to the heads of q or k, or to their first 2·h dims.

    It is computed in the angles' dtype and returned in x's.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(cos.dtype), (half, 2 * half), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
