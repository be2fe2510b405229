"""cuDNN's two calls emulated in plain jax, with results in the inputs' dtype.

They compute in float32 and round once, so any larger error is the library's.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from jax import lax

from usp_jax import _compat
from usp_jax.kernels import choice


def attention(q, k, v, scale, is_causal):
    """out [B, T, N, H] in q's dtype and lse [B, N, T]."""
    s = _scores(q, k, scale, is_causal)
    m = s.max(-1, keepdims=True)
    p = jnp.exp(s - m)
    total = p.sum(-1, keepdims=True)
    out = _einsum("BKGTS,BSKH->BTKGH", p / total, v)
    lse = (m + jnp.log(total)).reshape(q.shape[0], q.shape[2], q.shape[1])
    return out.reshape(q.shape).astype(q.dtype), lse


def backward(q, k, v, lse, out, dout, scale, is_causal):
    """dq, dk, dv in the inputs' dtypes; out is used only for delta."""
    s = _scores(q, k, scale, is_causal)
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


@pytest.fixture
def emulated(monkeypatch):
    """Lets implementation="cudnn" run on any device, in float32 too."""
    (row,) = (kernel for kernel in choice.KERNELS if kernel.name == "cudnn")
    dtypes = (*row.dtypes, "float32")
    anywhere = dataclasses.replace(row, platform=None, capability=None, dtypes=dtypes)
    others = tuple(kernel for kernel in choice.KERNELS if kernel is not row)
    monkeypatch.setattr(choice, "KERNELS", (*others, anywhere))
    monkeypatch.setattr(_compat, "cudnn_attention", attention)
    monkeypatch.setattr(_compat, "cudnn_attention_backward", backward)


def _scores(q, k, scale, is_causal):
    assert q.dtype == k.dtype and q.shape[3] == k.shape[3] and not q.shape[3] % 8
    s = _einsum("BTKGH,BSKH->BKGTS", _grouped(q, k), k) * scale
    if is_causal:
        assert q.shape[1] == k.shape[1]
        seen = jnp.tri(q.shape[1], dtype=bool)[None, None, None]
        s = jnp.where(seen, s, -jnp.inf)
    return s


def _grouped(x, k):
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])


def _einsum(spec, *xs):
    return jnp.einsum(
        spec, *(x.astype(jnp.float32) for x in xs), precision=lax.Precision.HIGHEST
    )
