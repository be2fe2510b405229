"""Accumulation into HBM, overlapped with the products of a TPU kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from usp_jax.kernels.mosaic_tpu.walk import Ref

# An asynchronous copy.
Copy = Any


@dataclasses.dataclass(frozen=True)
class InPlace:
    """Adds to one block of an array in HBM per step, overlapped with the computation.

    The array is [B, N, H, T], and its blocks are of tokens.

    Step n = t * group + g adds to block `minor(t)` of head `head + g`. The block is
    read during step n - 1 and written during step n + 1, with buffer n mod 3 of three.
    If step n - 1 or n - 2 writes the same block, it is instead read in step n itself,
    after those writes.
    """

    hbm: Ref
    blocks: Ref
    reads: Ref
    writes: Ref
    row: jax.Array
    head: jax.Array
    group: int
    count: jax.Array
    minor: Callable[[jax.Array], jax.Array]
    t: jax.Array
    g: jax.Array

    def begin(self) -> None:
        """Starts the read of the next step, and of this one if it had to wait."""
        t, g, n = self.t, self.g, self.t * self.group + self.g
        again = self._again(t)

        # If the previous step had to wait for this write, it has already done so.
        before = jnp.where(g == 0, jnp.maximum(t - 1, 0), t)
        pl.when((n >= 2) & ~self._again(before))(self._write(n - 2).wait)

        @pl.when(again)
        def _() -> None:
            self._write(n - 1).wait()
            self._read(t, g, n).start()

        pl.when(n == 0)(self._read(t, g, n).start)
        g_next = jnp.where(g + 1 == self.group, 0, g + 1)
        more = n + 1 < self.count * self.group
        t_next = jnp.where((g_next == 0) & more, t + 1, t)
        more = more & ~self._again(t_next)
        pl.when(more)(self._read(t_next, g_next, n + 1).start)

    def add(self, x: jax.Array) -> None:
        """Adds `x` to the block of this step."""
        n = self.t * self.group + self.g
        self._read(self.t, self.g, n).wait()
        self.blocks[n % 3] += x

    def end(self) -> None:
        """Starts the write of this step; the last step waits for all writes."""
        t, n = self.t, self.t * self.group + self.g
        self._write(n).start()

        @pl.when(n + 1 == self.count * self.group)
        def _() -> None:
            pl.when((n >= 1) & ~self._again(t))(self._write(n - 1).wait)
            self._write(n).wait()

    def _again(self, t: jax.Array) -> jax.Array:
        """Returns whether a step within the last two before entry t uses its block."""
        # Steps of different heads have different blocks.
        back = range(1, 2 // self.group + 1)
        same = [
            (t >= d) & (self.minor(t) == self.minor(jnp.maximum(t - d, 0)))
            for d in back
        ]
        return functools.reduce(jnp.logical_or, same, jnp.bool_(False))

    def _block(self, t: jax.Array, g: jax.Array) -> Ref:
        size = self.blocks.shape[2]
        tokens = pl.ds(self.minor(t) * size, size)
        return self.hbm.at[self.row, self.head + g, :, tokens]

    def _read(self, t: jax.Array, g: jax.Array, n: jax.Array) -> Copy:
        slot = n % 3
        block, semaphore = self._block(t, g), self.reads.at[slot]
        return pltpu.make_async_copy(block, self.blocks.at[slot], semaphore)

    def _write(self, n: jax.Array) -> Copy:
        # Waiting needs only the semaphore, so this step's block does as well.
        slot = jnp.maximum(n, 0) % 3
        block, semaphore = self._block(self.t, self.g), self.writes.at[slot]
        return pltpu.make_async_copy(self.blocks.at[slot], block, semaphore)
