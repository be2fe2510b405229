"""The chunk contract in Pallas for TPU (FlashAttention-2, arXiv 2307.08691).

Both kernels walk a list of the blocks of (queries, keys) that the mask lets see each
other. The list is scalar-prefetched, so that index maps read it: a block that is not
listed is neither fetched nor a step of the grid, whose length is the list's. Listed
blocks carry their kind; only PARTIAL ones evaluate the mask.

The forward's list is sorted by block of queries. Its accumulator is the result itself,
initialised from the carry and normalised at the end of each run of the list.

The backward's is sorted by block of keys and makes all three gradients in one walk,
five matrix products a block (Algorithm 2): dk and dv accumulate in their result blocks
over a run and over the query heads of the key head; a block of dq is read from HBM,
added to and written back at each visit, in the background of the products. One core
makes all visits of a block, in order, so the sum is the same each time.

Arrays have heads in front of tokens, [B, N, T, H]. What is one number per token (lse,
delta, positions, ids) is a row [B, N or 1, 1, T] of HBM; the forward, which has queries
along sublanes, turns it into a column once per run, and the backward has keys along
sublanes for the same reason. Logits have base 2: exp2 is what the hardware has.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from usp_jax._compat import vary_over, varying_axes, varying_like
from usp_jax.kernels.choice import Target
from usp_jax.kernels.walk import Walk
from usp_jax.masking import (
    EMPTY,
    FULL,
    PARTIAL,
    Mask,
    Tokens,
    block_kinds,
    pad_tokens,
    sees,
)
from usp_jax.merge import finite

LANES = 128
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The tiles of one kernel.

    Attributes:
      q: queries of a block.
      kv: keys of a block.
      kv_compute: keys multiplied at a time; bounds the scores that exist at once.
    """

    q: int = 512
    kv: int = 512
    kv_compute: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < LANES or size % LANES:
                raise ValueError(
                    f"BlockSizes.{field.name}={size} must be a positive multiple of "
                    f"{LANES}"
                )
        if self.kv % self.kv_compute:
            raise ValueError(
                f"BlockSizes.kv={self.kv} must be a multiple of {self.kv_compute=}"
            )


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Block sizes of both kernels, and the vector memory that they may use."""

    forward: BlockSizes
    backward: BlockSizes
    vmem_bytes: int

    @classmethod
    def of_device(cls, kind: str) -> "Tuning":
        """The defaults for a device kind, as `jax.Device.device_kind` names it."""
        mib = 2**20
        if kind.startswith(("TPU v5 lite", "TPU v6")):
            return cls(
                BlockSizes(1024, 1024, 512), BlockSizes(1024, 1024, 512), 64 * mib
            )
        if kind.startswith(("TPU v5", "TPU7", "TPU v7")):
            return cls(
                BlockSizes(1024, 1024, 512), BlockSizes(1024, 1024, 512), 48 * mib
            )
        return cls(BlockSizes(512, 512, 512), BlockSizes(512, 512, 256), 16 * mib)


def chunk_forward(
    q,
    k,
    v,
    mask,
    carry,
    logits,
    *,
    target: Target,
    tuning: Tuning | None = None,
    interpret=False,
):
    """Attention of q over k, v, merged into `carry`.

    Args:
      target: the device, which gives the block sizes where there is no `tuning`.
    """
    q, k, v = _multipliable(q, k, v)
    tuning = tuning or Tuning.of_device(target.kind)
    cut = _Cut.of(q, k, mask, tuning.forward)
    walk = Walk.of(cut.kinds, cut.batch, visit_all=carry is None)
    num_heads, group = q.shape[2], q.shape[2] // k.shape[2]

    def place(b, n, t, *lists):
        b, i, j = walk.blocks(lists, b, t)
        return _Place(b, n, n // group, i, j)

    specs = _Specs(cut, place)
    operands = (cut.tokens, cut.q(q), cut.kv(k), cut.kv(v))
    results = (
        jax.ShapeDtypeStruct((*operands[1].shape[:3], v.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((cut.batch, num_heads, 1, cut.q_padded), jnp.float32),
    )
    result_specs = (specs.q(v.shape[-1]), specs.row())
    if carry is not None:
        carry = cut.q(carry[0]), cut.row(carry[1], -jnp.inf)
    elif walk.calls > 1:
        # No call visits all blocks: what it leaves alone must be there before.
        carry = tuple(
            jnp.full(x.shape, fill)
            for x, fill in zip(results, (0.0, -jnp.inf), strict=True)
        )
    kernel = _Kernel(
        partial(
            _forward_kernel,
            walk=walk,
            rule=mask.rule,
            logits=logits,
            kv_compute=cut.kv_compute,
            may_mask=not cut.mask.sees_all,
        ),
        name="usp_flash_forward",
        grid=(num_heads,),
        scratch=(
            pltpu.VMEM((cut.block_q, LANES), jnp.float32),
            pltpu.VMEM((cut.block_q, LANES), jnp.float32),
            pltpu.VMEM((2, cut.block_q, LANES), jnp.int32),
        ),
        results=results,
        result_specs=result_specs,
        state_specs=result_specs,
        vmem_bytes=tuning.vmem_bytes,
        cost=cut.cost(q, k, num_products=2),
        interpret=interpret,
    )
    operand_specs = (
        specs.tokens(),
        specs.q(q.shape[-1]),
        specs.kv(k.shape[-1]),
        specs.kv(v.shape[-1]),
    )
    out, lse = kernel.run(walk, operands, operand_specs, carry)
    return cut.from_q(out), cut.from_row(lse)


def _forward_kernel(
    lists,
    operands,
    carry,
    results,
    scratch,
    *,
    walk,
    rule,
    logits,
    kv_compute,
    may_mask,
):
    (q_tokens, kv_tokens), q, k, v = operands
    (out, lse), (m, l, columns) = results, scratch
    step = walk.step(lists, pl.program_id(0), pl.program_id(2))

    @pl.when(step.first)
    def _():
        _save_columns(columns, q_tokens)
        if carry is None:
            m[...] = jnp.full_like(m, -jnp.inf)
            l[...] = jnp.zeros_like(l)
            out[...] = jnp.zeros_like(out)
        else:
            # A finished row is a running one whose sum, over lanes, is 1 at its lse.
            m[...] = _column(carry[1][...]) * LOG2_E
            l[...] = jnp.where(m[...] == -jnp.inf, 0.0, 1 / LANES)
            out[...] = carry[0][...]

    def attend(masked):
        for keys in _pieces(k.shape[0], kv_compute):
            s, _ = _base2(logits, _dot(q[...], k[keys], 1, 1))
            if masked:
                tokens_q = _load_columns(columns, q_tokens, s.shape[1])
                tokens_kv = jax.tree.map(lambda x, keys=keys: x[:, keys], kv_tokens)
                s = jnp.where(sees(rule, tokens_q, tokens_kv), s, -jnp.inf)
            m_next = jnp.maximum(m[...], s.max(1, keepdims=True))
            safe = finite(m_next) if masked else m_next
            p = jnp.exp2(s - _tile(safe, s.shape[1]))
            decay = jnp.exp2(m[...] - safe)
            l[...] = l[...] * decay + _sum_to_lanes(p)
            pv = _dot(p.astype(v.dtype), v[keys], 1, 0)
            out[...] = out[...] * _tile(decay, pv.shape[1]) + pv
            m[...] = m_next

    _when_listed(step, attend, may_mask=may_mask)

    @pl.when(step.last)
    def _():
        total = l[...].sum(1, keepdims=True)
        unseen = total == 0
        safe = jnp.where(unseen, 1.0, total)
        out[...] = out[...] / safe
        natural = jnp.where(unseen, -jnp.inf, m[...] / LOG2_E + jnp.log(safe))
        lse[...] = natural.T[:1]


def chunk_backward(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    mask,
    logits,
    *,
    target: Target,
    tuning: Tuning | None = None,
    interpret=False,
):
    """dq, dk, dv of one chunk from the global lse and delta."""
    q, k, v, dout = _multipliable(q, k, v, dout.astype(q.dtype))
    tuning = tuning or Tuning.of_device(target.kind)
    cut = _Cut.of(q, k, mask, tuning.backward)
    walk = Walk.of(cut.kinds.swapaxes(1, 2), cut.batch, visit_all=False)
    num_kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]

    def place(b, h, t, g, *lists):
        b, j, i = walk.blocks(lists, b, t)
        return _Place(b, h * group + g, h, i, j)

    specs = _Specs(cut, place)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    queries, keys, values = cut.q(q), cut.kv(k), cut.kv(v)
    operands = (
        cut.tokens,
        *(queries, cut.q(dout), keys, values),
        # Rows without a visible key have every score masked, whatever is subtracted.
        *(cut.row(finite(lse) * LOG2_E, 0), cut.row(delta, 0)),
    )
    operand_specs = (
        specs.tokens(),
        *(specs.q(q.shape[-1]), specs.q(v.shape[-1])),
        *(specs.kv(k.shape[-1]), specs.kv(v.shape[-1])),
        *(specs.row(), specs.row()),
    )
    results = tuple(
        jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (queries, keys, values)
    )
    kernel = _Kernel(
        partial(
            _backward_kernel,
            walk=walk,
            rule=mask.rule,
            logits=logits,
            kv_compute=cut.kv_compute,
            may_mask=not cut.mask.sees_all,
            group=group,
        ),
        name="usp_flash_backward",
        grid=(num_kv_heads, group),
        scratch=(
            pltpu.VMEM((2, cut.block_kv, LANES), jnp.int32),
            pltpu.VMEM((3, cut.block_q, q.shape[-1]), jnp.float32),
            pltpu.SemaphoreType.DMA((3,)),
            pltpu.SemaphoreType.DMA((3,)),
        ),
        results=results,
        result_specs=(in_hbm, specs.kv(k.shape[-1]), specs.kv(v.shape[-1])),
        state_specs=(in_hbm,) * 3,
        vmem_bytes=tuning.vmem_bytes,
        cost=cut.cost(q, k, num_products=5),
        interpret=interpret,
    )
    # What no step visits is 0.
    zeros = tuple(jnp.zeros(x.shape, x.dtype) for x in results)
    dq, dk, dv = kernel.run(walk, operands, operand_specs, zeros)
    return cut.from_q(dq), cut.from_kv(dk), cut.from_kv(dv)


def _backward_kernel(
    lists,
    operands,
    zeros,
    results,
    scratch,
    *,
    walk,
    rule,
    logits,
    kv_compute,
    may_mask,
    group,
):
    del zeros
    (q_tokens, kv_tokens), q, do, k, v, lse, delta = operands
    dq_hbm, dk, dv = results
    columns, dq_blocks, reads, writes = scratch
    b, h, t, g = (pl.program_id(axis) for axis in range(4))
    step = walk.step(lists, b, t)
    row, _, _ = walk.blocks(lists, b, t)
    unscaled = dataclasses.replace(logits, scale=1.0)
    dq = _InPlace(
        hbm=dq_hbm,
        blocks=dq_blocks,
        reads=reads,
        writes=writes,
        row=row,
        head=h * group,
        group=group,
        count=step.count,
        minor=lambda t: walk.entry(lists, b, t)[1],
        t=t,
        g=g,
    )

    # An EMPTY entry stands alone in its list: no copy waits for one that is not made.
    visited = step.listed & (step.kind != EMPTY)
    pl.when(visited)(dq.begin)

    @pl.when(step.first & (g == 0))
    def _():
        _save_columns(columns, kv_tokens)
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def attend(masked):
        total = None
        for keys in _pieces(k.shape[0], kv_compute):
            s, natural = _base2(logits, _dot(k[keys], q[...], 1, 1))
            p = jnp.exp2(s - lse[...])
            if masked:
                tokens_kv = _load_columns(columns, kv_tokens, s.shape[1], keys)
                tokens_q = jax.tree.map(lambda x: x[...], q_tokens)
                p = jnp.where(sees(rule, tokens_q, tokens_kv), p, 0.0)
            dp = _dot(v[keys], do[...], 1, 1)
            # The scale is left to the sums, which are smaller.
            ds = unscaled.pull_back(p * (dp - delta[...]), natural).astype(q.dtype)
            dv[keys] += _dot(p.astype(do.dtype), do[...], 1, 0)
            dk[keys] += _dot(ds, q[...], 1, 0)
            part = _dot(ds, k[keys], 0, 0)
            total = part if total is None else total + part
        dq.add(total * logits.scale)

    _when_listed(step, attend, may_mask=may_mask)

    pl.when(visited)(dq.end)

    @pl.when(step.last & (g == group - 1))
    def _():
        dk[...] *= logits.scale


@dataclasses.dataclass(frozen=True)
class _InPlace:
    """Adds to blocks of an array in HBM, one a step, behind the computation.

    Step n = t * group + g adds to block `minor(t)` of head `head + g`. Its block is
    read during step n - 1 and written during step n + 1, in the (n mod 3)th of three
    buffers. Only if steps n - 1 or n - 2 write the very same block is it read in step n
    itself, after those writes.
    """

    hbm: Any
    blocks: Any
    reads: Any
    writes: Any
    row: Any
    head: Any
    group: int
    count: Any
    minor: Any
    t: Any
    g: Any

    def begin(self):
        """Starts this step's read, if it had to wait, and the next one's."""
        t, g, n = self.t, self.g, self.t * self.group + self.g
        again = self._again(t)

        # Where the step before had to wait for this write, it has done so.
        before = jnp.where(g == 0, t - 1, t)
        pl.when((n >= 2) & ~self._again(before))(self._write(n - 2).wait)

        @pl.when(again)
        def _():
            self._write(n - 1).wait()
            self._read(t, g, n).start()

        pl.when(n == 0)(self._read(t, g, n).start)
        g_next = jnp.where(g + 1 == self.group, 0, g + 1)
        t_next = jnp.where(g + 1 == self.group, t + 1, t)
        more = (t_next < self.count) & ~self._again(t_next)
        pl.when(more)(
            self._read(jnp.minimum(t_next, self.count - 1), g_next, n + 1).start
        )

    def add(self, x):
        """Adds this step's part."""
        n = self.t * self.group + self.g
        self._read(self.t, self.g, n).wait()
        self.blocks[n % 3] += x

    def end(self):
        """Starts this step's write; the last step waits for all."""
        t, n = self.t, self.t * self.group + self.g
        self._write(n).start()

        @pl.when(n + 1 == self.count * self.group)
        def _():
            pl.when((n >= 1) & ~self._again(t))(self._write(n - 1).wait)
            self._write(n).wait()

    def _again(self, t):
        """Whether one of the two steps before those of entry t has the same block."""
        # Steps of different heads have different blocks.
        back = range(1, 2 // self.group + 1)
        same = [
            (t >= d) & (self.minor(t) == self.minor(jnp.maximum(t - d, 0)))
            for d in back
        ]
        return functools.reduce(jnp.logical_or, same, jnp.bool_(False))

    def _block(self, t, g):
        size = self.blocks.shape[1]
        tokens = pl.ds(self.minor(t) * size, size)
        return self.hbm.at[self.row, self.head + g, tokens]

    def _read(self, t, g, n):
        slot = n % 3
        block, semaphore = self._block(t, g), self.reads.at[slot]
        return pltpu.make_async_copy(block, self.blocks.at[slot], semaphore)

    def _write(self, n):
        # Whoever waits asks for the semaphore only, and which block it was is the same.
        slot = jnp.maximum(n, 0) % 3
        block, semaphore = self._block(self.t, self.g), self.writes.at[slot]
        return pltpu.make_async_copy(self.blocks.at[slot], block, semaphore)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How one chunk is padded to whole blocks."""

    batch: int
    q_length: int
    kv_length: int
    block_q: int
    block_kv: int
    kv_compute: int
    mask: Mask

    @classmethod
    def of(cls, q, k, mask, blocks):
        lengths = q.shape[1], k.shape[1]
        block_q, block_kv = map(_block, lengths, (blocks.q, blocks.kv))
        pad_q, pad_kv = -lengths[0] % block_q, -lengths[1] % block_kv
        with_ids = bool(pad_q or pad_kv)
        mask = Mask(
            mask.rule,
            pad_tokens(mask.q, pad_q, with_ids=with_ids),
            pad_tokens(mask.kv, pad_kv, with_ids=with_ids),
        )
        sizes = (block_q, block_kv, min(blocks.kv_compute, block_kv))
        return cls(q.shape[0], *lengths, *sizes, mask)

    @property
    def q_padded(self):
        return self.mask.q.positions.shape[1]

    @property
    def kinds(self):
        """Each block's kind: [rows of the mask, blocks of queries, blocks of keys]"""
        if not self.mask.sees_all:
            return block_kinds(self.mask, self.block_q, self.block_kv)
        kv_padded = self.mask.kv.positions.shape[1]
        shape = (1, self.q_padded // self.block_q, kv_padded // self.block_kv)
        return jnp.full(shape, FULL, jnp.int8)

    @property
    def tokens(self):
        """What kernels read of the mask, as rows: int32 [B or 1, 1, T]"""
        rule = self.mask.rule
        ordered = rule.before is not None or rule.after is not None

        def rows(tokens):
            positions = tokens.positions if ordered else None
            tokens = Tokens(positions, tokens.segment_ids)
            return jax.tree.map(lambda x: x[:, None], tokens)

        return rows(self.mask.q), rows(self.mask.kv)

    def cost(self, q, k, *, num_products):
        """What XLA's scheduler is told; of a bounded order, half is seen."""
        rule = self.mask.rule
        seen = 0.5 if rule.before is not None or rule.after is not None else 1
        pairs = int(seen * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1])
        return pl.CostEstimate(
            flops=2 * num_products * pairs * q.shape[3],
            transcendentals=pairs,
            bytes_accessed=pairs // self.block_q * 2 * q.shape[3] * q.dtype.itemsize,
        )

    def q(self, x):
        """[B, T, N, H] -> [B, N, T, H], padded"""
        return _pad(x, self.block_q, 0).swapaxes(1, 2)

    def kv(self, x):
        """[B, S, K, H] -> [B, K, S, H], padded"""
        return _pad(x, self.block_kv, 0).swapaxes(1, 2)

    def row(self, x, fill):
        """[B, T, N] -> [B, N, 1, T], padded"""
        return _pad(x, self.block_q, fill).swapaxes(1, 2)[:, :, None]

    def from_q(self, x):
        """The inverse of `q`."""
        return x.swapaxes(1, 2)[:, : self.q_length]

    def from_kv(self, x):
        """The inverse of `kv`."""
        return x.swapaxes(1, 2)[:, : self.kv_length]

    def from_row(self, x):
        """The inverse of `row`."""
        return x[:, :, 0].swapaxes(1, 2)[:, : self.q_length]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a step of the grid is: batch row, heads, block of queries and of keys."""

    row: Any
    head: Any
    kv_head: Any
    i: Any
    j: Any


@dataclasses.dataclass(frozen=True)
class _Specs:
    """Which blocks a kernel sees; `place` maps the grid's indices to a _Place."""

    cut: _Cut
    place: Callable[..., _Place]

    def q(self, width):
        """Blocks of [B, N, T, width]."""
        shape = (None, None, self.cut.block_q, width)
        return self._spec(shape, lambda at: (at.row, at.head, at.i, 0))

    def kv(self, width):
        """Blocks of [B, K, S, width]."""
        shape = (None, None, self.cut.block_kv, width)
        return self._spec(shape, lambda at: (at.row, at.kv_head, at.j, 0))

    def row(self):
        """Blocks of [B, N, 1, T]."""
        shape = (None, None, 1, self.cut.block_q)
        return self._spec(shape, lambda at: (at.row, at.head, 0, at.i))

    def tokens(self):
        """Blocks of the cut's tokens."""

        def of(tokens, block, index):
            def one(x):
                shape, varies = (None, 1, block), x.shape[0] > 1
                return self._spec(
                    shape, lambda at: (at.row if varies else 0, 0, index(at))
                )

            return jax.tree.map(one, tokens)

        q, kv = self.cut.tokens
        return (
            of(q, self.cut.block_q, lambda at: at.i),
            of(kv, self.cut.block_kv, lambda at: at.j),
        )

    def _spec(self, shape, index):
        return pl.BlockSpec(shape, lambda *grid: index(self.place(*grid)))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel and how its operands are cut, run on each of a walk's lists.

    The body takes (lists, operands, state, results, scratch). `state` is None or arrays
    that become the results, one each.
    """

    body: Callable[..., None]
    name: str
    grid: tuple[int, ...]
    scratch: tuple[Any, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    result_specs: tuple[pl.BlockSpec, ...]
    state_specs: tuple[pl.BlockSpec, ...]
    vmem_bytes: int
    cost: pl.CostEstimate
    interpret: Any

    def run(self, walk, operands, specs, state):
        """The results of all calls of a walk, made one after the other."""
        # All inputs vary over all mesh axes that any of them varies over.
        inputs = (walk.entries, walk.sizes, operands, state)
        axes = frozenset().union(*map(varying_axes, jax.tree.leaves(inputs)))
        entries, sizes, operands, state = jax.tree.map(
            lambda x: vary_over(x, axes), inputs
        )
        if axes and self.interpret:
            raise NotImplementedError(
                "mosaic_tpu_interpret cannot run where jax checks over which axes "
                f"values vary ({', '.join(sorted(axes))}): pass check_vma=False to "
                "jax.shard_map"
            )
        if walk.calls == 1:
            return self._call(walk, entries[0], sizes[0], operands, specs, state)

        def body(state, lists):
            return self._call(walk, *lists, operands, specs, state), None

        return lax.scan(body, state, (entries, sizes))[0]

    def _call(self, walk, entries, sizes, operands, specs, state):
        leaves, tree = jax.tree.flatten((operands, state))
        num_operands = len(jax.tree.leaves(operands))
        in_specs = jax.tree.leaves((specs, self.state_specs if state else ()))

        def kernel(*refs):
            ends = (2, 2 + len(leaves), 2 + len(leaves) + len(self.results))
            lists, inputs, results, scratch = _split(refs, ends)
            self.body(lists, *jax.tree.unflatten(tree, inputs), results, scratch)

        first, *rest = self.grid
        steps = sizes[1:].max()
        return pl.pallas_call(
            kernel,
            name=self.name,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(walk.batch, first, steps, *rest),
                in_specs=in_specs,
                out_specs=self.result_specs,
                scratch_shapes=self.scratch,
            ),
            out_shape=tuple(
                varying_like(entries, x.shape, x.dtype) for x in self.results
            ),
            input_output_aliases={
                2 + i: i - num_operands for i in range(num_operands, len(leaves))
            },
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(
                    "parallel",
                    "parallel",
                    *("arbitrary",) * (1 + len(rest)),
                ),
                vmem_limit_bytes=self.vmem_bytes,
            ),
            cost_estimate=self.cost,
            interpret=self.interpret,
        )(entries, sizes, *leaves)


def _split(refs, ends):
    """Cuts a sequence at `ends`."""
    starts = (0, *ends)
    return [refs[a:b] for a, b in zip(starts, (*ends, None), strict=True)]


def _multipliable(*arrays):
    """Arrays in a dtype that the matrix unit takes: float16 becomes float32."""
    dtype = arrays[0].dtype
    if dtype == jnp.float64:
        raise ValueError(
            f"mosaic_tpu accumulates in float32 and cannot take {dtype}: use "
            'implementation="xla"'
        )
    if dtype == jnp.float16:
        return tuple(x.astype(jnp.float32) for x in arrays)
    return arrays


def _when_listed(step, attend, *, may_mask):
    """Runs `attend(masked)` as the step's kind demands."""
    if may_mask:
        pl.when(step.listed & (step.kind == PARTIAL))(partial(attend, True))
    pl.when(step.listed & (step.kind == FULL))(partial(attend, False))


def _base2(logits, products):
    """Logits in base 2, and natural ones where a soft cap's derivative needs them."""
    if logits.soft_cap is None:
        return products * (logits.scale * LOG2_E), None
    natural = logits.of(products)
    return natural * LOG2_E, natural


def _dot(a, b, axis_a, axis_b):
    """A product of what it is given, accumulated in float32."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _pieces(length, size):
    """Slices of at most `size` that cut a length."""
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _column(row):
    """[1, n] -> [n, LANES], each number along its lanes"""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _tile(column, width):
    """[n, LANES] -> [n, width], of numbers that are the same along lanes"""
    return jnp.concatenate([column] * -(-width // LANES), axis=1)[:, :width]


def _sum_to_lanes(x):
    """[n, width] -> [n, LANES], whose sum along lanes is that of x"""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def _save_columns(columns, tokens):
    """Keeps positions and ids, [1, n] each, as columns."""
    for i, x in enumerate((tokens.positions, tokens.segment_ids)):
        if x is not None:
            columns[i] = _column(x[...])


def _load_columns(columns, tokens, width, rows=slice(None)):
    """Some rows of what was saved of `tokens`, `width` numbers along."""
    parts = (tokens.positions, tokens.segment_ids)
    return Tokens(
        *(
            None if x is None else _tile(columns[i, rows], width)
            for i, x in enumerate(parts)
        )
    )


def _block(length, size):
    """The block size, near `size` at most, that cuts a length evenly.

    An even number of blocks lets none straddle the two chunks of a zigzag shard.
    """
    blocks = -(-length // size)
    blocks += blocks % 2 if blocks > 1 else 0
    return -(-length // (blocks * LANES)) * LANES


def _pad(x, block, fill):
    """Pads the tokens of [B, T, ...] to a multiple of the block."""
    if not (padding := -x.shape[1] % block):
        return x
    widths = [(0, padding if i == 1 else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)
