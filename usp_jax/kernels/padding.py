"""Chunks padded to whole blocks, with tokens that nothing sees."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from usp_jax.masking import Mask, pad_tokens


def pad_mask(mask: Mask, block_q: int, block_kv: int) -> Mask:
    """The mask of lengths that are the next multiples of the blocks."""
    pad_q = -mask.q.positions.shape[1] % block_q
    pad_kv = -mask.kv.positions.shape[1] % block_kv
    with_ids = bool(pad_q or pad_kv)
    return Mask(
        mask.rule,
        pad_tokens(mask.q, pad_q, with_ids=with_ids),
        pad_tokens(mask.kv, pad_kv, with_ids=with_ids),
    )


def pad_length(x: Shaped[Array, "B T ..."], block: int, fill: float) -> jax.Array:
    """Pads the tokens of [B, T, ...] to a multiple of the block."""
    if not (padding := -x.shape[1] % block):
        return x
    widths = [(0, padding if i == 1 else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)
