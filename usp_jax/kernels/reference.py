"""The chunk contract as its formulas, O(T·S) in memory: what the others must equal."""

import jax.numpy as jnp
from jax import lax

from usp_jax.masking import visible
from usp_jax.merge import finite, merge, normalize


def chunk_forward(q, k, v, mask, carry, logits):
    """Attention of q over k, v, merged into `carry`."""
    s = _scores(q, k, mask, logits)
    m = finite(s.max(-1, initial=-jnp.inf))
    p = jnp.exp(s - m[..., None])
    out = _einsum("BKGTS,BSKH->BTKGH", p, v.astype(p.dtype))
    out = out.reshape(*q.shape[:3], v.shape[-1])
    out, lse = normalize(out, _to_rows(m), _to_rows(p.sum(-1)))
    return (out, lse) if carry is None else merge(*carry, out, lse)


def chunk_backward(q, k, v, dout, lse, delta, mask, logits):
    """dq, dk, dv of one chunk from the global lse and delta."""
    s = _scores(q, k, mask, logits)
    lse, delta = (_from_rows(x, k.shape[2])[..., None] for x in (lse, delta))
    p = jnp.where(s == -jnp.inf, 0, jnp.exp(s - finite(lse)))
    q5, do5 = (_grouped(x, k.shape[2]).astype(s.dtype) for x in (q, dout))
    k, v = k.astype(s.dtype), v.astype(s.dtype)
    dv = _einsum("BKGTS,BTKGH->BSKH", p, do5)
    dp = _einsum("BTKGH,BSKH->BKGTS", do5, v)
    ds = logits.pull_back(p * (dp - delta), jnp.where(s == -jnp.inf, 0, s))
    dq = _einsum("BKGTS,BSKH->BTKGH", ds, k).reshape(q.shape)
    return dq, _einsum("BKGTS,BTKGH->BSKH", ds, q5), dv


def _scores(q, k, mask, logits):
    """Masked logits [B, K, G, T, S] in the accumulation dtype."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k = _grouped(q, k.shape[2]).astype(dtype), k.astype(dtype)
    s = logits.of(_einsum("BTKGH,BSKH->BKGTS", q, k))
    return jnp.where(visible(mask)[:, None, None], s, -jnp.inf)


def _einsum(spec, *xs):
    return jnp.einsum(spec, *xs, precision=lax.Precision.HIGHEST)


def _grouped(x, num_kv_heads):
    """[B, T, N, H] -> [B, T, K, G, H]"""
    return x.reshape(*x.shape[:2], num_kv_heads, -1, x.shape[-1])


def _to_rows(x):
    """[B, K, G, T] -> [B, T, N]"""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)


def _from_rows(x, num_kv_heads):
    """[B, T, N] -> [B, K, G, T]"""
    return x.reshape(*x.shape[:2], num_kv_heads, -1).transpose(0, 2, 3, 1)
