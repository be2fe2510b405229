"""Where documents start, in the chunks of one device."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from usp_jax.delta.maps import Order
from usp_jax.masking import PADDING
from usp_jax.mesh import AxisName


def document_starts(
    segment_ids: Int[Array, "B slots L"],
    order: Order,
    axis: AxisName | None,
    index: Int[Array, ""] | int,
) -> Bool[Array, "B slots L"]:
    """Computes at which tokens a document starts, other than the row's first one.

    A document is a maximal run of equal ids in position order. The row's first document
    continues from the row's initial state, so nothing starts there. Devices exchange
    two numbers for each chunk.

    Args:
      segment_ids: of this device's chunks.
      order: of all chunks.
      axis: the ring; None for one device.
      index: this device's index on it.
    """
    real = segment_ids != PADDING
    facts = jnp.stack([segment_ids[..., -1], real.any(-1).astype(jnp.int32)])
    if axis is not None:
        facts = lax.all_gather(facts, axis, axis=2)
    else:
        facts = facts[:, :, None]
    # [2, B, R, slots] -> [2, B, chunks], in order.
    devices, slots = map(list, zip(*order.chunks, strict=True))
    last, some = facts[:, :, jnp.array(devices), jnp.array(slots)]
    first = jnp.full_like(last[:, :1], PADDING)
    last = jnp.concatenate([first, last[:, :-1]], 1)
    some = jnp.concatenate([jnp.zeros_like(first), some[:, :-1]], 1)
    own = jnp.asarray(order.places)[index]
    # Of the token before each token: its id, and whether any before it is real.
    before = jnp.concatenate([last[:, own, None], segment_ids[..., :-1]], -1)
    seen = lax.cummax(some, axis=1)[:, own, None]
    some_real = lax.cummax(real[..., :-1].astype(jnp.int32), axis=2)
    seen = jnp.concatenate([seen, jnp.maximum(some_real, seen)], -1)
    return real & (before != segment_ids) & (seen == 1)


def padded(x: jax.Array, padding: int, fill: int = 0) -> jax.Array:
    """Appends tokens to [B, T, ...]."""
    widths = [(0, padding if dim == 1 else 0) for dim in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)
