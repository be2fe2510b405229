"""The chunk contract as Pallas Mosaic GPU kernels for Hopper: TMA, WGMMA, warp roles.

FlashAttention-3 (arXiv 2407.08608, Algorithms 1 and 2) over lists of blocks. A thread
block has three warpgroups: one moves tiles from global to shared memory, two compute.
Each computing warpgroup owns 64 rows of a tile of 128 (of queries forward and for dq,
of keys for dk and dv) and keeps their accumulators in registers, while blocks of the
other side stream through a ring of shared memory buffers:

    forward   q stays     k, v stream      o += p v, with s = q kᵀ of the next block
                                           in flight; the warpgroups take turns
    dq        q, do stay  k, v stream      dq += ds k
    dk, dv    k, v stay   q, do stream     dv += pᵀ do, dk += dsᵀ q, for the whole group
                                           of query heads of a key head

Which blocks stream is read from a table in global memory (`_walks`): first those that
are seen entirely, for which nothing is masked, then those seen in part, for which the
masking rule is evaluated from positions and segment ids. Nothing else is fetched. A
tile that sees nothing hands its carry through. No atomics: results are reproducible.

Head sizes are padded to multiples of 16 and lengths to multiples of 128.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from usp_jax._compat import (
    gpu_interpret_params,
    gpu_load,
    gpu_store,
    vary_like,
)
from usp_jax.kernels.logits import Logits
from usp_jax.masking import (
    EMPTY,
    FULL,
    Mask,
    Tokens,
    block_kinds,
    pad_tokens,
    sees,
)
from usp_jax.merge import finite

LOG2E = math.log2(math.e)

# Rows of one WGMMA, which are those of one warpgroup; and of a thread block's tile.
ROWS, COMPUTING = 64, 2
TILE = ROWS * COMPUTING

# Registers a thread, out of the 64K that a multiprocessor has for 3 · 128 threads.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24

ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many tokens stream at a time, and through how many buffers.

    Attributes:
      forward: keys a step of the forward kernel.
      dq: keys a step of the kernel of dq.
      dkv: queries a step of the kernel of dk and dv.
      split_dkv: makes dk and dv in two passes, since the registers hold one of them.
    """

    forward: int
    dq: int
    dkv: int
    forward_stages: int = 2
    dq_stages: int = 2
    dkv_stages: int = 2
    split_dkv: bool = False

    def __post_init__(self):
        for name in ("forward", "dq", "dkv"):
            if (size := getattr(self, name)) not in (16, 32, 64, 128):
                raise ValueError(f"{name}={size} must be 16, 32, 64 or 128 tokens")
            if (stages := getattr(self, f"{name}_stages")) < 1:
                raise ValueError(f"{name}_stages={stages} must be at least 1")

    @classmethod
    def of(cls, head_size: int) -> "BlockSizes":
        """Sizes whose buffers and accumulators fit a Hopper multiprocessor."""
        if head_size <= 64:
            return cls(forward=128, dq=128, dkv=128)
        if head_size <= 128:
            return cls(forward=128, dq=64, dkv=64)
        if head_size <= 192:
            return cls(forward=64, dq=64, dkv=64, split_dkv=True)
        return cls(forward=64, dq=32, dkv=32, split_dkv=True)


def chunk_forward(q, k, v, mask, carry, logits, *, blocks=None, interpret=False):
    """Attention of q over k, v, merged into `carry`.

    Raises:
      NotImplementedError: inputs are not bfloat16 or float16, or heads exceed 256.
    """
    call = _Call.of(q, k, v, mask, logits, blocks, interpret)
    length, size = q.shape[1], v.shape[-1]
    q, k, v = map(_padded, (q, k, v))
    operands = {"q": q, "k": k, "v": v, "carry": None}
    if carry is not None:
        out, lse = carry
        lse = _tokens_last(lse, -jnp.inf)
        operands["carry"] = _padded(out), lse
    outs = [
        _like(q, (*q.shape[:3], v.shape[-1])),
        _like(q, (q.shape[0], q.shape[2], q.shape[1])),
    ]
    step, stages = call.blocks.forward, call.blocks.forward_stages
    wide = _width(step, q, v)
    scratch = {
        "q_s": _tile((COMPUTING, ROWS, q.shape[-1]), q, wide),
        "k_s": _tile((stages, step, q.shape[-1]), q, wide),
        "v_s": _tile((stages, step, v.shape[-1]), q, wide),
        "q_full": plgpu.Barrier(num_barriers=COMPUTING),
        "turn": plgpu.Barrier(num_barriers=COMPUTING),
        **_ring_barriers("k", stages),
        **_ring_barriers("v", stages),
    }
    out, lse = call.launch(
        _forward, operands, outs, scratch, (q.shape[2], TILE, step, False)
    )
    return out[:, :length, :, :size], lse.swapaxes(1, 2)[:, :length]


def chunk_backward(
    q, k, v, dout, lse, delta, mask, logits, *, blocks=None, interpret=False
):
    """dq, dk, dv of one chunk from the global lse and delta.

    Raises:
      NotImplementedError: inputs are not bfloat16 or float16, or heads exceed 256.
    """
    call = _Call.of(q, k, v, mask, logits, blocks, interpret)
    shapes = q.shape, k.shape, v.shape
    q, k, v, dout = map(_padded, (q, k, v, dout.astype(q.dtype)))
    operands = {
        "q": q,
        "k": k,
        "v": v,
        "do": dout,
        "lse": _tokens_last(finite(lse) * LOG2E, 0),
        "delta": _tokens_last(delta, 0),
    }
    step, stages = call.blocks.dq, call.blocks.dq_stages
    wide = _width(step, q, v)
    scratch = {
        "q_s": _tile((COMPUTING, ROWS, q.shape[-1]), q, wide),
        "do_s": _tile((COMPUTING, ROWS, v.shape[-1]), q, wide),
        "k_s": _tile((stages, step, q.shape[-1]), q, wide),
        "v_s": _tile((stages, step, v.shape[-1]), q, wide),
        "own_full": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING),
        **_ring_barriers("k", stages),
        **_ring_barriers("v", stages),
    }
    outs = [_like(q, q.shape)]
    (dq,) = call.launch(_dq, operands, outs, scratch, (q.shape[2], TILE, step, False))

    step, stages = call.blocks.dkv, call.blocks.dkv_stages
    wide = _width(step, q, v)
    scratch = {
        "k_s": _tile((COMPUTING, ROWS, q.shape[-1]), q, wide),
        "v_s": _tile((COMPUTING, ROWS, v.shape[-1]), q, wide),
        "q_s": _tile((stages, step, q.shape[-1]), q, wide),
        "do_s": _tile((stages, step, v.shape[-1]), q, wide),
        "lse_s": plgpu.SMEM((stages, step), jnp.float32),
        "delta_s": plgpu.SMEM((stages, step), jnp.float32),
        "own_full": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTING),
        **_ring_barriers("q", stages, copies=2),
        **_ring_barriers("do", stages, copies=2),
    }
    outs = {"dk": _like(k, k.shape), "dv": _like(v, v.shape)}
    grads = {}
    for names in [("dk",), ("dv",)] if call.blocks.split_dkv else [("dk", "dv")]:
        made = call.launch(
            partial(_dkv, names),
            operands,
            [outs[name] for name in names],
            scratch,
            (k.shape[2], step, TILE, True),
        )
        grads |= dict(zip(names, made, strict=True))
    return tuple(
        x[:, : shape[1], :, : shape[3]]
        for x, shape in zip((dq, grads["dk"], grads["dv"]), shapes, strict=True)
    )


def _forward(call, walk, refs, outs, scratch):
    """One tile of queries and one head of the forward pass."""
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    warpgroup = lax.axis_index("warpgroup")
    q_s, k_s, v_s = scratch["q_s"], scratch["k_s"], scratch["v_s"]
    step_size, stages = k_s.shape[1], k_s.shape[0]
    k_full, k_free, v_full, v_free = _named(scratch, "k_full k_free v_full v_free")
    q_full, turn = scratch["q_full"], scratch["turn"]
    out_ref, lse_ref = outs

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        first = walk.tile * TILE + warpgroup * ROWS
        rows = pl.ds(first, ROWS)
        if refs["carry"] is None:
            o = _zeros((ROWS, v_s.shape[-1]))
            lse = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
        else:
            carried, carried_lse = refs["carry"]
            o = gpu_load(carried.at[batch, rows, head], plgpu.Layout.WGMMA)
            lse = gpu_load(carried_lse.at[batch, head, rows], ROW)

        def save(out, lse):
            gpu_store(out_ref.at[batch, rows, head], out)
            gpu_store(lse_ref.at[batch, head, rows], lse)

        pl.when(walk.listed == 0)(partial(save, o, lse))
        pl.when(walk.listed > 0)(lambda: attend(first, o, lse, save))

    def attend(first, o, lse, save):
        q = q_s.at[warpgroup]
        own = None if walk.sees_all else call.tokens(refs["mask"].q, first, ROWS, 0)

        def seen(n):
            if own is None:
                return None
            keys = walk.column(n) * step_size
            shape = (ROWS, step_size)
            return call.seen(own, refs["mask"].kv, keys, shape)

        def softmax(s, m, l, seen):
            """The running maximum and sum (base 2), the decay of o, and p."""
            s, scale = call.base2(s)
            if seen is not None:
                s = jnp.where(seen, s, -jnp.inf)
            m_next = jnp.maximum(m, s.max(axis=1) * scale)
            # A row that has seen nothing yet: exp2(-inf - 0) is 0, and no NaN.
            safe = m_next if seen is None else finite(m_next)
            p = jnp.exp2(s * scale - _rows(safe, s.shape))
            decay = jnp.exp2(m - safe)
            return m_next, l * decay + p.sum(axis=1), decay, p

        def step(n, state, masked):
            """The scores of block n, while o takes in the block before it."""
            o, m, l, decay, p = state
            now, before = _slot(n, stages), _slot(n - 1, stages)
            plgpu.barrier_wait(k_full.at[now])
            plgpu.barrier_wait(v_full.at[before])
            plgpu.barrier_wait(turn.at[warpgroup])

            def body(accumulators):
                def scores(s_ref):
                    plgpu.wgmma(s_ref, q, _transposed(k_s.at[now]))
                    call.multiply(accumulators[0], p, v_s.at[before], scratch)
                    plgpu.barrier_arrive(turn.at[1 - warpgroup])
                    return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

                s = pl.run_scoped(scores, plgpu.ACC((ROWS, step_size), jnp.float32))
                plgpu.barrier_arrive(k_free.at[now])
                return softmax(s, m, l, seen(n) if masked else None)

            o = o * _rows(decay, o.shape)
            like = [m, l, decay, _zeros((ROWS, step_size))]
            (o,), (*made, p) = call.in_flight(body, [o], like)
            plgpu.barrier_arrive(v_free.at[before])
            # Rounded no sooner: until here the product was reading the last p.
            return o, *made, p.astype(k_s.dtype)

        def scores(s_ref):
            plgpu.wgmma(s_ref, q, _transposed(k_s.at[0]))
            return plgpu.wgmma_accumulator_load(s_ref)

        # The first turn is warpgroup 0's.
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        plgpu.barrier_wait(q_full.at[warpgroup])
        plgpu.barrier_wait(k_full.at[0])
        s = pl.run_scoped(scores, plgpu.ACC((ROWS, step_size), jnp.float32))
        plgpu.barrier_arrive(k_free.at[0])
        # A carry is a running row whose sum is 1 at its lse.
        m, l = lse * LOG2E, jnp.where(lse == -jnp.inf, 0.0, 1.0)
        *state, p = softmax(s, m, l, seen(0))
        state = o, *state, p.astype(k_s.dtype)
        o, m, l, decay, p = walk.fold(step, state, start=1)
        last = _slot(walk.listed - 1, stages)
        plgpu.barrier_wait(v_full.at[last])
        (o,), _ = call.in_flight(
            lambda refs: call.multiply(refs[0], p, v_s.at[last], scratch),
            [o * _rows(decay, o.shape)],
        )
        inverse = jnp.where(l > 0.0, 1.0 / l, 0.0)
        save(o * _rows(inverse, o.shape), (m + jnp.log2(l)) / LOG2E)

    def feed():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @pl.when(walk.listed > 0)
        def own():
            for i in range(COMPUTING):
                rows = pl.ds(walk.tile * TILE + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(
                    refs["q"].at[batch, rows, head], q_s.at[i], q_full.at[i]
                )

        def copy(name, column, _, slot, barrier):
            kv_head = lax.div(head, jnp.int32(call.group))
            rows = pl.ds(column * step_size, step_size)
            source = refs[name].at[batch, rows, kv_head]
            plgpu.copy_gmem_to_smem(source, scratch[f"{name}_s"].at[slot], barrier)

        walk.feed(
            stages,
            [
                (partial(copy, "k"), k_full, k_free),
                (partial(copy, "v"), v_full, v_free),
            ],
        )

    pl.when(warpgroup < COMPUTING)(compute)
    pl.when(warpgroup == COMPUTING)(feed)


def _dq(call, walk, refs, outs, scratch):
    """One tile of queries and one head of dq."""
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    warpgroup = lax.axis_index("warpgroup")
    q_s, do_s, k_s, v_s = _named(scratch, "q_s do_s k_s v_s")
    k_full, k_free, v_full, v_free = _named(scratch, "k_full k_free v_full v_free")
    own_full = scratch["own_full"]
    step_size, stages = k_s.shape[1], k_s.shape[0]

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        first = walk.tile * TILE + warpgroup * ROWS
        rows = pl.ds(first, ROWS)
        shape = (ROWS, step_size)
        q, do = q_s.at[warpgroup], do_s.at[warpgroup]
        own = None if walk.sees_all else call.tokens(refs["mask"].q, first, ROWS, 0)
        lse = gpu_load(refs["lse"].at[batch, head, rows], ROW)
        delta = gpu_load(refs["delta"].at[batch, head, rows], ROW)
        pl.when(walk.listed > 0)(lambda: plgpu.barrier_wait(own_full.at[warpgroup]))

        def step(n, state, masked):
            slot = _slot(n, stages)
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.barrier_wait(v_full.at[slot])

            def products(s_ref, dp_ref):
                plgpu.wgmma(s_ref, q, _transposed(k_s.at[slot]))
                plgpu.wgmma(dp_ref, do, _transposed(v_s.at[slot]))
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                seen = None
                if masked:
                    keys = walk.column(n) * step_size
                    seen = call.seen(own, refs["mask"].kv, keys, shape)
                p = call.weights(s, _rows(lse, shape), seen)
                dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                return call.pull_back(p * (dp - _rows(delta, shape)), s)

            def body(accumulators):
                ds = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * 2)
                plgpu.barrier_arrive(v_free.at[slot])
                ds = ds.astype(k_s.dtype)
                call.multiply(accumulators[0], ds, k_s.at[slot], scratch)

            (dq,), _ = call.in_flight(body, state)
            plgpu.barrier_arrive(k_free.at[slot])
            return (dq,)

        (dq,) = walk.fold(step, (_zeros((ROWS, q_s.shape[-1])),))
        gpu_store(outs[0].at[batch, rows, head], dq * call.late_scale)

    def feed():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @pl.when(walk.listed > 0)
        def own():
            for i in range(COMPUTING):
                rows = pl.ds(walk.tile * TILE + i * ROWS, ROWS)
                for name in ("q", "do"):
                    plgpu.copy_gmem_to_smem(
                        refs[name].at[batch, rows, head],
                        scratch[f"{name}_s"].at[i],
                        own_full.at[i],
                    )

        def copy(name, column, _, slot, barrier):
            kv_head = lax.div(head, jnp.int32(call.group))
            rows = pl.ds(column * step_size, step_size)
            source = refs[name].at[batch, rows, kv_head]
            plgpu.copy_gmem_to_smem(source, scratch[f"{name}_s"].at[slot], barrier)

        walk.feed(
            stages,
            [
                (partial(copy, "k"), k_full, k_free),
                (partial(copy, "v"), v_full, v_free),
            ],
        )

    pl.when(warpgroup < COMPUTING)(compute)
    pl.when(warpgroup == COMPUTING)(feed)


def _dkv(names, call, walk, refs, outs, scratch):
    """One tile of keys and one key head of dk, dv or both; scores are transposed."""
    kv_head, batch = lax.axis_index("head"), lax.axis_index("batch")
    warpgroup = lax.axis_index("warpgroup")
    k_s, v_s, q_s, do_s = _named(scratch, "k_s v_s q_s do_s")
    q_full, q_free, do_full, do_free = _named(scratch, "q_full q_free do_full do_free")
    own_full = scratch["own_full"]
    step_size, stages = q_s.shape[1], q_s.shape[0]
    sizes = {"dk": k_s.shape[-1], "dv": v_s.shape[-1]}

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        first = walk.tile * TILE + warpgroup * ROWS
        shape = (ROWS, step_size)
        k, v = k_s.at[warpgroup], v_s.at[warpgroup]
        own = None if walk.sees_all else call.tokens(refs["mask"].kv, first, ROWS, 0)
        pl.when(walk.listed > 0)(lambda: plgpu.barrier_wait(own_full.at[warpgroup]))

        def step(n, state, masked):
            slot = _slot(n, stages)
            q, do = q_s.at[slot], do_s.at[slot]
            plgpu.barrier_wait(q_full.at[slot])
            plgpu.barrier_wait(do_full.at[slot])

            def columns(ref):
                x = gpu_load(ref.at[slot], COLUMN)
                return lax.broadcast_in_dim(x, shape, (1,))

            def weights(s):
                seen = None
                if masked:
                    queries = walk.column(n) * step_size
                    seen = call.seen(own, refs["mask"].q, queries, shape, True)
                return call.weights(s, columns(scratch["lse_s"]), seen)

            def body(accumulators):
                into = dict(zip(names, accumulators, strict=True))

                def products(s_ref, *dp_ref):
                    plgpu.wgmma(s_ref, k, _transposed(q))
                    for ref in dp_ref:
                        plgpu.wgmma(ref, v, _transposed(do))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(dp_ref))
                    p = weights(s)
                    if "dv" in names:
                        call.multiply(into["dv"], p.astype(q_s.dtype), do, scratch)
                    for ref in dp_ref:
                        in_flight = len(names) - 1
                        dp = plgpu.wgmma_accumulator_load(ref, wait_n=in_flight)
                        dp -= columns(scratch["delta_s"])
                        ds = call.pull_back(p * dp, s).astype(q_s.dtype)
                        call.multiply(into["dk"], ds, q, scratch)

                refs = [plgpu.ACC(shape, jnp.float32)] * (1 + ("dk" in names))
                pl.run_scoped(products, *refs)

            state, _ = call.in_flight(body, state)
            plgpu.barrier_arrive(q_free.at[slot])
            plgpu.barrier_arrive(do_free.at[slot])
            return tuple(state)

        start = tuple(_zeros((ROWS, sizes[name])) for name in names)
        scales = {"dk": call.late_scale, "dv": 1.0}
        for name, ref, x in zip(names, outs, walk.fold(step, start), strict=True):
            gpu_store(ref.at[batch, pl.ds(first, ROWS), kv_head], x * scales[name])

    def feed():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @pl.when(walk.listed > 0)
        def own():
            for i in range(COMPUTING):
                rows = pl.ds(walk.tile * TILE + i * ROWS, ROWS)
                for name in ("k", "v"):
                    plgpu.copy_gmem_to_smem(
                        refs[name].at[batch, rows, kv_head],
                        scratch[f"{name}_s"].at[i],
                        own_full.at[i],
                    )

        def copy(name, row_name, column, repeat, slot, barrier):
            head = kv_head * call.group + repeat
            rows = pl.ds(column * step_size, step_size)
            for source, target in (
                (refs[name].at[batch, rows, head], scratch[f"{name}_s"]),
                (refs[row_name].at[batch, head, rows], scratch[f"{row_name}_s"]),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], barrier)

        walk.feed(
            stages,
            [
                (partial(copy, "q", "lse"), q_full, q_free),
                (partial(copy, "do", "delta"), do_full, do_free),
            ],
        )

    pl.when(warpgroup < COMPUTING)(compute)
    pl.when(warpgroup == COMPUTING)(feed)


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
                "implementation='triton' or 'xla'"
            )
        size = max(q.shape[-1], v.shape[-1])
        if size > 256:
            raise NotImplementedError(
                f"mosaic_gpu takes heads of at most 256, not {size}; use "
                "implementation='xla'"
            )
        pads = -q.shape[1] % TILE, -k.shape[1] % TILE
        mask = Mask(
            mask.rule,
            pad_tokens(mask.q, pads[0], with_ids=any(pads)),
            pad_tokens(mask.kv, pads[1], with_ids=any(pads)),
        )
        blocks = BlockSizes.of(size) if blocks is None else blocks
        return cls(mask, logits, blocks, q.shape[2] // k.shape[2], interpret)

    def launch(self, kernel, operands, outs, scratch, shape):
        """Runs a kernel on (heads, block of queries, block of keys, transposed)."""
        heads, block_q, block_kv, transposed = shape
        columns = operands["q" if transposed else "k"].shape[1]
        tiles = operands["k" if transposed else "q"].shape[1] // TILE
        repeats = self.group if transposed else 1
        columns //= block_q if transposed else block_kv
        operands = operands | {"mask": None, "walks": None}
        if not self.mask.sees_all:
            operands["mask"] = self.mask
            operands["walks"] = _walks(self.mask, block_q, block_kv, transposed)
        if self.interpret:
            staged = (COMPUTING, ROWS, block_q if transposed else block_kv)
            scratch = scratch | {"staged": _tile(staged, operands["q"], 16)}
        leaves, tree = jax.tree.flatten(operands)

        def body(*refs, **scratch):
            ins = tree.unflatten(refs[: len(leaves)])
            walk = _Walk.of(ins["walks"], columns, repeats)
            kernel(self, walk, ins, refs[len(leaves) :], scratch)

        made = plgpu.kernel(
            body,
            out_type=outs,
            scratch_types=scratch,
            grid=(heads, tiles, operands["q"].shape[0]),
            grid_names=("head", "tile", "batch"),
            num_threads=COMPUTING + 1,
            thread_name="warpgroup",
            kernel_name=f"usp{getattr(kernel, 'func', kernel).__name__}",
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

    def multiply(self, accumulator, a, b, scratch):
        """accumulator += a · b of an array and a ref, asynchronously."""
        if self.interpret:
            # The interpreter takes no operand from registers.
            staged = scratch["staged"].at[lax.axis_index("warpgroup")]
            staged[...] = a
            plgpu.commit_smem()
            a = staged
        plgpu.wgmma(accumulator, a, b)

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
        """The products' cotangent, without `late_scale`."""
        if self.logits.soft_cap is None:
            return dlogits
        return self.logits.pull_back(dlogits, self.logits.of(products))

    @property
    def late_scale(self):
        """What the sums of `pull_back` are still to be multiplied with."""
        return self.logits.scale if self.logits.soft_cap is None else 1.0

    def tokens(self, refs, first, size, dim):
        """The facts of `size` tokens as registers along dimension `dim` of scores."""
        batch = lax.axis_index("batch")

        def load(ref):
            row = batch if ref.shape[0] > 1 else 0
            return gpu_load(ref.at[row, pl.ds(first, size)], COLUMN if dim else ROW)

        return jax.tree.map(load, refs)

    def seen(self, own, others, first, shape, transposed=False):
        """What is seen of a block whose rows are `own` and columns start at `first`."""
        others = self.tokens(others, first, shape[1], 1)
        own, others = (
            jax.tree.map(lambda x: lax.broadcast_in_dim(x, shape, (dim,)), tokens)
            for dim, tokens in enumerate((own, others))
        )
        q, kv = (others, own) if transposed else (own, others)
        return sees(self.mask.rule, q, kv)


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
    def sees_all(self):
        return self.row is None

    @property
    def steps(self):
        return self.listed * self.repeats

    def column(self, step):
        """The block that a step is about."""
        entry = lax.div(step, jnp.int32(self.repeats)) if self.repeats > 1 else step
        return entry if self.sees_all else self.row[HEADER + entry]

    def fold(self, step, state, start=0):
        """Folds step(n, state, masked) over all steps from `start` on."""
        full = jnp.maximum(self.full * self.repeats, start)
        state = lax.fori_loop(start, full, partial(step, masked=False), state)
        if self.sees_all:
            return state
        return lax.fori_loop(full, self.steps, partial(step, masked=True), state)

    def feed(self, stages, streams):
        """Copies every step's tiles as buffers come free.

        Each stream is (copy(column, repeat, slot, barrier), full, free barriers).
        """

        def step(n, column):
            slot = _slot(n, stages)
            repeat = lax.rem(n, jnp.int32(self.repeats))
            # Read ahead, so that no copy waits for the table.
            ahead = self.column(jnp.minimum(n + 1, self.columns * self.repeats - 1))
            for copy, full, free in streams:
                pl.when(n >= stages)(
                    lambda free=free: plgpu.barrier_wait(free.at[slot])
                )
                copy(column, repeat, slot, full.at[slot])
            return ahead

        lax.fori_loop(0, self.steps, step, self.column(jnp.int32(0)))


# What comes before the blocks in a row of the table: its tile and two counts.
HEADER = 3


def _walks(mask, block_q, block_kv, transposed):
    """Which blocks each tile walks: int32 [B, tiles, 3 + columns].

    A row is (tile, how many blocks are seen entirely, how many are seen at all, the
    blocks in that order). Rows are sorted by work, so that no heavy tile starts last.
    """
    kinds = block_kinds(mask, block_q, block_kv)
    kinds = kinds.swapaxes(1, 2) if transposed else kinds
    columns = kinds.shape[2]
    index = lax.broadcasted_iota(jnp.int32, kinds.shape, 2)
    rank = jnp.where(kinds == FULL, 0, jnp.where(kinds == EMPTY, 2, 1))
    order = jnp.sort(rank * columns + index, axis=-1) % columns
    full, listed = (jnp.sum(x, -1, dtype=jnp.int32) for x in (rank == 0, rank < 2))
    tiles = jnp.argsort(-listed, axis=-1).astype(jnp.int32)
    counts = jnp.stack([full, listed], axis=-1)
    table = jnp.take_along_axis(
        jnp.concatenate([counts, order], axis=-1), tiles[..., None], axis=1
    )
    return jnp.concatenate([tiles[..., None], table], axis=-1)


def _slot(n, stages):
    """The buffer of a step."""
    return lax.rem(n, jnp.int32(stages)) if stages > 1 else jnp.int32(0)


def _rows(x, shape):
    """Repeats one value a row along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _transposed(ref):
    return ref.transpose((1, 0))


def _named(scratch, names):
    return [scratch[name] for name in names.split()]


def _tile(shape, like, width):
    """Shared memory for WGMMA, in swizzled tiles of `width` columns."""
    transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)
    return plgpu.SMEM(shape, like.dtype, transforms=transforms)


def _width(step, q, v):
    """The widest swizzle that cuts the streamed block and both head sizes."""
    sizes = step, q.shape[-1], v.shape[-1]
    return next(w for w in (64, 32, 16) if not any(size % w for size in sizes))


def _ring_barriers(name, stages, copies=1):
    """Barriers of streamed buffers: filled by copies, freed by both warpgroups."""
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
    return {f"{name}_full": full, f"{name}_free": free}


def _like(x, shape):
    del x
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _padded(x):
    """[B, T, N, H] with T a multiple of the tile and H of the narrowest swizzle."""
    widths = (0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, -x.shape[3] % 16)
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _tokens_last(x, fill):
    """[B, T, N] -> [B, N, T], T padded to a multiple of the tile."""
    widths = (0, 0), (0, 0), (0, -x.shape[1] % TILE)
    return jnp.pad(x.swapaxes(1, 2), widths, constant_values=fill)
