"""The ring that passes queries: keys and values stay, queries travel to them.

Context parallelism for inference (arXiv 2411.01783, section 3.2): if there are fewer
queries than keys, the queries should move. Their partial results, (out, lse) in the
accumulation dtype, follow one hop later; in the backward pass dq does. Each is rotated
R - 1 times, and k, v are not sent at all.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from usp_jax.kernels import Carry
from usp_jax.masking import Mask
from usp_jax.merge import merge
from usp_jax.ring.keys import Params, Stays, apart, side_by_side
from usp_jax.ring.ring import Index, Ring
from usp_jax.ring.steps import added, own_rows, take_turn
from usp_jax.varying import vary_like

# What stays with the keys: their gradient, and those of the parameters of `Keys`.
Kept = tuple[jax.Array, Params]


@dataclasses.dataclass(frozen=True)
class PassQ:
    """Rotates the queries while k, v stay; for few queries."""


def pass_q_forward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    carry: Carry | None = None,
) -> Carry:
    """Computes `ring_forward` by rotating the queries."""

    def part(step: Index, q: jax.Array, rows: slice) -> tuple[None, jax.Array]:
        # The carry from before the ring belongs to this device's own queries, once.
        before = carry if isinstance(step, int) and step == 0 else None
        before = jax.tree.map(lambda x: x[:, rows], before)
        mask = _mask(ring, step).rows(rows)
        seen = ring.chunk_forward(mask, q[:, rows], kv, before)
        return None, _packed(vary_like(seen, q))

    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return _packed(merge(*_unpacked(a), *_unpacked(b)))

    def join(
        first: tuple[None, jax.Array], rest: tuple[None, jax.Array]
    ) -> tuple[None, jax.Array]:
        return None, jnp.concatenate([first[1], rest[1]], 1)

    rows = own_rows(q.shape[1])
    _, seen = take_turn(ring, ring.whole_turn, q, part, rows, add=add, join=join)
    return _unpacked(seen)


def pass_q_backward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    dout: Float[Array, "B T n V"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
) -> tuple[Stays, Float[Array, "B S m D"]]:
    """Computes `ring_backward` by rotating the queries."""

    def part(
        step: Index, visitor: tuple[jax.Array, jax.Array], rows: slice
    ) -> tuple[Kept, jax.Array]:
        rows_seen, (lse, delta) = visitor[0][:, rows], visitor[1][:, :, rows]
        q, dout = apart(rows_seen, head_size)
        mask = _mask(ring, step).rows(rows)
        (dq, params), dkv = ring.chunk_backward(mask, q, kv, dout, lse, delta)
        return (dkv, params), dq

    def join(
        first: tuple[Kept, jax.Array], rest: tuple[Kept, jax.Array]
    ) -> tuple[Kept, jax.Array]:
        return added(first[0], rest[0]), jnp.concatenate([first[1], rest[1]], 1)

    head_size = q.shape[-1]
    visitor = side_by_side(q, dout.astype(q.dtype)), jnp.stack([lse, delta])
    rows = own_rows(q.shape[1])
    (dkv, params), dq = take_turn(
        ring, ring.whole_turn, visitor, part, rows, add=jnp.add, join=join
    )
    return (dq, params), dkv


def _mask(ring: Ring, step: Index) -> Mask:
    """The mask of the queries held at a step against this device's own keys."""
    q = ring.q_tokens.shard(ring.whole_turn.moved(ring.index, -step))
    return Mask(ring.rule, q, ring.kv_tokens.shard(ring.index))


def _packed(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Packs (out, lse) into one array, for one collective."""
    out, lse = carry
    return jnp.concatenate([out, lse[..., None]], -1)


def _unpacked(x: jax.Array) -> Carry:
    return x[..., :-1], x[..., -1]
