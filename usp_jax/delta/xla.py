"""The chunk contract in plain XLA: the blockwise form of the gated delta rule.

In a block (arXiv 2412.06464, section 3.3; the WY form of arXiv 2406.06484), with c the
running sum of the log decays, the state S before the block and the writes u,

    L[t, s] = beta[t] · exp(c[t] - c[s]) · k[t]·k[s]      for s < t, else 0
    (I + L) u = beta · v - (beta · exp(c) · k) S          u = U - W S
    out[t] = exp(c[t]) · q[t] S + sum over s <= t of exp(c[t] - c[s]) · (q[t]·k[s]) u[s]
    S' = exp(c[end]) · S + sum over s of exp(c[end] - c[s]) · k[s] u[s]ᵀ

so that only the last two lines, and u, wait for the block before. A factor exp(c[t] -
c[s]) is 0 if a document starts after s, up to t; so is exp(c[t]) after a start in the
block. Only sums of log decays are exponentiated, and nothing is divided.

    tokens [Z, L, ...]
      | scan over segments        one state kept for each
    segment [Z, n, blocks, block, ...]
      | _factors                  all its blocks at once
      | _states                   scan over its blocks

Letters: Z rows, n heads of q and k, g heads of v for each, b blocks, t and s tokens of
a block.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from usp_jax.delta.contract import DeltaChunk, DeltaTokens, Map, Tiles
from usp_jax.varying import vary_like

T = TypeVar("T", DeltaTokens, jax.Array)

# Inverses up to this size are made in whole products, larger ones by blocks.
SMALLEST = 16


def run(
    tokens: DeltaTokens, state: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs chunks from their states: out, states after, and states kept."""

    def body(
        state: jax.Array, segment: DeltaTokens
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out, after = _run(_wide(segment), state, tiles)
        return after, (out.astype(segment.v.dtype), state)

    length = tokens.q.shape[1]
    state, (out, kept) = lax.scan(body, state, _segments(tokens, tiles))
    return _joined(out, length), state, jnp.moveaxis(kept, 0, 1)


def map_of(tokens: DeltaTokens, tiles: Tiles) -> Map:
    """Computes the maps of chunks: a run from the state [I, 0] with values [0, v]."""
    rows, _, n, size = tokens.q.shape
    groups, values = tokens.v.shape[3:]
    identity = jnp.eye(size, size + values, dtype=tokens.beta.dtype)
    start = jnp.broadcast_to(identity, (rows, n, groups, *identity.shape))

    def body(state: jax.Array, segment: DeltaTokens) -> tuple[jax.Array, None]:
        factors = _factors(_wide(segment), tiles)
        widths = [(0, 0)] * 5 + [(size, 0)]
        factors = factors._replace(u=jnp.pad(factors.u, widths))
        return _states(factors, state, tiles)[0], None

    segments = _segments(tokens, tiles)
    state, _ = lax.scan(body, vary_like(start, segments), segments)
    return Map(state[..., :size], state[..., size:])


def run_backward(
    tokens: DeltaTokens,
    kept: jax.Array,
    dout: jax.Array,
    dstate: jax.Array,
    tiles: Tiles,
) -> tuple[DeltaTokens, jax.Array]:
    """The gradients of the tokens and of the incoming states.

    Each segment is run again from its kept state.
    """

    def body(
        dstate: jax.Array, xs: tuple[DeltaTokens, jax.Array, jax.Array]
    ) -> tuple[jax.Array, DeltaTokens]:
        segment, state, dout = xs
        starts = segment.starts
        floats = dataclasses.replace(_wide(segment), starts=None)

        def again(floats: DeltaTokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
            tokens = dataclasses.replace(floats, starts=starts)
            return _run(tokens, state, tiles)

        _, pull = jax.vjp(again, floats, state)
        grads, dstate = pull((dout.astype(dstate.dtype), dstate))
        return dstate, grads

    length = tokens.q.shape[1]
    xs = _segments(tokens, tiles), jnp.moveaxis(kept, 1, 0), _segments(dout, tiles)
    dstate, grads = lax.scan(body, dstate, xs, reverse=True)
    return jax.tree.map(lambda x: _joined(x, length), grads), dstate


def adjoint(tokens: DeltaTokens, dout: jax.Array, tiles: Tiles) -> jax.Array:
    """The gradients of the incoming states for `dout` alone.

    A run is linear in its state, so its transpose needs no states.
    """
    rows, _, n, size = tokens.q.shape
    groups, values = tokens.v.shape[3:]
    none = jnp.zeros((rows, n, groups, size, values), tokens.beta.dtype)

    def body(
        dstate: jax.Array, xs: tuple[DeltaTokens, jax.Array]
    ) -> tuple[jax.Array, None]:
        segment, dout = xs
        wide = _wide(segment)
        _, pull = jax.vjp(lambda state: _run(wide, state, tiles), dstate)
        return pull((dout.astype(dstate.dtype), dstate))[0], None

    xs = _segments(tokens, tiles), _segments(dout, tiles)
    return lax.scan(body, vary_like(none, xs), xs, reverse=True)[0]


XLA = DeltaChunk(run, map_of, run_backward, adjoint)


def _segments(x: T, tiles: Tiles) -> T:
    """[Z, L, ...] -> [segments, Z, tokens of a segment, ...], the last one padded."""

    def cut(x: jax.Array) -> jax.Array:
        rows, length, *rest = x.shape
        padding = -length % tiles.segment
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * len(rest))
        return jnp.moveaxis(x.reshape(rows, -1, tiles.segment, *rest), 1, 0)

    segments: T = jax.tree.map(cut, x)
    return segments


def _wide(segment: DeltaTokens) -> DeltaTokens:
    """The tokens in the dtype of the state. One segment at a time: it takes memory."""
    q, k, v = (x.astype(segment.beta.dtype) for x in (segment.q, segment.k, segment.v))
    return dataclasses.replace(segment, q=q, k=k, v=v)


def _joined(x: jax.Array, length: int) -> jax.Array:
    """[segments, Z, tokens of a segment, ...] -> [Z, L, ...], the inverse."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _run(
    tokens: DeltaTokens, state: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Runs one segment: (out [Z, T, n, g, V], state)."""
    factors = _factors(tokens, tiles)
    after, (states, writes) = _states(factors, state, tiles)
    states, writes = (jnp.moveaxis(x, 0, 3) for x in (states, writes))
    q = _blocks(tokens.q, 1, tiles)
    scores = product("znbtH,znbsH->znbts", q, factors.k, tiles)[:, :, None]
    read = product("znbtH,zngbHV->zngbtV", q, states, tiles)
    own = product("zngbts,zngbsV->zngbtV", factors.decay * scores, writes, tiles)
    out = factors.since[..., None] * read + own
    # [Z, n, g, b, t, V] -> [Z, T, n, g, V]
    out = jnp.moveaxis(out, (3, 4), (1, 2))
    return out.reshape(out.shape[0], tiles.segment, *out.shape[3:]), after


class _Factors(NamedTuple):
    """What the blocks of a segment need in addition to the state, [Z, n, g, b, ...].

    Attributes:
      u, w: [..., t, V] and [..., t, H]; the writes are u - w · state.
      k: the keys, [Z, n, b, t, H].
      decay: [..., t, s], from token s to token t of the block; 0 for s > t.
      since: [..., t], the decay from the start of the block to token t.
    """

    u: jax.Array
    w: jax.Array
    k: jax.Array
    decay: jax.Array
    since: jax.Array


def _factors(tokens: DeltaTokens, tiles: Tiles) -> _Factors:
    k, v = _blocks(tokens.k, 1, tiles), _blocks(tokens.v, 2, tiles)
    beta = _blocks(tokens.beta, 2, tiles)[..., None]
    decay, since = _decays(tokens, tiles)
    keys = product("znbtH,znbsH->znbts", k, k, tiles)[:, :, None]
    pairs = beta * decay * keys
    lower = jnp.where(_like(np.tri(tiles.block, k=-1, dtype=bool), pairs), pairs, 0)
    inverse = lax.stop_gradient(unit_inverse(lower))
    u = _solved(lower, inverse, beta * v, tiles)
    w = _solved(lower, inverse, beta * since[..., None] * k[:, :, None], tiles)
    return _Factors(u, w, k, decay, since)


def _decays(tokens: DeltaTokens, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """`decay` and `since` of `_Factors`."""
    log_decay = _blocks(tokens.log_decay, 2, tiles)
    kept = jnp.tri(tiles.block, dtype=bool)[None, None]
    whole = None
    if tokens.starts is not None:
        starts = tokens.starts.reshape(len(tokens.starts), -1, tiles.block)
        # What is before a start is masked. Its own decay would only cost precision.
        log_decay = jnp.where(starts[:, None, None], 0, log_decay)
        document = jnp.cumsum(starts, 2, dtype=jnp.int32)
        kept = kept & (document[..., :, None] == document[..., None, :])
        whole = (document == 0)[:, None, None]
    # The sum from s to t of each pair, as a product with ones. A difference of running
    # sums would have the error of the larger one: 1e-4 after many decays of -20.
    terms = log_decay[..., None, :]
    parts = jnp.where(_like(np.tri(tiles.block, dtype=bool), terms), terms, 0)
    between = _exact(parts, jnp.tri(tiles.block, k=-1, dtype=parts.dtype))
    decay = jnp.exp(jnp.where(kept[:, None, None], between, -jnp.inf))
    total = jnp.cumsum(log_decay, -1)
    since = jnp.exp(total if whole is None else jnp.where(whole, total, -jnp.inf))
    return decay, since


def _states(
    factors: _Factors, state: jax.Array, tiles: Tiles
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Scans over blocks: the state after, and the states before and writes of each."""

    def body(
        state: jax.Array, xs: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        u, w, k, to_end, whole = xs
        writes = u - product("zngtH,zngHV->zngtV", w, state, tiles)
        kept = to_end[..., None] * writes
        new = product("zntH,zngtV->zngHV", k, kept, tiles)
        return whole[..., None, None] * state + new, (state, writes)

    def by_block(x: jax.Array, axis: int = 3) -> jax.Array:
        return jnp.moveaxis(x, axis, 0)

    to_end, whole = factors.decay[..., -1, :], factors.since[..., -1]
    xs = *map(by_block, (factors.u, factors.w)), by_block(factors.k, 2)
    return lax.scan(body, state, (*xs, by_block(to_end), by_block(whole)))


def _blocks(x: jax.Array, heads: int, tiles: Tiles) -> jax.Array:
    """[Z, T, heads, ...] -> [Z, heads, b, t, ...], where `heads` dims are heads."""
    x = x.reshape(x.shape[0], -1, tiles.block, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (1 + heads, 2 + heads))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _solved(
    lower: jax.Array, inverse: jax.Array, x: jax.Array, tiles: Tiles
) -> jax.Array:
    """Solves (I + lower) y = x, given the inverse of I + lower."""
    return _solved_fwd(lower, inverse, x, tiles)[0]


def _solved_fwd(
    lower: jax.Array, inverse: jax.Array, x: jax.Array, tiles: Tiles
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    del lower
    y = product("zngbts,zngbsV->zngbtV", inverse, x, tiles)
    return y, (inverse, y)


def _solved_bwd(
    tiles: Tiles, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    inverse, y = saved
    dx = product("zngbts,zngbtV->zngbsV", inverse, dy, tiles)
    # With y at hand, the gradient of `lower` takes no product of two inverses.
    dlower = -product("zngbtV,zngbsV->zngbts", dx, y, tiles)
    return dlower, None, dx


_solved.defvjp(_solved_fwd, _solved_bwd)


def unit_inverse(lower: jax.Array) -> jax.Array:
    """The inverse of I + lower, [..., C, C], for a strictly lower triangle.

    [[a, 0], [c, d]] has the inverse [[a', 0], [-d' c a', d']], so inverses of blocks on
    the diagonal are merged in pairs until one is left. No power of `lower` is formed:
    for repeated keys these are large, and cancel.
    """
    size = lower.shape[-1]
    half = min(SMALLEST, size)
    inverse = _small_inverse(_diagonal(lower, 0, half))
    while half < size:
        a, d = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_exact(_exact(d, _diagonal(lower, half, half)), a)
        top = jnp.concatenate([a, jnp.zeros_like(a)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, d], -1)], -2)
        half *= 2
    return inverse[..., 0, :, :]


def _diagonal(x: jax.Array, below: int, size: int) -> jax.Array:
    """Every square of `size` on the diagonal, or `below` it: [..., squares, s, s]."""
    starts = range(0, x.shape[-1], size + below)
    return jnp.stack(
        [x[..., i + below : i + below + size, i : i + size] for i in starts], -3
    )


def _small_inverse(lower: jax.Array) -> jax.Array:
    """The inverse of I + lower by the same merges, all of a size in two products."""
    size = lower.shape[-1]
    rows, columns = np.indices((size, size))
    inverse = jnp.eye(size, dtype=lower.dtype)
    inverse = jnp.broadcast_to(inverse, lower.shape)
    half = 1
    while half < size:
        # The squares below the diagonal, between two blocks that are merged.
        is_corner = (rows // half % 2 == 1) & (columns // half == rows // half - 1)
        corner = jnp.where(_like(is_corner, lower), lower, 0)
        change = corner if half == 1 else _exact(_exact(inverse, corner), inverse)
        inverse, half = inverse - change, 2 * half
    return inverse


def _like(x: np.ndarray, y: jax.Array) -> np.ndarray:
    """Adds dims of size 1 in front, up to those of y."""
    return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def product(spec: str, x: jax.Array, y: jax.Array, tiles: Tiles) -> jax.Array:
    """`jnp.einsum`, in the precision of the tiles."""
    precision = lax.Precision.HIGHEST if tiles.exact else lax.Precision.DEFAULT
    return jnp.einsum(spec, x, y, precision=precision)
