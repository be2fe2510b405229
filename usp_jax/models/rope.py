"""Rotary position embeddings (RoPE, arXiv 2104.09864) as the LLaMA models use them.

The two halves of a head are rotated against each other: dim i with dim i + H/2, the
convention of the published LLaMA weights in the Hugging Face format.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How LLaMA 3.1 stretches RoPE to contexts longer than it was first trained on.

    Wavelengths up to original_length / high_frequency_factor stay as they are, those
    from original_length / low_frequency_factor on are `factor` times as long, and
    between them the frequencies are interpolated.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if not self.factor >= 1:
            raise ValueError(f"factor={self.factor} must be at least 1")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high:
            raise ValueError(
                f"low_frequency_factor={low} must be positive and less than "
                f"high_frequency_factor={high}"
            )
        if not self.original_length > 0:
            raise ValueError(f"original_length={self.original_length} must be positive")


def rope_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Angle a position of each pair of dims: float64 [H/2], highest first.

    theta^(-2i/H), scaled by `scaling`.
    """
    frequencies = theta ** -(np.arange(0, head_size, 2) / head_size)
    if scaling is None:
        return frequencies
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_angles(
    positions: Int[Array, "B T"], frequencies: np.ndarray
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """Cosine and sine of position · frequency, float32 [B, T, H/2].

    Exact to float32 at any int32 position. The float32 product that is usual instead is
    off by 0.06 radians at a million tokens.
    """
    # Turns in units of 2^-32, so that integers drop whole turns by overflowing; what
    # rounding leaves of each frequency is too small to need that.
    units = frequencies / (2 * math.pi) * 2.0**32
    whole = np.round(units)
    rest = jnp.asarray(units - whole, jnp.float32)[None, None]
    positions = positions[..., None]
    turned = positions.astype(jnp.uint32) * jnp.asarray(whole, jnp.uint32)[None, None]
    part = turned.astype(jnp.int32).astype(jnp.float32)
    angles = (part + positions.astype(jnp.float32) * rest) * (2 * math.pi / 2.0**32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "#B T h"],
    sin: Float[Array, "#B T h"],
) -> Float[Array, "B T N H"]:
    """Applies RoPE to the heads of q or k; float32 inside, x's dtype outside."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
