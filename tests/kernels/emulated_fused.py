"""The fused backward's dq in plain jax: each tile's part, rounded to integers.

It follows the kernel's arithmetic (16-bit inputs, float32 products, ds rounded to 16
bits) without its order, so that the sums can be taken in any.
"""

import jax.numpy as jnp

from usp_jax.kernels import Chunk, xla
from usp_jax.kernels.contract import IntegerSums
from usp_jax.kernels.mosaic_gpu import fixed_point, fused
from usp_jax.masking import visible

TILE = 128


def gradients_of_logits(q, k, v, dout, lse, delta, mask, logits):
    """ds [B, N, T, S] in q's dtype, without the scale, and k [B, S, N, H]."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    products = _einsum("BTNH,BSNH->BNTS", q, k)
    by_row = jnp.moveaxis(jnp.stack([lse, delta]), 2, 3)[..., None]
    p = jnp.exp(logits.of(products) - jnp.where(by_row[0] == -jnp.inf, 0, by_row[0]))
    p = jnp.where(visible(mask)[:, None], p, 0)
    dp = _einsum("BTNV,BSNV->BNTS", dout.astype(q.dtype), v)
    ds = p * (dp - by_row[1])
    if logits.soft_cap is not None:
        ds = logits.pull_back(ds, logits.of(products))
    return ds.astype(q.dtype), k


def parts(q, k, v, dout, lse, delta, mask, logits, maxima):
    """The int32 parts [tiles, B, T, N, H] of dq, of 128 keys each."""
    ds, k = gradients_of_logits(q, k, v, dout, lse, delta, mask, logits)
    rows = fixed_point.row_bounds(q, dout.astype(q.dtype), lse, delta, maxima, logits)
    columns = fixed_point.factors(fixed_point.column_bounds(maxima))
    columns = jnp.repeat(columns, q.shape[2] // columns.shape[1], axis=1)
    units = fixed_point.factors(rows)[..., None], columns[:, None]
    return jnp.stack(
        [
            fixed_point.to_fixed(
                _einsum("BNTS,BSNH->BTNH", ds[..., i : i + TILE], k[:, i : i + TILE])
                * units[0]
                * units[1]
            )
            for i in range(0, k.shape[1], TILE)
        ]
    )


def integer_backward(q, k, v, dout, lse, delta, mask, logits, maxima):
    """`fused.integer_backward` in plain jax, without a soft cap."""
    args = q, k, v, dout, lse, delta, mask, logits
    ds, _ = gradients_of_logits(*args)
    # With delta = 1 and dout = 0, -ds are the weights.
    weights = -gradients_of_logits(
        q, k, v, jnp.zeros_like(dout), lse, jnp.ones_like(delta), mask, logits
    )[0]
    dk = _einsum("BNTS,BTNH->BSNH", ds, q) * logits.scale
    dv = _einsum("BNTS,BTNV->BSNV", weights, dout)
    dk, dv = (x.reshape(*k.shape[:3], -1, x.shape[3]).sum(3) for x in (dk, dv))
    return jnp.sum(parts(*args, maxima), 0), dk, dv


def chunk():
    """The emulation as an implementation of the chunk contract."""
    sums = IntegerSums(fixed_point.key_maxima, integer_backward, fused.finish)
    return Chunk(xla.chunk_forward, xla.chunk_backward, sums=sums)


def saved(q, k, v, dout, mask, logits):
    """lse and delta of the whole call."""
    out, lse = xla.chunk_forward(q, k, v, mask, None, logits)
    return lse, jnp.sum(out * dout.astype(out.dtype), -1)


def _einsum(spec, *xs):
    return jnp.einsum(spec, *xs, preferred_element_type=jnp.float32)
