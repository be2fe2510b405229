"""Attention to the keys of a mask, as packages compute it, in plain jax.

They compute in float32, or float64 if the inputs are, and round once, so any larger
error is the library's.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from usp_jax.kernels import choice


def band(rows, keys, left, right):
    """Row i sees keys i + keys - rows - left to i + keys - rows + right."""
    ahead = keys - rows
    seen = jnp.ones((rows, keys), bool)
    if left is not None:
        seen &= ~jnp.tri(rows, keys, ahead - left - 1, dtype=bool)
    if right is not None:
        seen &= jnp.tri(rows, keys, ahead + right, dtype=bool)
    return seen


def attention(q, k, v, scale, seen):
    """out [B, T, N, V] in q's dtype and lse [B, N, T]."""
    s = _scores(q, k, scale, seen)
    m = s.max(-1, keepdims=True)
    p = jnp.exp(s - m)
    total = p.sum(-1, keepdims=True)
    out = _einsum("BKGTS,BSKH->BTKGH", p / total, v)
    lse = (m + jnp.log(total)).reshape(q.shape[0], q.shape[2], q.shape[1])
    return out.reshape(*q.shape[:3], v.shape[3]).astype(q.dtype), lse


def backward(q, k, v, lse, out, dout, scale, seen):
    """dq, dk, dv in the inputs' dtypes; out is used only for delta."""
    assert out.shape == dout.shape == (*q.shape[:3], v.shape[3])
    s = _scores(q, k, scale, seen)
    p = jnp.exp(s - lse.reshape(*s.shape[:4], 1))
    delta = jnp.sum(out.astype(s.dtype) * dout.astype(s.dtype), -1)
    delta = _grouped(delta[..., None], k)[..., 0].transpose(0, 2, 3, 1)
    dout = _grouped(dout, k)
    dp = _einsum("BTKGH,BSKH->BKGTS", dout, v)
    ds = p * (dp - delta[..., None]) * scale
    dq = _einsum("BKGTS,BSKH->BTKGH", ds, k).reshape(q.shape)
    dk = _einsum("BKGTS,BTKGH->BSKH", ds, _grouped(q, k))
    dv = _einsum("BKGTS,BTKGH->BSKH", p, dout)
    grads = zip((dq, dk, dv), (q, k, v), strict=True)
    return tuple(dx.astype(x.dtype) for dx, x in grads)


def run_anywhere(monkeypatch, *names):
    """Lets these implementations run on any device, in wide floats too."""

    def anywhere(row):
        dtypes = (*row.dtypes, "float32", "float64")
        changes = {"platform": None, "capability": None, "majors": (), "package": None}
        if row.name not in names:
            return row
        return dataclasses.replace(row, dtypes=dtypes, **changes)

    monkeypatch.setattr(choice, "KERNELS", tuple(map(anywhere, choice.KERNELS)))


def _scores(q, k, scale, seen):
    assert q.dtype == k.dtype and q.shape[3] == k.shape[3] and not q.shape[3] % 8
    s = _einsum("BTKGH,BSKH->BKGTS", _grouped(q, k), k) * scale
    return jnp.where(seen, s, -jnp.inf)


def _grouped(x, k):
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])


def _einsum(spec, *xs):
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in xs]
    return jnp.einsum(spec, *wide, precision=lax.Precision.HIGHEST)
