"""Runs and maps of chunks in Pallas for TPU; the state stays in vector memory.

The blockwise form of `xla.py`, whose unknowns are here the errors e = v - S'ᵀ k of a
block's tokens (arXiv 2412.06464, equation 10). With c the running sum of the log decays
and S the state before the block,

    D[t, s] = exp(c[t] - c[s]) · k[t]·k[s] · beta[s]     for s < t, else 0
    A[t, s] = exp(c[t] - c[s]) · q[t]·k[s] · beta[s]     for s <= t, else 0
    (I + D) e = v - exp(c) · k S
    out = exp(c) · q S + A e
    S' = exp(c[end]) · S + sum over s of exp(c[end] - c[s]) · beta[s] · k[s] e[s]ᵀ

    grid (rows, groups of heads, steps of a chunk)
      | _factors     of all blocks of a step at once: (I + D)^-1, A and decays
      | _advance     block after block: e, out, and the state

Steps are in order, and the state stays where the state after the chunk goes. Sums of
log decays are made of the terms in between, so that the start of a document is a log
decay after which nothing is left.

Forwards only: gradients are those of `xla.py`. It is compiled for TPUs and interpreted
by the tests, but has never run on a TPU, so no call takes it unless asked to.

Letters: h heads of q and k, g heads of v for each, b blocks, t and s tokens of a block.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from usp_jax._compat import Ref
from usp_jax.delta.contract import DeltaChunk, DeltaTokens, Map, Tiles
from usp_jax.delta.xla import adjoint, run_backward
from usp_jax.kernels.mosaic_tpu.launch import Interpret, varied
from usp_jax.varying import varying_like

LANES = 128

# Rows of a register of 16-bit numbers.
ROWS = 16

# The most blocks of a step, over all heads of v. They fill each other's waits, best if
# they are of different heads: 16 heads with a block each take 25 % fewer cycles a token
# than 4 heads with 4 blocks. Twice as many blocks would save 4 % more.
MOST_BLOCKS = 16

# A log decay after which nothing is left. Sums of some of them are finite.
NOTHING_LEFT = -1e30

VMEM_MIB = 32


def chunk(interpret: Interpret = False) -> DeltaChunk:
    """The functions of the contract; gradients are those of `xla.py`."""
    return DeltaChunk(
        partial(run, interpret=interpret),
        partial(map_of, interpret=interpret),
        run_backward,
        adjoint,
    )


def run(
    tokens: DeltaTokens, state: jax.Array, tiles: Tiles, *, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs chunks from their states: out, states after, and states kept.

    Args:
      interpret: whether, and how, to run in jax's interpreter of TPU kernels.

    Raises:
      NotImplementedError: it is interpreted inside a `jax.shard_map` that checks which
        values vary.
    """
    cut = Cut.of(tokens, tokens.v.shape[4], tiles, reads=True)
    after, out, kept = _call(cut, tokens, tokens.v, state, interpret)
    return cut.to_tokens(out, tokens.v), cut.to_state(after), cut.to_state(kept)


def map_of(tokens: DeltaTokens, tiles: Tiles, *, interpret: Interpret = False) -> Map:
    """Computes the maps of chunks: a run from the state [I, 0] with values [0, v].

    Args:
      interpret: as in `run`.
    """
    size, values = tokens.q.shape[3], tokens.v.shape[4]
    cut = Cut.of(tokens, size + values, tiles, reads=False)
    start = jnp.eye(size, size + values, dtype=tokens.beta.dtype)
    start = jnp.broadcast_to(start, (cut.rows, cut.n, cut.groups, *start.shape))
    v = jnp.pad(tokens.v, [(0, 0)] * 4 + [(size, 0)])
    (after,) = _call(cut, tokens, v, start, interpret)
    state = cut.to_state(after)
    return Map(state[..., :size], state[..., size:])


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the kernel cuts chunks into steps, and pads them.

    Attributes:
      rows, length, n, groups, size, values: Z, L, n, g, H and V of the arrays.
      heads, blocks: heads of q and k, and blocks, of a step.
      reads: whether `out` is computed, and states are kept.
    """

    rows: int
    length: int
    n: int
    groups: int
    size: int
    values: int
    tiles: Tiles
    heads: int
    blocks: int
    reads: bool

    @classmethod
    def of(cls, tokens: DeltaTokens, values: int, tiles: Tiles, reads: bool) -> "Cut":
        """The cut of some chunks, with heads of v of a size."""
        rows, length, n, size = tokens.q.shape
        groups = tokens.v.shape[3]
        heads = _divisor(n, MOST_BLOCKS // groups)
        blocks = _divisor(tiles.blocks, MOST_BLOCKS // (groups * heads))
        return cls(rows, length, n, groups, size, values, tiles, heads, blocks, reads)

    @property
    def padded(self) -> int:
        """Tokens of a chunk, a multiple of a segment."""
        return self.length + -self.length % self.tiles.segment

    @property
    def step(self) -> int:
        """Tokens of a step."""
        return self.blocks * self.tiles.block

    @property
    def steps(self) -> int:
        """Steps of a segment."""
        return self.tiles.blocks // self.blocks

    @property
    def state(self) -> tuple[int, int, int]:
        """The shape of the states of a head of k: [g, H, V], padded."""
        return self.groups, _to_lanes(self.size), _to_lanes(self.values)

    def tokens(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """[Z, L, ..., H or V] -> [Z, padded L, heads · padded H or V]"""
        widths = [(0, 0)] * x.ndim
        widths[1] = 0, self.padded - self.length
        widths[-1] = 0, -x.shape[-1] % LANES
        return jnp.pad(x.astype(dtype), widths).reshape(self.rows, self.padded, -1)

    def to_tokens(self, out: jax.Array, v: jax.Array) -> jax.Array:
        """The inverse, for an `out` like v."""
        out = out.reshape(self.rows, self.padded, self.n, self.groups, -1)
        return out[:, : self.length, ..., : self.values].astype(v.dtype)

    def gates(self, x: jax.Array) -> jax.Array:
        """[Z, L, n, g] -> [Z, n, steps, b · g, t]"""
        widths = (0, 0), (0, self.padded - self.length), (0, 0), (0, 0)
        shape = -1, self.blocks, self.tiles.block, self.n, self.groups
        x = jnp.pad(x, widths).reshape(self.rows, *shape)
        x = x.transpose(0, 4, 1, 2, 5, 3)
        return x.reshape(*x.shape[:3], -1, self.tiles.block)

    def states(self, x: jax.Array) -> jax.Array:
        """Pads [..., H, V]."""
        widths = [(0, 0)] * (x.ndim - 2) + [(0, -size % LANES) for size in x.shape[-2:]]
        return jnp.pad(x, widths)

    def to_state(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        return x[..., : self.size, : self.values]


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, or 1."""
    return max(i for i in range(1, max(most, 1) + 1) if n % i == 0)


def _to_lanes(size: int) -> int:
    return size + -size % LANES


def _call(
    cut: Cut,
    tokens: DeltaTokens,
    v: jax.Array,
    state: jax.Array,
    interpret: Interpret,
) -> tuple[jax.Array, ...]:
    """Runs the kernel: the states after, and if it reads, out and the states kept."""
    groups, size, values = cut.state
    wide = state.dtype
    narrow = wide if cut.tiles.exact else jnp.bfloat16
    # The values are no factors of a product, so float16 must not lose digits.
    v_dtype = v.dtype if v.dtype == narrow else wide
    log_decay = tokens.log_decay
    if tokens.starts is not None:
        starts = tokens.starts[:, :, None, None]
        log_decay = jnp.where(starts, NOTHING_LEFT, log_decay)
    qk_spec = pl.BlockSpec(
        (None, cut.step, cut.heads * size), lambda z, h, step: (z, step, h)
    )
    v_spec = pl.BlockSpec(
        (None, cut.step, cut.heads * groups * values), lambda z, h, step: (z, step, h)
    )
    gate_spec = pl.BlockSpec(
        (None, cut.heads, None, groups * cut.blocks, cut.tiles.block),
        lambda z, h, step: (z, h, step, 0, 0),
    )
    state_spec = pl.BlockSpec(
        (None, cut.heads, *cut.state), lambda z, h, step: (z, h, 0, 0, 0)
    )
    kept_spec = pl.BlockSpec(
        (None, None, cut.heads, *cut.state),
        lambda z, h, step: (z, lax.div(step, np.int32(cut.steps)), h, 0, 0, 0),
    )
    operands = [
        cut.tokens(tokens.k, narrow),
        cut.tokens(v, v_dtype),
        cut.gates(log_decay),
        cut.gates(tokens.beta),
        cut.states(state),
    ]
    in_specs = [qk_spec, v_spec, gate_spec, gate_spec, state_spec]
    segments = cut.padded // cut.tiles.segment
    shapes: list[tuple[tuple[int, ...], DTypeLike]]
    shapes = [((cut.rows, cut.n, *cut.state), wide)]
    out_specs = [state_spec]
    if cut.reads:
        operands.append(cut.tokens(tokens.q, narrow))
        in_specs.append(qk_spec)
        shapes += [
            ((cut.rows, cut.padded, cut.n * groups * values), v_dtype),
            ((cut.rows, segments, cut.n, *cut.state), wide),
        ]
        out_specs += [v_spec, kept_spec]
    operands = varied(operands, interpret)
    results: tuple[jax.Array, ...] = pl.pallas_call(
        partial(_kernel, cut=cut),
        name="usp_gated_delta",
        grid=(cut.rows, cut.n // cut.heads, segments * cut.steps),
        in_specs=in_specs,
        out_specs=tuple(out_specs),
        out_shape=tuple(varying_like(operands[0], *shape) for shape in shapes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_MIB * 2**20,
        ),
        interpret=interpret,
    )(*operands)
    return results


def _kernel(
    k: Ref,
    v: Ref,
    log_decay: Ref,
    beta: Ref,
    start: Ref,
    *refs: Ref,
    cut: Cut,
) -> None:
    q, after, out, kept = refs if cut.reads else (None, *refs, None, None)
    step = pl.program_id(2)

    @pl.when(step == 0)
    def begin() -> None:
        after[...] = start[...]

    if kept is not None:

        @pl.when(lax.rem(step, np.int32(cut.steps)) == 0)
        def keep() -> None:
            kept[...] = after[...]

    keys = _by_block(k, cut.heads, cut)
    both = keys
    if q is not None:
        both = jnp.concatenate([keys, _by_block(q, cut.heads, cut)], 1)
    factors = _factors(keys, both, _rows(log_decay, cut), _rows(beta, cut), cut)
    values = _by_block(v, cut.heads * cut.groups, cut)
    state = after[...].reshape(-1, *cut.state[1:])
    of_step = _Block(keys, both, values, factors)
    for block in range(cut.blocks):
        own = jax.tree.map(partial(_part, index=block, parts=cut.blocks), of_step)
        state, read = _advance(state, own, cut)
        if out is not None:
            tokens = slice(block * cut.tiles.block, (block + 1) * cut.tiles.block)
            out[tokens] = jnp.concatenate(list(read), 1).astype(out.dtype)
    after[...] = state.reshape(after.shape)


def _part(x: jax.Array, index: int, parts: int) -> jax.Array:
    size = len(x) // parts
    return x[index * size : (index + 1) * size]


def _by_block(ref: Ref, heads: int, cut: Cut) -> jax.Array:
    """[b · t, heads · H] -> [b · heads, t, H]"""
    size, block = ref.shape[1] // heads, cut.tiles.block
    return jnp.stack(
        [
            ref[b * block : (b + 1) * block, i * size : (i + 1) * size]
            for b in range(cut.blocks)
            for i in range(heads)
        ]
    )


def _rows(ref: Ref, cut: Cut) -> jax.Array:
    """[h, b · g, t] -> [b · h · g, 1, t]"""
    return jnp.stack(
        [
            ref[h, b * cut.groups + g : b * cut.groups + g + 1]
            for b in range(cut.blocks)
            for h in range(cut.heads)
            for g in range(cut.groups)
        ]
    )


class _Factors(NamedTuple):
    """What the blocks of a step need in addition to the state, [b · h · g, ...].

    Attributes:
      solve: (I + D)^-1, [..., t, s].
      own: A, [..., t, s]; 0 if nothing is read.
      since: exp(c), [..., t, LANES], the same in all lanes.
      to_end: exp(c[end] - c) · beta, [..., t, 1].
    """

    solve: jax.Array
    own: jax.Array
    since: jax.Array
    to_end: jax.Array


def _factors(
    keys: jax.Array, both: jax.Array, log_decay: jax.Array, beta: jax.Array, cut: Cut
) -> _Factors:
    """Computes the factors from keys, keys and queries, and the gates as rows."""
    block, dtype = cut.tiles.block, beta.dtype
    row, column = _indices(block)
    sums = _sums(log_decay)
    since = jnp.exp(sums[..., -LANES:])
    weights = jnp.where(row >= column, jnp.exp(sums[..., :block]), 0) * beta
    to_end = jnp.where(row == column, weights[:, -1:], 0).sum(-1, keepdims=True)
    scores = _product(both, keys, 2, dtype)
    shape = len(scores), cut.groups, *scores.shape[1:]
    scores = jnp.broadcast_to(scores[:, None], shape).reshape(-1, *shape[2:])
    lower = jnp.where(row > column, weights * scores[:, :block], 0)
    solve = _factor(_inverse(lower, cut.tiles.exact), cut)
    own = _factor(weights * scores[:, -block:], cut)
    return _Factors(solve, own, since, to_end)


def _indices(block: int) -> tuple[jax.Array, jax.Array]:
    """Rows and columns of a square, [1, block, block]."""
    shape = 1, block, block
    row, column = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (1, 2))
    return row, column


def _sums(log_decay: jax.Array) -> jax.Array:
    """Sums of log decays, [x, 1, t] -> [x, t, s and LANES].

    After token s up to t, for each s; and from the start of the block up to t, the same
    in all lanes. Each sum is a product of its terms and ones; three parts of 16 bits
    hold a term exactly.
    """
    count, _, block = log_decay.shape
    parts = _parts(log_decay)
    depth, width = parts.shape[2], -(-block // LANES) * LANES + LANES
    token, term = (lax.broadcasted_iota(jnp.int32, (block, depth), i) for i in (0, 1))
    terms = jnp.where(((term & (block - 1)) <= token)[None], parts, 0)
    term, after = (lax.broadcasted_iota(jnp.int32, (depth, width), i) for i in (0, 1))
    counts = ((term & (block - 1)) > after) | (after >= width - LANES)
    dtype = log_decay.dtype if depth == block else jnp.bfloat16
    terms = terms.astype(dtype).reshape(-1, depth)
    sums = _dot(terms, jnp.where(counts, 1.0, 0.0).astype(dtype), log_decay.dtype)
    return sums.reshape(count, block, width)


def _parts(x: jax.Array) -> jax.Array:
    """Numbers of 16 bits that add up to x, side by side; x itself in float64."""
    if x.dtype == jnp.float64:
        return x
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(x.dtype))
        x = x - parts[-1]
    return jnp.concatenate(parts, -1)


def _inverse(lower: jax.Array, exact: bool) -> jax.Array:
    """The inverse of I + lower by merging pairs of blocks, as `xla.unit_inverse` does.

    All blocks of a size are merged in two products.
    """
    block = lower.shape[-1]
    row, column = _indices(block)
    inverse = jnp.where(row == column, 1.0, 0.0).astype(lower.dtype)
    half = 1
    while half < block:
        # Rows of the second of two blocks that are merged, and columns of the first.
        corner = ((row & half) != 0) & (((row ^ column) & -half) == half)
        change = jnp.where(corner, lower, 0)
        if half >= ROWS:
            # Only the rows of second blocks change.
            pairs = len(lower), -1, 2, half, block
            second = inverse.reshape(pairs)[:, :, 1].reshape(len(lower), -1, block)
            change = _fine(_fine(second, change, exact), inverse, exact)
            change = change.reshape(len(lower), -1, half, block)
            change = jnp.stack([jnp.zeros_like(change), change], 2)
            change = change.reshape(inverse.shape)
        elif half > 1:
            change = _fine(_fine(inverse, change, exact), inverse, exact)
        inverse, half = inverse - change, 2 * half
    return inverse


class _Block(NamedTuple):
    """One block of each head, or all blocks of a step.

    Attributes:
      keys: [h, t, H].
      both: keys and queries, or keys alone, along t.
      values: [h · g, t, V].
    """

    keys: jax.Array
    both: jax.Array
    values: jax.Array
    factors: _Factors


def _advance(state: jax.Array, own: _Block, cut: Cut) -> tuple[jax.Array, jax.Array]:
    """Runs one block of each head: the states after, and out, [h · g, ...]."""
    block, dtype = cut.tiles.block, state.dtype
    solve, scores, since, to_end = own.factors
    since = jnp.concatenate([since] * (state.shape[2] // LANES), 2)
    read = _product(own.both, _factor(_side_by_side(state, cut), cut), 1, dtype)
    read = _apart(read, cut)
    errors = own.values.astype(dtype) - since * read[:, :block]
    errors = _product(solve, _factor(errors, cut), 1, dtype)
    out = since * read[:, -block:]
    if cut.reads:
        out = out + _product(scores, _factor(errors, cut), 1, dtype)
    writes = _factor(_side_by_side(to_end * errors, cut), cut)
    new = _apart(_product(own.keys.swapaxes(1, 2), writes, 1, dtype), cut)
    return since[:, -1:] * state + new, out


def _side_by_side(x: jax.Array, cut: Cut) -> jax.Array:
    """[h · g, ..., V] -> [h, ..., g · V]"""
    x = x.reshape(-1, cut.groups, *x.shape[1:])
    return jnp.concatenate([x[:, g] for g in range(cut.groups)], 2)


def _apart(x: jax.Array, cut: Cut) -> jax.Array:
    """[h, ..., g · V] -> [h · g, ..., V], the inverse"""
    size = x.shape[2] // cut.groups
    parts = [x[:, :, g * size : (g + 1) * size] for g in range(cut.groups)]
    return jnp.stack(parts, 1).reshape(-1, x.shape[1], size)


def _factor(x: jax.Array, cut: Cut) -> jax.Array:
    """A factor of a product, in the precision of the tiles."""
    return x if cut.tiles.exact else x.astype(jnp.bfloat16)


def _fine(x: jax.Array, y: jax.Array, exact: bool) -> jax.Array:
    """x · y with 16 bits of mantissa, or exact."""
    if exact:
        return _product(x, y, 1, x.dtype)
    (x_high, x_low), (y_high, y_low) = map(_halves, (x, y))
    x = jnp.concatenate([x_high, x_low, x_high], 2)
    y = jnp.concatenate([y_high, y_high, y_low], 1)
    return _product(x, y, 1, jnp.float32)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def _product(x: jax.Array, y: jax.Array, axis: int, dtype: DTypeLike) -> jax.Array:
    """Multiplies [x, m, k] by [x, k, n], or by [x, n, k] if `axis` of y is 2."""
    return _dot(x, y, dtype, (((2,), (axis,)), ((0,), (0,))))


def _dot(
    x: jax.Array,
    y: jax.Array,
    dtype: DTypeLike,
    dims: lax.DotDimensionNumbers = (((1,), (0,)), ((), ())),
) -> jax.Array:
    narrow = x.dtype == jnp.bfloat16
    return lax.dot_general(
        x,
        y,
        dims,
        precision=lax.Precision.DEFAULT if narrow else lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
