"""Padding of chunks to whole blocks with tokens that nothing sees."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from usp_jax.masking import Mask, pad_tokens


def pad_mask(mask: Mask, block_q: int, block_kv: int) -> Mask:
    """Pads the tokens of a mask to multiples of the block sizes."""
    pad_q = -mask.q.positions.shape[1] % block_q
    pad_kv = -mask.kv.positions.shape[1] % block_kv
    with_ids = bool(pad_q or pad_kv)
    return Mask(
        mask.rule,
        pad_tokens(mask.q, pad_q, with_ids=with_ids),
        pad_tokens(mask.kv, pad_kv, with_ids=with_ids),
        mask.tables,
    )


def pad_length(x: Shaped[Array, "B T ..."], block: int, fill: float) -> jax.Array:
    """Pads axis T of [B, T, ...] with `fill` to a multiple of `block`."""
    if not (padding := -x.shape[1] % block):
        return x
    widths = [(0, padding if i == 1 else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)
