"""The ring: key/value shards travel round, and every device attends to each in turn.

Ring Attention (Liu et al., arXiv 2310.01889) over any chunk implementation. At step s
the device with ring index r holds the keys and values of shard (r - s) mod R; step 0 is
its own. Each rotation is issued beside a chunk that does not need it, so that it can be
in flight while the chunk is computed, and no rotation is made that nobody reads:
R - 1 forward, and backward R - 1 of k, v and R - 1 of dk, dv.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax.kernels import Carry, Chunk
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring of devices, and what each does with a shard of keys and values.

    Attributes:
      mask_of: the mask of this device's queries against the keys of a ring shard.
    """

    axis_name: str | None
    size: int
    index: Int[Array, ""] | int
    chunk: Chunk
    mask_of: Callable[[Int[Array, ""] | int], Mask]
    logits: Logits

    def rotate(self, x):
        """Sends `x` to the next device of the ring, and receives the previous one's."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return lax.ppermute(x, self.axis_name, ring)

    def mask(self, step):
        """The mask of the shard that this device holds at a step."""
        return self.mask_of((self.index - step) % self.size)


def ring_forward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "2 B S m H"],
    carry: Carry | None = None,
) -> Carry:
    """Attention of this device's queries to the keys of the whole ring.

    Args:
      carry: what was seen before the ring, an attention sink for instance.

    Returns:
      out [B, T, n, H] and lse [B, T, n] in the accumulation dtype.
    """

    def attend(step, kv, carry):
        return ring.chunk.forward(q, kv[0], kv[1], ring.mask(step), carry, ring.logits)

    def body(step, state):
        kv, carry = state
        return ring.rotate(kv), attend(step, kv, carry)

    if ring.size == 1:
        return attend(0, kv, carry)
    kv, carry = body(0, (kv, carry))
    kv, carry = _loop(1, ring.size - 1, body, (kv, carry))
    return attend(ring.size - 1, kv, carry)


def ring_backward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "2 B S m H"],
    dout: Float[Array, "B T n H"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
) -> tuple[Float[Array, "B T n H"], Float[Array, "2 B S m H"]]:
    """dq and dk, dv (stacked) of `ring_forward`, in the accumulation dtype.

    dk, dv follow the shard they belong to, one hop late: at each step the sum over the
    steps before is on its way while this step's part is computed. The own shard's part
    stays at home; the travelling sum starts at step 1 and comes home after the last.
    The first hop and the last have no such step: beside each, half of the queries meet
    their own shard.
    """
    half = -(-q.shape[1] // 2)

    def attend(step, kv, rows=slice(None)):
        ours = (x[:, rows] for x in (q, dout, lse, delta))
        return _attend_backward(ring, ring.mask(step).rows(rows), kv, *ours)

    def late(step, kv, dq, dkv):
        """One step after the first: the sum arrives while this step's part is made."""
        arrived = ring.rotate(dkv)
        dq_part, dkv_part = attend(step, kv)
        return dq + dq_part, arrived + dkv_part

    def body(step, state):
        kv, *grads = state
        return _together(ring.rotate(kv), *late(step, kv, *grads))

    last = ring.size - 1
    if not last:
        return attend(0, kv)
    own = kv
    kv, dq_home, home = _together(ring.rotate(own), *attend(0, own, slice(half)))
    kv_next = ring.rotate(kv) if last > 1 else None
    kv, dq, dkv = _together(kv_next, *attend(1, kv))
    if last > 1:
        kv, dq, dkv = _loop(2, last, body, (kv, dq, dkv))
        dq, dkv = late(last, kv, dq, dkv)
    own, dkv = _together(own, dkv)
    home += ring.rotate(dkv)
    if half < q.shape[1]:
        dq_rest, dkv = attend(0, own, slice(half, None))
        dq_home, home = jnp.concatenate([dq_home, dq_rest], 1), home + dkv
    return _together(dq + dq_home, home)


def _attend_backward(ring, mask, kv, q, dout, lse, delta):
    """dq and stacked dk, dv of some queries and one shard."""
    k, v = kv
    dq, *dkv = ring.chunk.backward(q, k, v, dout, lse, delta, mask, ring.logits)
    return dq, jnp.stack(dkv)


def _together(*values):
    """The values, none of them there before the others.

    A hop then has no later work to wait beside: schedulers would leave some without.
    """
    return lax.optimization_barrier(values)


def _loop(start, stop, body, state):
    """A loop in the compiled program; none when it has no trips."""
    return lax.fori_loop(start, stop, body, state) if start < stop else state
