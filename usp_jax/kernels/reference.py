"""The chunk contract written as its formulas: the reference for the other kernels.

It stores all scores, so memory grows as O(T·S).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax.kernels.contract import Carry, Grads
from usp_jax.kernels.logits import Logits, at_most_0, lowered
from usp_jax.masking import Mask, visible
from usp_jax.merge import finite, merge, normalize


def chunk_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    carry: Carry | None,
    logits: Logits,
) -> Carry:
    """Computes the attention of q over k, v and merges it into `carry`."""
    s = _biased(_scores(q, k, mask, logits), mask, logits)
    m = finite(lowered(s.max(-1, initial=-jnp.inf)))
    p = jnp.exp(at_most_0(s - m[..., None]))
    row_sum = p.sum(-1)
    p = _dropped(p, mask, logits)
    out = _einsum("BKGTS,BSKH->BTKGH", p, v.astype(p.dtype))
    out = out.reshape(*q.shape[:3], v.shape[-1])
    out, lse = normalize(out, _to_rows(m), _to_rows(row_sum))
    return (out, lse) if carry is None else merge(*carry, out, lse)


def chunk_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    mask: Mask,
    logits: Logits,
) -> Grads:
    """Computes dq, dk, dv of one chunk from the global lse and delta."""
    s = _scores(q, k, mask, logits)
    lse, delta = (_from_rows(x, k.shape[2])[..., None] for x in (lse, delta))
    p = jnp.exp(at_most_0(_biased(s, mask, logits) - finite(lse)))
    p = jnp.where(s == -jnp.inf, 0, p)
    q5, do5 = (_grouped(x, k.shape[2]).astype(s.dtype) for x in (q, dout))
    k, v = k.astype(s.dtype), v.astype(s.dtype)
    dv = _einsum("BKGTS,BTKGH->BSKH", _dropped(p, mask, logits), do5)
    dp = _dropped(_einsum("BTKGH,BSKH->BKGTS", do5, v), mask, logits)
    ds = logits.pull_back(p * (dp - delta), jnp.where(s == -jnp.inf, 0, s))
    dq = _einsum("BKGTS,BSKH->BTKGH", ds, k).reshape(q.shape)
    return dq, _einsum("BKGTS,BTKGH->BSKH", ds, q5), dv


def _scores(q: jax.Array, k: jax.Array, mask: Mask, logits: Logits) -> jax.Array:
    """Computes the masked logits [B, K, G, T, S] in the accumulation dtype."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k = _grouped(q, k.shape[2]).astype(dtype), k.astype(dtype)
    s = logits.of(_einsum("BTKGH,BSKH->BKGTS", q, k))
    return jnp.where(visible(mask)[:, None, None], s, -jnp.inf)


def _biased(s: jax.Array, mask: Mask, logits: Logits) -> jax.Array:
    """Adds the ALiBi bias to the logits."""
    if logits.slopes is None:
        return s
    bias = logits.bias(mask.q, mask.kv, s.dtype)
    return s + bias.reshape(bias.shape[0], *s.shape[1:])


def _dropped(weights: jax.Array, mask: Mask, logits: Logits) -> jax.Array:
    """Applies dropout to the weights or to their cotangents."""
    if logits.dropout is None:
        return weights
    rows = logits.dropout.rows
    factors = logits.dropout.factors(rows, mask.q, mask.kv, weights.dtype)
    return weights * factors.reshape(weights.shape)


def _einsum(spec: str, *xs: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *xs, precision=lax.Precision.HIGHEST)


def _grouped(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, T, K, G, H]"""
    return x.reshape(*x.shape[:2], num_kv_heads, -1, x.shape[-1])


def _to_rows(x: jax.Array) -> jax.Array:
    """[B, K, G, T] -> [B, T, N]"""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)


def _from_rows(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, T, N] -> [B, K, G, T]"""
    return x.reshape(*x.shape[:2], num_kv_heads, -1).transpose(0, 2, 3, 1)
