"""A CUDA thread block (cta) of the Hopper kernels: its memory and warpgroup roles.

Two warpgroups compute; the third copies tiles to shared memory for them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from usp_jax._compat import gpu_load
from usp_jax.kernels.mosaic_gpu.blocks import Tile
from usp_jax.kernels.mosaic_gpu.spec import ChunkSpec
from usp_jax.kernels.mosaic_gpu.tiles import (
    COLUMN,
    COMPUTING,
    ROW,
    ROWS,
    TILE,
    Index,
    Operand,
    Ref,
    slot_of,
)
from usp_jax.kernels.mosaic_gpu.walk import Walk
from usp_jax.masking import Tokens, sees

# Shared memory or barriers of a cta.
Scratch = Any

# Registers per thread, out of the 64K that a multiprocessor has for 3 · 128 threads.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel: the program of a computing warpgroup and the operands it reads.

    Attributes:
      name: the name in profiles, after "usp_".
      body: the program of a computing warpgroup.
      own: the operands whose tile stays in shared memory.
      streams: the operands whose blocks stream through; those in a tuple arrive
        together.
      tile: the tokens of a streamed block, and the buffers of both streams.
      further: further shared memory and barriers by name.
      swizzled: the most columns that are swizzled together in shared memory: parts of
        an operand that products read must be multiples of it.
    """

    name: str
    body: Callable[["Cta"], None]
    own: tuple[str, ...]
    streams: tuple[tuple[str, ...], ...]
    tile: Tile
    further: Mapping[str, Scratch] = dataclasses.field(default_factory=dict)
    swizzled: int = 64

    @property
    def transposed(self) -> bool:
        """True if the tiles are keys and the queries stream."""
        return "k" in self.own

    def scratch(self, operands: Mapping[str, Operand]) -> dict[str, Scratch]:
        """Returns the shared memory and the barriers by name."""
        widths = [x.shape[-1] for name, x in operands.items() if name in "qkv"]
        # The widest swizzle that divides the streamed block and all head sizes.
        sizes = self.swizzled, self.tile.tokens, *widths
        width = next(w for w in (64, 32, 16) if not any(size % w for size in sizes))
        transforms = swizzle(width, 2)

        def buffers(name: str, *lead: int) -> Scratch:
            x = operands[name]
            if x.ndim == 3:
                return plgpu.SMEM(lead, x.dtype)
            return plgpu.SMEM((*lead, x.shape[-1]), x.dtype, transforms=transforms)

        memory: dict[str, Scratch] = {
            name: buffers(name, COMPUTING, ROWS) for name in self.own
        }
        for stream, stages in zip(self.streams, self.tile.buffers, strict=True):
            for name in stream:
                memory[name] = buffers(name, stages, self.tile.tokens)
        memory["own_full"] = plgpu.Barrier(
            num_arrivals=len(self.own), num_barriers=COMPUTING
        )
        memory["turn"] = plgpu.Barrier(num_barriers=COMPUTING)
        for stream, stages in zip(self.streams, self.tile.buffers, strict=True):
            for what, arrivals in (("full", len(stream)), ("free", COMPUTING)):
                memory[f"{stream[0]}_{what}"] = plgpu.Barrier(
                    num_arrivals=arrivals, num_barriers=stages
                )
        # The interpreter's wgmma does not take operands from registers.
        staged = (COMPUTING, ROWS, self.tile.tokens)
        memory["staged"] = plgpu.SMEM(staged, operands["q"].dtype)
        return memory | dict(self.further)


def swizzle(columns: int, itemsize: int) -> tuple[Scratch, ...]:
    """Returns the transforms of shared memory that products read and TMA writes."""
    return (
        plgpu.TilingTransform((8, columns)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(columns * itemsize),  # type: ignore[abstract]
    )


class Cta:
    """A cta from the view of one of its warpgroups: tile, head and memory."""

    def __init__(
        self,
        spec: ChunkSpec,
        kernel: Kernel,
        walk: Walk,
        refs: Mapping[str, Ref],
        outs: Sequence[Ref],
        scratch: Mapping[str, Ref],
    ) -> None:
        self.spec, self.kernel, self.walk = spec, kernel, walk
        self.refs, self.outs, self.scratch = refs, outs, scratch
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        self.warpgroup = lax.axis_index("warpgroup")

    def rows_of(self, ref: Ref, index: Index | None = None) -> Ref:
        """Returns the rows of a warpgroup of [B, T, N, H] or [B, N, T].

        Args:
          index: the warpgroup; None means this one.
        """
        index = self.warpgroup if index is None else index
        rows = pl.ds(self.walk.tile * TILE + index * ROWS, ROWS)
        return self._at(ref, rows, self.head)

    def compute(self) -> None:
        """Runs the program of the first two warpgroups."""
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        self.kernel.body(self)

    def copy(self) -> None:
        """Runs the program of the last warpgroup: copies tiles into free buffers."""
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        walk = self.walk

        @pl.when(walk.listed > 0)
        def own() -> None:
            for i in range(COMPUTING):
                for name in self.kernel.own:
                    rows, tile = self.rows_of(self.refs[name], i), self.scratch[name]
                    barrier = self.scratch["own_full"].at[i]
                    plgpu.copy_gmem_to_smem(rows, tile.at[i], barrier)

        def step(n: jax.Array, column: Index) -> Index:
            # Read the next entry early, so that no copy waits for the table.
            ahead = walk.column(jnp.minimum(n + 1, walk.columns * walk.repeats - 1))
            if self.kernel.transposed:
                head = self.head * walk.repeats + lax.rem(n, jnp.int32(walk.repeats))
            else:
                head = lax.div(self.head, jnp.int32(self.spec.group))
            rows = pl.ds(column * self.kernel.tile.tokens, self.kernel.tile.tokens)
            both = zip(self.kernel.streams, self.kernel.tile.buffers, strict=True)
            for stream, stages in both:
                slot = slot_of(n, stages)
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

    def await_own(self) -> None:
        """Waits for the tiles of the operands in `own`."""
        plgpu.barrier_wait(self.scratch["own_full"].at[self.warpgroup])

    def await_full(self, name: str, slot: Index) -> None:
        """Waits until a buffer of a stream is full."""
        plgpu.barrier_wait(self.scratch[f"{name}_full"].at[slot])

    def free(self, name: str, slot: Index) -> None:
        """Signals that this warpgroup no longer needs a buffer of a stream."""
        plgpu.barrier_arrive(self.scratch[f"{name}_free"].at[slot])

    def multiply(self, accumulator: Ref, a: jax.Array, b: Ref) -> None:
        """Starts accumulator += a · b, with `a` in registers and `b` in a buffer."""
        if self.spec.interpret:
            staged = self.scratch["staged"].at[self.warpgroup]
            staged[...] = a
            plgpu.commit_smem()
            plgpu.wgmma(accumulator, staged, b)
        else:
            plgpu.wgmma(accumulator, a, b)

    def in_flight(
        self,
        body: Callable[[Sequence[Ref]], tuple[jax.Array, ...] | None],
        accumulators: Sequence[jax.Array],
        like: Sequence[jax.Array] = (),
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Runs body(accumulator refs), then waits for all its products.

        Args:
          body: returns arrays like those of `like`, or None.
          accumulators: the initial values.
          like: arrays of the shapes and dtypes that `body` returns.

        Returns:
          The final accumulators and the arrays that `body` returned.
        """
        if self.spec.interpret:
            # The interpreter cannot start an accumulator at a value.
            def scoped(*refs: Ref) -> tuple[list[jax.Array], list[jax.Array]]:
                returned = body(refs)
                return [ref[...] for ref in refs], list(returned or ())

            types = [plgpu.ACC((x.shape[0], x.shape[1]), x.dtype) for x in accumulators]
            sums, returned = pl.run_scoped(scoped, *types)
            return [x + y for x, y in zip(accumulators, sums, strict=True)], returned

        def stateful(refs: tuple[Sequence[Ref], Sequence[Ref]]) -> None:
            accumulator_refs, returned_refs = refs
            returned = body(accumulator_refs) or ()
            for ref, x in zip(returned_refs, returned, strict=True):
                ref[...] = x

        started = [plgpu.ACC.init(x) for x in accumulators]
        return pl.run_state(stateful)((started, list(like)))

    def seen(self, n: Index) -> jax.Array | None:
        """Computes the mask [rows, columns] of step n; None if no block is masked."""
        if self.walk.row is None:
            return None
        mask, size = self.refs["mask"], self.kernel.tile.tokens
        rows = pl.ds(self.walk.tile * TILE + self.warpgroup * ROWS, ROWS)
        columns = pl.ds(self.walk.column(n) * size, size)

        def facts(tokens: Tokens, is_own: bool) -> Tokens:
            part, layout, dim = (rows, ROW, 0) if is_own else (columns, COLUMN, 1)

            def load(ref: Ref) -> jax.Array:
                row = self.batch if ref.shape[0] > 1 else 0
                x = gpu_load(ref.at[row, part], layout)
                return lax.broadcast_in_dim(x, (ROWS, size), (dim,))

            return jax.tree.map(load, tokens)

        transposed = self.kernel.transposed
        q, kv = facts(mask.q, not transposed), facts(mask.kv, transposed)
        return sees(self.spec.mask.rule, q, kv)

    def _at(self, ref: Ref, rows: pl.Slice, head: jax.Array) -> Ref:
        """Returns rows of one head of [B, T, N, H] or [B, N, T]."""
        if len(ref.shape) == 3:
            return ref.at[self.batch, head, rows]
        return ref.at[self.batch, rows, head]
