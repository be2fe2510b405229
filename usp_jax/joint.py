"""Joint attention: text tokens that every device has, beside split image tokens.

Diffusion transformers let two sequences see each other whole. Without order it does not
matter where a token stands, so the joint tokens are dealt out: each of the P = ring ·
ulysses devices appends its P-th part of them to its own shard, and one `usp_attention`
of the longer sequence does the rest. No image token moves for it, and no joint token is
counted twice, whatever the degrees:

    query [B, T, N, H], joint_query [B, J, N, H], padded to a multiple of P
      | on each device [B, T/P, N, H] and [B, J/P, N, H], joined
    [B, T + J, N, H]
      | usp_attention
      | on each device cut apart; the joint part gathered
    out [B, T, N, H], joint_out [B, J, N, H]
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from usp_jax import arguments
from usp_jax.attention import usp_attention
from usp_jax.masking import PADDING
from usp_jax.mesh import MeshAxes, axis_size, resolve_mesh
from usp_jax.shards import SEQ, TOKENS, Shards


def usp_joint_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    joint_query: Float[Array, "B J N H"],
    joint_key: Float[Array, "B J K H"],
    joint_value: Float[Array, "B J K H"],
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    joint_segment_ids: Int[Array, "B J"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B J N H"]]:
    """Attention of two sequences to both, of which one is split and one is not.

    What `usp_attention` gives for the two joined, in either order, without a causal
    mask or window.

    Args:
      query, key, value: [B, T, N, H], [B, T, K, H] twice; T, split over `ring` and
        `ulysses`, is a multiple of ring · ulysses, in any order.
      joint_query, joint_key, joint_value: the same with any length J, whole on every
        device that shares a sequence.
      segment_ids: int32 [B, T], -1 for padding. None is document 0.
      joint_segment_ids: int32 [B, J]; rows may so differ in length.

    The other arguments are those of `usp_attention`.

    Returns:
      (out [B, T, N, H], joint_out [B, J, N, H]), split and whole like their queries.

    Raises:
      ValueError: shapes, dtypes, lengths or names that do not fit.

    Example:
      >>> out, text_out = usp_jax.usp_joint_attention(
      ...     q, k, v, text_q, text_k, text_v, mesh=mesh)
    """
    arguments.check_arrays(query, key, value)
    arguments.check_arrays(joint_query, joint_key, joint_value)
    _check_pairs(query, key, joint_query, joint_key)
    mesh = resolve_mesh(mesh, axes)
    parts = axis_size(mesh, axes.ring) * axis_size(mesh, axes.ulysses)
    if query.shape[1] % parts:
        raise ValueError(
            f"query.shape[1]={query.shape[1]} must be a multiple of ring·ulysses = "
            f"{parts}; pad it and give the padding segment id -1"
        )
    ids = arguments.sides_of("segment_ids", segment_ids, query.shape, key.shape)
    joint_ids = arguments.sides_of(
        "joint_segment_ids", joint_segment_ids, joint_query.shape, joint_key.shape
    )
    options: dict[str, Any] = {
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "sinks": sinks,
        "mesh": mesh,
        "axes": axes,
        "implementation": implementation,
    }
    shards = Shards() if mesh is None else Shards.of_mesh(mesh, axes)
    padding = -joint_query.shape[1] % parts
    if ids is not None or joint_ids is not None or padding:
        given = [
            jnp.zeros(x.shape[:2], jnp.int32) if own is None else own[0]
            for x, own in ((query, ids), (joint_query, joint_ids))
        ]
        ids, joint_ids = given
        options["segment_ids"] = _deal(
            shards, TOKENS, padding, ids, joint_ids, fill=PADDING
        )
    pairs = ((query, joint_query), (key, joint_key), (value, joint_value))
    dealt = (_deal(shards, SEQ, padding, *pair) for pair in pairs)
    out = usp_attention(*dealt, **options)
    own = partial(_cut, query.shape[1] // parts)
    out, joint = _on_all(shards, own, SEQ, (SEQ, SEQ))(shards.place(out, SEQ))
    joint = _whole(shards, joint)[:, : joint_query.shape[1]]
    return out, joint


def _deal(
    shards: Shards,
    dims: tuple[str, str] | tuple[str, str, str],
    padding: int,
    x: Any,
    joint: jax.Array,
    fill: int = 0,
) -> jax.Array:
    """[B, T, ...] with [B, J, ...] dealt out to its devices, J padded to divide."""
    widths = [(0, padding if i == 1 else 0) for i in range(joint.ndim)]
    joint = jnp.pad(_whole(shards, joint), widths, constant_values=fill)
    join = _on_all(shards, lambda x, y: jnp.concatenate([x, y], 1), dims, dims)
    return join(shards.place(x, dims), shards.place(joint, dims))


def _cut(length: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[:, :length], x[:, length:]


def _on_all(
    shards: Shards,
    f: Callable[..., Any],
    in_dims: tuple[str, str] | tuple[str, str, str],
    out_dims: tuple[Any, ...],
) -> Callable[..., Any]:
    """`f` on every device's shards; jax differentiates it."""
    return f if shards.mesh is None else shards.shard_map(f, in_dims, out_dims)


def _whole(shards: Shards, x: jax.Array) -> jax.Array:
    """Joint tokens on every device that shares a sequence."""
    return shards.constrain(x, ("batch", None, "tensor")[: 3 if x.ndim == 4 else 2])


def _check_pairs(
    query: jax.Array, key: jax.Array, joint_query: jax.Array, joint_key: jax.Array
) -> None:
    """Checks that both sequences fit to each other."""
    for name, x, joint in (
        ("query", query, joint_query),
        ("key", key, joint_key),
    ):
        if x.dtype != joint.dtype or x.shape[0::2] != joint.shape[0::2]:
            raise ValueError(
                f"joint_{name} is {joint.dtype}{list(joint.shape)}, it must have the "
                f"dtype, batch and heads of {name}, {x.dtype}{list(x.shape)}"
            )
        if x.shape[3] != joint.shape[3]:
            raise ValueError(
                f"joint_{name}.shape={joint.shape} must have the head size of {name}, "
                f"{x.shape[3]}"
            )
    for name, q, k in (
        ("", query, key),
        ("joint_", joint_query, joint_key),
    ):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{name}key.shape={k.shape} must have the length of {name}query, "
                f"{q.shape[1]}"
            )
