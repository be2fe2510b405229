"""The Ulysses half: all-to-alls that trade a split sequence for split heads.

DeepSpeed-Ulysses (arXiv 2309.14509) for any numbers of heads. Query heads are padded to
a multiple of the axis. Key/value heads are sent as they are if the axis divides them;
otherwise each device receives the m heads that its query heads need, with the same m
for all devices, as listed in the tables below. Lower case letters are the sizes of this
device's shard.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from usp_jax.kernels import Carry, Chunk
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask
from usp_jax.mesh import AxisName


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads that each device of the Ulysses axis works on.

    Attributes:
      part, parts: index and number of the equal parts of each device's query heads.
    """

    num_heads: int
    num_kv_heads: int
    ulysses_size: int
    part: int = 0
    parts: int = 1

    @property
    def padded(self) -> int:
        """Number of query heads, padded to a multiple of the axis."""
        return -(-self.num_heads // self.ulysses_size) * self.ulysses_size

    @functools.cached_property
    def needs(self) -> np.ndarray:
        """The key/value head of each query head: [ulysses, N / ulysses]."""
        group = self.num_heads // self.num_kv_heads
        heads = np.minimum(np.arange(self.padded) // group, self.num_kv_heads - 1)
        return heads.reshape(self.ulysses_size, -1)

    @functools.cached_property
    def sent(self) -> np.ndarray:
        """The key/value heads that each device receives: [ulysses, m].

        m is the largest number of distinct heads that any device needs; a device that
        needs fewer is sent its last one again.
        """
        needed = [np.unique(row) for row in self.needs]
        m = max(len(row) for row in needed)
        return np.stack([np.pad(row, (0, m - len(row)), "edge") for row in needed])

    @property
    def replicated(self) -> bool:
        """True if some key/value head goes to more than one device."""
        return self.sent.size != self.num_kv_heads

    @property
    def local(self) -> slice:
        """This part of a device's query heads."""
        size = self.padded // self.ulysses_size // self.parts
        return slice(self.part * size, (self.part + 1) * size)

    @property
    def kv_parts(self) -> int:
        """Number of parts that the received key/value heads are split into.

        Each serves the same whole number of parts of the query heads.
        """
        if self.replicated:
            return 1
        return math.gcd(self.parts, self.num_kv_heads // self.ulysses_size)

    @property
    def kv_local(self) -> slice:
        """The part of a device's key/value heads that this part's queries see."""
        size = self.sent.shape[1] // self.kv_parts
        part = self.part * self.kv_parts // self.parts
        return slice(part * size, (part + 1) * size)

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """The received key/value head of each group of this part's query heads.

        [ulysses, n / g]. g is the largest group size for which, on every device, all
        query heads of a group use the same key/value head.
        """
        local = np.stack(
            [
                np.searchsorted(row, need[self.local]) - self.kv_local.start
                for row, need in zip(self.sent, self.needs, strict=True)
            ]
        )
        bounds = [np.flatnonzero(np.diff(row)) + 1 for row in local]
        g = math.gcd(local.shape[1], *(int(b) for row in bounds for b in row))
        return local[:, ::g]


def to_heads(
    x: Float[Array, "B t N H"], axis_name: AxisName | None
) -> Float[Array, "B T n H"]:
    """[B, T/(R·U), N, H] -> [B, T/R, N/U, H]"""
    return _all_to_all(x, axis_name, split=2, concat=1)


def to_seq(
    x: Float[Array, "B T n H"], axis_name: AxisName | None
) -> Float[Array, "B t N H"]:
    """[B, T/R, N/U, H] -> [B, T/(R·U), N, H]"""
    return _all_to_all(x, axis_name, split=1, concat=2)


def _all_to_all(
    x: jax.Array, axis_name: AxisName | None, split: int, concat: int
) -> jax.Array:
    if axis_name is None or lax.axis_size(axis_name) == 1:
        return x
    return lax.all_to_all(
        x, axis_name, split_axis=split, concat_axis=concat, tiled=True
    )


def pad_heads(x: Float[Array, "B t N H"], heads: Heads) -> Float[Array, "B t M H"]:
    """Pads query heads with zeros to a multiple of the axis."""
    padding = heads.padded - heads.num_heads
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) if padding else x


def of_devices(x: Float[Array, "B t M H"], own: slice, size: int) -> Array:
    """Selects the heads `own` of each of `size` devices: [B, t, size · n, H]"""
    x = x.reshape(*x.shape[:2], size, -1, x.shape[3])[:, :, :, own]
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def of_parts(parts: list[Float[Array, "B t n H"]], size: int) -> Array:
    """Joins parts of the heads, the inverse of `of_devices`: [B, t, M, H]"""
    parts = [x.reshape(*x.shape[:2], size, -1, x.shape[3]) for x in parts]
    joined = jnp.concatenate(parts, 3)
    return joined.reshape(*joined.shape[:2], -1, joined.shape[4])


def kv_to_heads(
    kv: Float[Array, "B s K D"], heads: Heads, axis_name: AxisName | None
) -> Float[Array, "B S m D"]:
    """[B, S/(R·U), K, D] -> [B, S/R, m, D]"""
    if heads.replicated:
        kv = jnp.take(kv, heads.sent.reshape(-1), axis=2)
    return to_heads(kv, axis_name)


def kv_to_seq(
    dkv: Float[Array, "B S m D"],
    heads: Heads,
    axis_name: AxisName | None,
    dtype: DTypeLike,
) -> Float[Array, "B s K D"]:
    """The transpose of `kv_to_heads`, in `dtype`.

    Gradients of one head from several devices are summed before rounding to `dtype`.
    """
    if not heads.replicated:
        return to_seq(dkv.astype(dtype), axis_name)
    parts = to_seq(dkv, axis_name)
    total = jnp.zeros_like(
        parts, shape=(*parts.shape[:2], heads.num_kv_heads, parts.shape[3])
    )
    return total.at[:, :, heads.sent.reshape(-1)].add(parts).astype(dtype)


def with_groups(chunk: Chunk, heads: Heads, index: Int[Array, ""] | int) -> Chunk:
    """Wraps a chunk implementation so that it sees equal groups of query heads.

    If the received heads serve unequal numbers of a device's query heads, heads that
    several groups share are repeated locally, for the kernel only.
    """
    groups = heads.groups
    m = heads.kv_local.stop - heads.kv_local.start
    if groups.shape[1] == m and (groups == np.arange(m)).all():
        return chunk
    table = jnp.asarray(groups)[index]

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.take(x, table, axis=2)

    def summed(dx: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(dx, shape=x.shape).at[:, :, table].add(dx)

    def forward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        carry: Carry | None,
        logits: Logits,
    ) -> Carry:
        return chunk.forward(q, repeated(k), repeated(v), mask, carry, logits)

    def backward(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        dout: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        mask: Mask,
        logits: Logits,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dq, dk, dv = chunk.backward(
            q, repeated(k), repeated(v), dout, lse, delta, mask, logits
        )
        return dq, summed(dk, k), summed(dv, v)

    return Chunk(forward, backward, tables=chunk.tables)
