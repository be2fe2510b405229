"""The packages dew_flash_attn 0.3.6 and fa4_jax 0.1.0, emulated in plain jax.

Only the functions that usp_jax calls, with the packages' signatures.
"""

import dataclasses
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.kernels import emulated as plain

NAMES = ("fa2", "fa3", "fa4")


def forward2(query, key, value, scale, causal, window):
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    return plain.attention(
        query, key, value, scale, dew_seen(query, key, causal, window)
    )


def backward2(grad, query, key, value, out, lse, scale, causal, window):
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    seen = dew_seen(query, key, causal, window)
    return plain.backward(query, key, value, lse, out, grad, scale, seen)


def packed_forward2(query, key, value, starts, longest, scale, causal, window):
    seen = dew_seen_packed(query, key, starts, causal, window)
    out, lse = packed_attention(query, key, value, scale, seen, starts, longest)
    # [P, N, longest], with any value after a sequence's last query.
    token = starts[0][:-1, None] + jnp.arange(longest[0])[None]
    dense = lse[:, jnp.minimum(token, len(query) - 1)].swapaxes(0, 1)
    is_own = token < starts[0][1:, None]
    return out, jnp.where(is_own[:, None], dense, jnp.nan)


def packed_backward2(
    grad, query, key, value, out, lse, starts, longest, scale, causal, window
):
    assert lse.shape == (len(starts[0]) - 1, query.shape[1], longest[0])
    token = jnp.arange(len(query))
    sequence = sequence_of(starts[0], len(query))
    lse = lse[sequence, :, token - starts[0][sequence]].T
    seen = dew_seen_packed(query, key, starts, causal, window)
    return packed_backward(query, key, value, lse, out, grad, scale, seen)


def forward3(query, key, value, starts, longest, scale, causal, window):
    assert (starts is None) == (longest is None)
    if starts is None:
        return forward2(query, key, value, scale, causal, window)
    seen = dew_seen_packed(query, key, starts, causal, window)
    return packed_attention(query, key, value, scale, seen, starts, longest)


def backward3(
    grad, query, key, value, out, lse, starts, longest, scale, causal, window
):
    assert (starts is None) == (longest is None)
    if starts is None:
        return backward2(grad, query, key, value, out, lse, scale, causal, window)
    seen = dew_seen_packed(query, key, starts, causal, window)
    return packed_backward(query, key, value, lse, out, grad, scale, seen)


def flash_attn(
    q,
    k,
    v,
    *,
    causal=False,
    window_size=None,
    scale=None,
    mask_mod=None,
    return_lse=False,
    backend=None,
):
    assert return_lse and mask_mod is None and backend == "cute"
    seen = bounded(q, k, *window_size, causal)
    return plain.attention(q, k, v, scale, seen)


def flash_attn_varlen(
    q, k, v, q_starts, kv_starts, *, window_size, scale, return_lse, backend
):
    assert return_lse and backend == "cute"
    starts = q_starts, kv_starts
    seen = seen_packed(starts, q, k, *window_size)
    return packed_attention(q, k, v, scale, seen, starts, (len(q), len(k)))


@dataclasses.dataclass(frozen=True)
class AttnConfig:
    causal: bool
    local: bool
    window: tuple[int | None, int | None]
    scale: float
    mask: Any
    backend: str
    varlen: bool = False


class Backward:
    """The primitive `fa4_vjp_p`."""

    @staticmethod
    def bind(q, k, v, out, lse, d_out, *sequences, cfg, has_d_lse):
        assert cfg.mask is None and cfg.backend == "cute" and not has_d_lse
        # At most one kind of mask, and bounds only for the local one.
        assert not (cfg.causal and cfg.local)
        assert cfg.local == (cfg.window != (None, None))
        if cfg.varlen:
            q_starts, kv_starts, q_used, kv_used = sequences
            assert q_used.shape == kv_used.shape == (len(q_starts) - 1,)
            window = (None, 0) if cfg.causal else cfg.window
            seen = seen_packed((q_starts, kv_starts), q, k, *window)
            return packed_backward(q, k, v, lse, out, d_out, cfg.scale, seen)
        seen = bounded(q, k, *cfg.window, cfg.causal)
        return plain.backward(q, k, v, lse, out, d_out, cfg.scale, seen)


@pytest.fixture
def flash(monkeypatch):
    """Lets "fa2", "fa3" and "fa4" run on any device, in float32 too."""
    dew, fa4 = types.ModuleType("dew_flash_attn"), types.ModuleType("fa4_jax")
    for name, function in (
        ("_forward2", forward2),
        ("_backward2", backward2),
        ("_forward3", forward3),
        ("_backward3", backward3),
        ("_packed_forward2", packed_forward2),
        ("_packed_backward2", packed_backward2),
    ):
        setattr(dew, name, function)
    attention = types.ModuleType("fa4_jax.attention")
    attention.AttnConfig, attention.fa4_vjp_p = AttnConfig, Backward
    fa4.flash_attn, fa4.flash_attn_varlen = flash_attn, flash_attn_varlen
    fa4.attention = attention
    for module in (dew, fa4, attention):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    plain.run_anywhere(monkeypatch, *NAMES)


def dew_seen(query, key, causal, window):
    assert window[1] == 0 if causal else window[1] != 0
    left, right = (None if bound < 0 else bound for bound in window)
    return bounded(query, key, left, right, causal)


def bounded(q, k, left, right, causal):
    """The packages count from the last query and key; negative bounds are none."""
    rows, keys, right = q.shape[1], k.shape[1], 0 if causal else right
    assert left is None or left >= 0
    assert right is None or right >= 0
    # Every row sees a key: the packages differ in the lse of one that sees none.
    assert right is None or keys - rows + right >= 0
    assert left is None or left >= 0
    return plain.band(rows, keys, left, right)


def dew_seen_packed(query, key, starts, causal, window):
    assert window[1] == 0 if causal else window[1] != 0
    left, right = (None if bound < 0 else bound for bound in window)
    return seen_packed(starts, query, key, left, right)


def seen_packed(starts, q, k, left, right):
    """[M, L]: a band of each sequence, counted from its last query and key."""
    assert all(x.dtype == jnp.int32 for x in starts)
    q_of, k_of = (sequence_of(x, len(y)) for x, y in zip(starts, (q, k), strict=True))
    # The distance to the end of the sequence.
    rows, keys = (
        jnp.arange(len(y)) - x[1:][of]
        for x, y, of in zip(starts, (q, k), (q_of, k_of), strict=True)
    )
    ahead = keys[None] - rows[:, None]
    seen = q_of[:, None] == k_of[None]
    if left is not None:
        seen &= ahead >= -left
    return seen if right is None else seen & (ahead <= right)


def sequence_of(starts, length):
    return jnp.searchsorted(starts, jnp.arange(length), side="right") - 1


def packed_attention(q, k, v, scale, seen, starts, longest):
    """One row; a query that sees nothing gets NaN, as all do if starts are wrong."""
    out, lse = plain.attention(q[None], k[None], v[None], scale, seen)
    are_right = jnp.bool_(True)
    for x, y, most in zip(starts, (q, k), longest, strict=True):
        lengths = x[1:] - x[:-1]
        are_right &= (x[0] == 0) & (x[-1] == len(y))
        are_right &= jnp.all((lengths >= 0) & (lengths <= most))
    return jax.tree.map(lambda x: jnp.where(are_right, x[0], jnp.nan), (out, lse))


def packed_backward(q, k, v, lse, out, dout, scale, seen):
    rows = (x[None] for x in (q, k, v, lse, out, dout))
    return tuple(x[0] for x in plain.backward(*rows, scale, seen))
