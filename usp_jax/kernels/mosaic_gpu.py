"""The chunk contract as Pallas Mosaic GPU kernels for Hopper: TMA, WGMMA, warp roles.

FlashAttention-3 (arXiv 2407.08608, Algorithms 1 and 2) over lists of blocks. A thread
block has three warpgroups: two compute, and one copies tiles from global to shared
memory for them. A computing warpgroup owns 64 rows of a tile of 128 (of queries forward
and for dq, of keys for dk and dv) and keeps their sums in registers, while blocks of
the other side stream through a ring of buffers:

    forward   q stays     k, v stream     o += p v, with s = q kᵀ of the next block in
                                          flight; the two warpgroups take turns
    dq        q, do stay  k, v stream     dq += ds k
    dk, dv    k, v stay   q, do stream    dv += pᵀ do, dk += dsᵀ q, for all query heads
                                          of the key head

Which blocks stream is read from a table in global memory (`_walks`): first those that
are seen entirely, where nothing is masked, then those seen in part, where the masking
rule is evaluated from positions and segment ids. Nothing else is fetched. A tile that
sees nothing hands its carry through. There are no atomics: results are reproducible.

Every buffer has a barrier for "full", that its copies complete, and one for "free",
that both computing warpgroups arrive at when no product reads it any more. Head sizes
are padded to multiples of 16, lengths to multiples of 128.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from usp_jax._compat import gpu_interpret_params, gpu_load, gpu_store, vary_like
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_gpu_blocks import BlockSizes
from usp_jax.masking import EMPTY, FULL, Mask, block_kinds, pad_tokens, sees
from usp_jax.merge import finite

LOG2E = math.log2(math.e)

# Rows of one WGMMA, which are those of one warpgroup; and of a thread block's tile.
ROWS, COMPUTING = 64, 2
TILE = ROWS * COMPUTING

# Registers a thread, out of the 64K that a multiprocessor has for 3 · 128 threads.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


def chunk_forward(
    q, k, v, mask, carry, logits, *, target, blocks=None, interpret=False
):
    """Attention of q over k, v, merged into `carry`.

    Args:
      target: the device; with the head size it gives the block sizes.
      blocks: a `BlockSizes` to use instead.
      interpret: runs on any platform, in jax's interpreter of Mosaic GPU kernels.

    Raises:
      NotImplementedError: inputs are not bfloat16 or float16, or heads exceed 256.
    """
    blocks = blocks or BlockSizes.of(max(q.shape[-1], v.shape[-1]), target.kind)
    call = _Call.of(q, k, v, mask, logits, blocks, interpret)
    length, size = q.shape[1], v.shape[-1]
    operands = {name: _padded(x) for name, x in (("q", q), ("k", k), ("v", v))}
    if carry is not None:
        operands["out"] = _padded(carry[0])
        operands["lse"] = _tokens_last(carry[1], -jnp.inf)
    batch, padded, heads, _ = operands["q"].shape
    shapes = (batch, padded, heads, operands["v"].shape[-1]), (batch, heads, padded)
    step, stages = call.blocks.forward, call.blocks.forward_stages
    kernel = _Kernel(_forward, ("q",), (("k",), ("v",)), step, stages)
    out, lse = call.launch(kernel, operands, shapes)
    return out[:, :length, :, :size], lse.swapaxes(1, 2)[:, :length]


def chunk_backward(
    q, k, v, dout, lse, delta, mask, logits, *, target, blocks=None, interpret=False
):
    """dq, dk, dv of one chunk from the global lse and delta.

    Args and raises: those of `chunk_forward`.
    """
    blocks = blocks or BlockSizes.of(max(q.shape[-1], v.shape[-1]), target.kind)
    call = _Call.of(q, k, v, mask, logits, blocks, interpret)
    operands = {"q": q, "k": k, "v": v, "do": dout.astype(q.dtype)}
    operands = {name: _padded(x) for name, x in operands.items()}
    shapes = {f"d{name}": operands[name].shape for name in "qkv"}
    operands["lse"] = _tokens_last(finite(lse) * LOG2E, 0)
    operands["delta"] = _tokens_last(delta, 0)
    step, stages = call.blocks.dq, call.blocks.dq_stages
    kernels = {("dq",): _Kernel(_dq, ("q", "do"), (("k",), ("v",)), step, stages)}
    step, stages = call.blocks.dkv, call.blocks.dkv_stages
    streams = ("q", "lse"), ("do", "delta")
    for names in [("dk",), ("dv",)] if call.blocks.split_dkv else [("dk", "dv")]:
        body = partial(_dkv, names)
        kernels[names] = _Kernel(body, ("k", "v"), streams, step, stages)
    grads = {}
    for names, kernel in kernels.items():
        made = call.launch(kernel, operands, [shapes[name] for name in names])
        grads |= zip(names, made, strict=True)
    return tuple(
        grads[name][:, : x.shape[1], :, : x.shape[3]]
        for name, x in (("dq", q), ("dk", k), ("dv", v))
    )


def _forward(block):
    """One tile of queries and one head of the forward pass, by one warpgroup."""
    call, walk, warpgroup = block.call, block.walk, block.warpgroup
    k_s, v_s, turn = block.scratch["k"], block.scratch["v"], block.scratch["turn"]
    q, stages = block.scratch["q"].at[warpgroup], k_s.shape[0]
    shape = (ROWS, k_s.shape[1])
    out_ref, lse_ref = (block.rows_of(ref) for ref in block.outs)
    if "out" in block.refs:
        carried = gpu_load(block.rows_of(block.refs["out"]), MATRIX)
        carried_lse = gpu_load(block.rows_of(block.refs["lse"]), ROW)
    else:
        carried = _full((ROWS, v_s.shape[-1]), 0, MATRIX)
        carried_lse = _full((ROWS,), -jnp.inf, ROW)

    def softmax(s, m, l, seen):
        """The running maximum and sum (base 2), what o decays by, and p."""
        s, scale = call.base2(s)
        if seen is not None:
            s = jnp.where(seen, s, -jnp.inf)
        m_next = jnp.maximum(m, s.max(axis=1) * scale)
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, and no NaN.
        safe = m_next if seen is None else finite(m_next)
        p = jnp.exp2(s * scale - _by_row(safe, shape))
        decay = jnp.exp2(m - safe)
        return m_next, l * decay + p.sum(axis=1), decay, p

    def first():
        def scores(s_ref):
            plgpu.wgmma(s_ref, q, _transposed(k_s.at[0]))
            return plgpu.wgmma_accumulator_load(s_ref)

        block.await_own()
        block.await_full("k", 0)
        s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
        block.free("k", 0)
        # A carry is a running row whose sum is 1 at its lse.
        m, l = carried_lse * LOG2E, jnp.where(carried_lse == -jnp.inf, 0.0, 1.0)
        *state, p = softmax(s, m, l, block.seen(0))
        return carried, *state, p.astype(k_s.dtype)

    def step(n, state, masked):
        """The scores of block n, while o takes in the block before it."""
        o, m, l, decay, p = state
        now, before = _slot(n, stages), _slot(n - 1, stages)
        block.await_full("k", now)
        block.await_full("v", before)
        plgpu.barrier_wait(turn.at[warpgroup])

        def body(accumulators):
            def scores(s_ref):
                plgpu.wgmma(s_ref, q, _transposed(k_s.at[now]))
                block.multiply(accumulators[0], p, v_s.at[before])
                plgpu.barrier_arrive(turn.at[1 - warpgroup])
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

            s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            block.free("k", now)
            return softmax(s, m, l, block.seen(n) if masked else None)

        like = [m, l, decay, _full(shape, 0, MATRIX)]
        (o,), (*made, p) = call.in_flight(body, [o * _by_row(decay, o.shape)], like)
        block.free("v", before)
        # Rounded no sooner: until here the product was reading the last p.
        return o, *made, p.astype(k_s.dtype)

    def attend():
        # The first turn is warpgroup 0's.
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        o, m, l, decay, p = walk.fold(step, first(), start=1)
        last = _slot(walk.steps - 1, stages)
        block.await_full("v", last)
        (o,), _ = call.in_flight(
            lambda refs: block.multiply(refs[0], p, v_s.at[last]),
            [o * _by_row(decay, o.shape)],
        )
        inverse = jnp.where(l > 0.0, 1.0 / l, 0.0)
        gpu_store(out_ref, o * _by_row(inverse, o.shape))
        gpu_store(lse_ref, (m + jnp.log2(l)) / LOG2E)

    @pl.when(walk.listed == 0)
    def hand_through():
        gpu_store(out_ref, carried)
        gpu_store(lse_ref, carried_lse)

    pl.when(walk.listed > 0)(attend)


def _dq(block):
    """One tile of queries and one head of dq, by one warpgroup."""
    call, walk = block.call, block.walk
    k_s, v_s = block.scratch["k"], block.scratch["v"]
    q, do = (block.scratch[name].at[block.warpgroup] for name in ("q", "do"))
    shape = (ROWS, k_s.shape[1])
    lse, delta = (
        _by_row(gpu_load(block.rows_of(block.refs[name]), ROW), shape)
        for name in ("lse", "delta")
    )
    pl.when(walk.listed > 0)(block.await_own)

    def step(n, state, masked):
        slot = _slot(n, k_s.shape[0])
        block.await_full("k", slot)
        block.await_full("v", slot)

        def products(s_ref, dp_ref):
            plgpu.wgmma(s_ref, q, _transposed(k_s.at[slot]))
            plgpu.wgmma(dp_ref, do, _transposed(v_s.at[slot]))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            p = call.weights(s, lse, block.seen(n) if masked else None)
            dp = plgpu.wgmma_accumulator_load(dp_ref)
            return call.pull_back(p * (dp - delta), s)

        def body(accumulators):
            ds = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * 2)
            block.free("v", slot)
            block.multiply(accumulators[0], ds.astype(k_s.dtype), k_s.at[slot])

        state, _ = call.in_flight(body, state)
        block.free("k", slot)
        return state

    (dq,) = walk.fold(step, [_full((ROWS, k_s.shape[-1]), 0, MATRIX)])
    gpu_store(block.rows_of(block.outs[0]), dq * call.late_scale)


def _dkv(names, block):
    """One tile of keys and one key head of dk, dv or both, by one warpgroup.

    Scores are transposed, [keys, queries].
    """
    call, walk, scratch = block.call, block.walk, block.scratch
    k, v = (scratch[name].at[block.warpgroup] for name in ("k", "v"))
    stages, size = scratch["q"].shape[:2]
    shape = (ROWS, size)
    pl.when(walk.listed > 0)(block.await_own)

    def step(n, state, masked):
        slot = _slot(n, stages)
        q, do = scratch["q"].at[slot], scratch["do"].at[slot]
        block.await_full("q", slot)
        block.await_full("do", slot)

        def by_column(name):
            x = gpu_load(scratch[name].at[slot], COLUMN)
            return lax.broadcast_in_dim(x, shape, (1,))

        def body(accumulators):
            into = dict(zip(names, accumulators, strict=True))

            def products(s_ref, *dp_ref):
                plgpu.wgmma(s_ref, k, _transposed(q))
                for ref in dp_ref:
                    plgpu.wgmma(ref, v, _transposed(do))
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(dp_ref))
                seen = block.seen(n) if masked else None
                p = call.weights(s, by_column("lse"), seen)
                if "dv" in names:
                    block.multiply(into["dv"], p.astype(q.dtype), do)
                for ref in dp_ref:
                    # The product into dv may still be in flight.
                    dp = plgpu.wgmma_accumulator_load(ref, wait_n=len(names) - 1)
                    ds = call.pull_back(p * (dp - by_column("delta")), s)
                    block.multiply(into["dk"], ds.astype(q.dtype), q)

            how_many = 2 if "dk" in names else 1
            pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * how_many)

        state, _ = call.in_flight(body, state)
        block.free("q", slot)
        block.free("do", slot)
        return state

    sizes = {"dk": k.shape[-1], "dv": v.shape[-1]}
    scales = {"dk": call.late_scale, "dv": 1.0}
    state = walk.fold(step, [_full((ROWS, sizes[name]), 0, MATRIX) for name in names])
    for name, ref, x in zip(names, block.outs, state, strict=True):
        gpu_store(block.rows_of(ref), x * scales[name])


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What one warpgroup computes, of which tiles.

    Attributes:
      own: operands whose tile stays in shared memory.
      streams: operands whose blocks pass through; those of a tuple arrive together.
      step: tokens of a streamed block.
      stages: buffers of each stream.
    """

    body: Callable[["_Block"], None]
    own: tuple[str, ...]
    streams: tuple[tuple[str, ...], ...]
    step: int
    stages: int

    @property
    def transposed(self):
        """Whether tiles are of keys, and queries stream."""
        return "k" in self.own

    def scratch(self, operands):
        """Shared memory and barriers, by name."""
        streamed = [name for stream in self.streams for name in stream]
        widths = [x.shape[-1] for name, x in operands.items() if name in "qkv"]
        # The widest swizzle that cuts the streamed block and all head sizes.
        sizes = self.step, *widths
        width = next(w for w in (64, 32, 16) if not any(size % w for size in sizes))
        transforms = (
            plgpu.TilingTransform((8, width)),
            plgpu.SwizzleTransform(2 * width),
        )

        def buffers(name, *lead):
            x = operands[name]
            if x.ndim == 3:
                return plgpu.SMEM(lead, x.dtype)
            return plgpu.SMEM((*lead, x.shape[-1]), x.dtype, transforms=transforms)

        made = {name: buffers(name, COMPUTING, ROWS) for name in self.own}
        made |= {name: buffers(name, self.stages, self.step) for name in streamed}
        made["own_full"] = plgpu.Barrier(
            num_arrivals=len(self.own), num_barriers=COMPUTING
        )
        made["turn"] = plgpu.Barrier(num_barriers=COMPUTING)
        for stream in self.streams:
            for what, arrivals in (("full", len(stream)), ("free", COMPUTING)):
                made[f"{stream[0]}_{what}"] = plgpu.Barrier(
                    num_arrivals=arrivals, num_barriers=self.stages
                )
        # The interpreter's wgmma takes no operand from registers.
        staged = (COMPUTING, ROWS, self.step)
        made["staged"] = plgpu.SMEM(staged, operands["q"].dtype)
        return made


@dataclasses.dataclass(frozen=True)
class _Call:
    """What all kernels of a chunk share."""

    mask: Mask
    logits: Logits
    blocks: BlockSizes
    group: int
    interpret: bool

    @classmethod
    def of(cls, q, k, v, mask, logits, blocks, interpret):
        """Checks what these kernels can do, and pads the mask's tokens."""
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"{q.dtype=}: mosaic_gpu takes bfloat16 and float16; use "
                "implementation='xla'"
            )
        size = max(q.shape[-1], v.shape[-1])
        if size > 256:
            raise NotImplementedError(
                f"mosaic_gpu takes heads of at most 256, not {size}; use "
                "implementation='xla'"
            )
        pads = -q.shape[1] % TILE, -k.shape[1] % TILE
        q_tokens, kv_tokens = (
            pad_tokens(tokens, pad, with_ids=any(pads))
            for tokens, pad in zip((mask.q, mask.kv), pads, strict=True)
        )
        mask = Mask(mask.rule, q_tokens, kv_tokens)
        return cls(mask, logits, blocks, q.shape[2] // k.shape[2], interpret)

    def launch(self, kernel, operands, shapes):
        """Runs a kernel over all tiles and heads; float32 arrays of `shapes`."""
        tile_side, other_side = "kq" if kernel.transposed else "qk"
        batch, length, heads, _ = operands[tile_side].shape
        columns = operands[other_side].shape[1] // kernel.step
        scratch = kernel.scratch(operands)
        if not self.interpret:
            del scratch["staged"]
        if not self.mask.sees_all:
            walks = _walks(self.mask, kernel.step, kernel.transposed)
            operands = operands | {"mask": self.mask, "walks": walks}
        leaves, tree = jax.tree.flatten(operands)

        def body(*refs, **scratch):
            ins, outs = tree.unflatten(refs[: len(leaves)]), refs[len(leaves) :]
            repeats = self.group if kernel.transposed else 1
            walk = _Walk.of(ins.get("walks"), columns, repeats)
            block = _Block(self, kernel, walk, ins, outs, scratch)
            pl.when(block.warpgroup < COMPUTING)(block.compute)
            pl.when(block.warpgroup == COMPUTING)(block.copy)

        function = getattr(kernel.body, "func", kernel.body)
        made = plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            scratch_types=scratch,
            grid=(heads, length // TILE, batch),
            grid_names=("head", "tile", "batch"),
            num_threads=COMPUTING + 1,
            thread_name="warpgroup",
            kernel_name=f"usp{function.__name__}",
            compiler_params=plgpu.CompilerParams(
                # The hardware's tanh has 11 bits, too few for capped logits.
                approx_math=self.logits.soft_cap is None,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            interpret=gpu_interpret_params() if self.interpret else None,
        )(*leaves)
        return vary_like(list(made), leaves)

    def in_flight(self, body, accumulators, like=()):
        """Runs body(accumulator refs), then awaits all its products.

        Returns:
          The accumulators' values, and what `body` gave: arrays like those of `like`.
        """
        if self.interpret:
            # The interpreter has no accumulator that starts at a value.
            def scoped(*refs):
                made = body(refs)
                return [ref[...] for ref in refs], made

            types = [plgpu.ACC(x.shape, x.dtype) for x in accumulators]
            sums, made = pl.run_scoped(scoped, *types)
            return [x + y for x, y in zip(accumulators, sums, strict=True)], made

        def stateful(refs):
            accumulator_refs, made_refs = refs
            made = body(accumulator_refs) or ()
            for ref, x in zip(made_refs, made, strict=True):
                ref[...] = x

        started = [plgpu.ACC.init(x) for x in accumulators]
        return pl.run_state(stateful)((started, list(like)))

    def base2(self, products):
        """(x, c) such that c · x, c > 0, are the logits times log2(e)."""
        if self.logits.soft_cap is None and self.logits.scale > 0:
            return products, self.logits.scale * LOG2E
        return self.logits.of(products), LOG2E

    def weights(self, products, lse, seen):
        """p from the products q·k and the base 2 lse."""
        s, scale = self.base2(products)
        p = jnp.exp2(s * scale - lse)
        return p if seen is None else jnp.where(seen, p, 0.0)

    def pull_back(self, dlogits, products):
        """The products' cotangent, but for `late_scale`."""
        if self.logits.soft_cap is None:
            return dlogits
        return self.logits.pull_back(dlogits, self.logits.of(products))

    @property
    def late_scale(self):
        """What sums of `pull_back` are still to be multiplied with."""
        return self.logits.scale if self.logits.soft_cap is None else 1.0


class _Block:
    """A thread block as one of its warpgroups sees it: its tile, head and memory."""

    def __init__(self, call, kernel, walk, refs, outs, scratch):
        self.call, self.kernel, self.walk = call, kernel, walk
        self.refs, self.outs, self.scratch = refs, outs, scratch
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        self.warpgroup = lax.axis_index("warpgroup")

    def rows_of(self, ref, index=None):
        """A warpgroup's own rows of [B, T, N, H] or [B, N, T]."""
        index = self.warpgroup if index is None else index
        rows = pl.ds(self.walk.tile * TILE + index * ROWS, ROWS)
        return self._at(ref, rows, self.head)

    def compute(self):
        """What the first two warpgroups do."""
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        self.kernel.body(self)

    def copy(self):
        """What the last warpgroup does: every tile's copy, as its buffer comes free."""
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        walk, stages = self.walk, self.kernel.stages

        @pl.when(walk.listed > 0)
        def own():
            for i in range(COMPUTING):
                for name in self.kernel.own:
                    rows, tile = self.rows_of(self.refs[name], i), self.scratch[name]
                    barrier = self.scratch["own_full"].at[i]
                    plgpu.copy_gmem_to_smem(rows, tile.at[i], barrier)

        def step(n, column):
            slot = _slot(n, stages)
            # Read ahead, so that no copy waits for the table.
            ahead = walk.column(jnp.minimum(n + 1, walk.columns * walk.repeats - 1))
            if self.kernel.transposed:
                head = self.head * walk.repeats + lax.rem(n, jnp.int32(walk.repeats))
            else:
                head = lax.div(self.head, jnp.int32(self.call.group))
            rows = pl.ds(column * self.kernel.step, self.kernel.step)
            for stream in self.kernel.streams:
                full, free = (
                    self.scratch[f"{stream[0]}_{x}"] for x in ("full", "free")
                )
                pl.when(n >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                for name in stream:
                    source = self._at(self.refs[name], rows, head)
                    target = self.scratch[name].at[slot]
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot])
            return ahead

        lax.fori_loop(0, walk.steps, step, walk.column(jnp.int32(0)))

    def await_own(self):
        """Waits for the tiles that stay."""
        plgpu.barrier_wait(self.scratch["own_full"].at[self.warpgroup])

    def await_full(self, name, slot):
        """Waits until a stream's buffer is filled."""
        plgpu.barrier_wait(self.scratch[f"{name}_full"].at[slot])

    def free(self, name, slot):
        """Says that this warpgroup needs a stream's buffer no more."""
        plgpu.barrier_arrive(self.scratch[f"{name}_free"].at[slot])

    def multiply(self, accumulator, a, b):
        """accumulator += a · b of registers and a buffer, asynchronously."""
        if self.call.interpret:
            staged = self.scratch["staged"].at[self.warpgroup]
            staged[...] = a
            plgpu.commit_smem()
            a = staged
        plgpu.wgmma(accumulator, a, b)

    def seen(self, n):
        """What is seen of the block of step n, [rows, columns]; None is all."""
        if self.walk.row is None:
            return None
        mask, size = self.refs["mask"], self.kernel.step
        own = pl.ds(self.walk.tile * TILE + self.warpgroup * ROWS, ROWS)
        own = own, ROW, 0
        other = pl.ds(self.walk.column(n) * size, size), COLUMN, 1

        def facts(tokens, where):
            part, layout, dim = where

            def load(ref):
                row = self.batch if ref.shape[0] > 1 else 0
                x = gpu_load(ref.at[row, part], layout)
                return lax.broadcast_in_dim(x, (ROWS, size), (dim,))

            return jax.tree.map(load, tokens)

        sides = (other, own) if self.kernel.transposed else (own, other)
        q, kv = map(facts, (mask.q, mask.kv), sides)
        return sees(self.call.mask.rule, q, kv)

    def _at(self, ref, rows, head):
        """Rows of one head of [B, T, N, H] or [B, N, T]."""
        if len(ref.shape) == 3:
            return ref.at[self.batch, head, rows]
        return ref.at[self.batch, rows, head]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The steps that one tile takes: those of blocks seen entirely, then the others.

    Each block is walked `repeats` times in a row. `row` is the tile's part of the table
    of `_walks`, None when every block is seen entirely.
    """

    tile: Any
    full: Any
    listed: Any
    row: Any
    columns: int
    repeats: int

    @classmethod
    def of(cls, table, columns, repeats):
        """The walk of this thread block's tile."""
        rank, batch = lax.axis_index("tile"), lax.axis_index("batch")
        if table is None:
            return cls(rank, columns, columns, None, columns, repeats)
        row = table.at[batch if table.shape[0] > 1 else 0, rank]
        return cls(row[0], row[1], row[2], row, columns, repeats)

    @property
    def steps(self):
        return self.listed * self.repeats

    def column(self, step):
        """The block that a step is about."""
        entry = lax.div(step, jnp.int32(self.repeats)) if self.repeats > 1 else step
        return entry if self.row is None else self.row[HEADER + entry]

    def fold(self, step, state, start=0):
        """Folds step(n, state, masked) over all steps from `start` on."""
        full = jnp.maximum(self.full * self.repeats, start)
        state = lax.fori_loop(start, full, partial(step, masked=False), state)
        if self.row is None:
            return state
        return lax.fori_loop(full, self.steps, partial(step, masked=True), state)


# What comes before the blocks in a row of the table: its tile and two counts.
HEADER = 3


def _walks(mask, step, transposed):
    """Which blocks each tile walks: int32 [B, tiles, 3 + columns].

    A row is (tile, how many blocks are seen entirely, how many are seen at all, the
    blocks in that order). Rows are sorted by work, so that no heavy tile starts last.
    """
    if transposed:
        kinds = block_kinds(mask, step, TILE).swapaxes(1, 2)
    else:
        kinds = block_kinds(mask, TILE, step)
    columns = kinds.shape[2]
    index = lax.broadcasted_iota(jnp.int32, kinds.shape, 2)
    rank = jnp.where(kinds == FULL, 0, jnp.where(kinds == EMPTY, 2, 1))
    order = jnp.sort(rank * columns + index, axis=-1) % columns
    counts = [jnp.sum(x, -1, dtype=jnp.int32) for x in (rank == 0, rank < 2)]
    tiles = jnp.argsort(-counts[1], axis=-1).astype(jnp.int32)[..., None]
    rows = jnp.concatenate([jnp.stack(counts, axis=-1), order], axis=-1)
    rows = jnp.take_along_axis(rows, tiles, axis=1)
    return jnp.concatenate([tiles, rows], axis=-1)


def _slot(n, stages):
    """The buffer of a step."""
    return lax.rem(n, jnp.int32(stages)) if stages > 1 else jnp.int32(0)


def _by_row(x, shape):
    """Repeats one value a row along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _full(shape, value, layout):
    """Registers of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _transposed(ref):
    return ref.transpose((1, 0))


def _padded(x):
    """[B, T, N, H] with T a multiple of the tile and H of the narrowest swizzle."""
    widths = (0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, -x.shape[3] % 16)
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _tokens_last(x, fill):
    """[B, T, N] -> [B, N, T], T padded to a multiple of the tile."""
    widths = (0, 0), (0, 0), (0, -x.shape[1] % TILE)
    return jnp.pad(x.swapaxes(1, 2), widths, constant_values=fill)
